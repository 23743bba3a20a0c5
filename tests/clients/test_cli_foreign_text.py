"""Text that others sent is shown, and does nothing: no escape sequence, no turned direction, no markup, no shell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import CompletionItem
from typer._completion_classes import ZshComplete

from service.cli import completion
from service.cli.output import json_text
from service.jobs.lease import RolloutRow

Cli = Callable[..., Any]
HOSTILE = "a\x1b[31m\x7f\x85\x9b2J\u202e\u2066\u2028b[bold]c[/bold]\U000e0041"
SPEC = {
    "kind": "supervised",
    "name": "[red]three[/red] [/]",
    "metadata": {"note": HOSTILE},
    "model": {"source": "tiny"},
    "data": {"train": {"source": "inline", "rows": [{"q": "1", "a": "2"}]}, "prompt": "{q}", "answer": "{a}"},
    "limits": {"max_steps": 4},
}


@pytest.fixture
def job_id(api: str, cli: Cli) -> str:
    return cli("submit", "-", "--json", stdin=json.dumps(SPEC)).json["id"]


def test_json_is_the_same_value_in_plain_characters() -> None:
    value = {HOSTILE: [HOSTILE, "zwölf 十二 👍", {"x": "\n\t"}]}
    for indent in (None, 2):
        text = json_text(value, indent=indent)
        assert json.loads(text) == value
        assert text.replace("\n", "").isprintable()
    assert "zwölf 十二 👍" in text


def test_every_command_that_shows_a_job(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    sample = {"text": HOSTILE, "tokens": 4, "finish_reason": "stop", "reward": 0.5, "scores": {}}
    hand.step(held, 1, {"reward/mean": 0.5, f"reward/{HOSTILE}": 0.5}, [RolloutRow("train", 1, 0, HOSTILE, HOSTILE, [sample])])
    hand.succeed(held)
    shown = [
        cli(*command, *form)
        for command in (("jobs",), ("show", job_id), ("rollouts", job_id), ("metrics", job_id, "--list"), ("watch", job_id))
        for form in ((), ("--json",))
    ]
    shown += [cli("metrics", job_id, f"reward/{HOSTILE}"), cli("metrics", job_id, "--csv")]
    for ran in shown:
        assert (ran.out + ran.err).replace("\n", "").replace("\t", "").isprintable(), ran
    assert "[red]three[/red] [/]" in cli("show", job_id).out
    assert "[bold]c[/bold]" in cli("rollouts", job_id).out


FORGING = "one\nstatus       succeeded"


def test_a_name_forges_no_line(api: str, cli: Cli) -> None:
    spec = json.dumps({**SPEC, "name": FORGING, FORGING: 1, "tags": [FORGING], "metadata": {}})
    refused = cli("submit", "-", stdin=spec)
    assert refused.code == 1 and "unknown key" in refused.err
    job_id = cli("submit", "-", "--json", stdin=spec.replace(json.dumps(FORGING) + ": 1, ", "")).json["id"]
    asked = cli("delete", job_id, stdin="n\n")
    assert job_id in asked.out + asked.err
    told = [refused, asked, cli("show", job_id), cli("pause", job_id), cli("cancel", job_id)]
    for ran in told:
        assert "one\\nstatus" in ran.out + ran.err, ran
        assert not any(line.startswith("status") and "succeeded" in line for line in (ran.out + ran.err).splitlines()), ran


def test_the_question_before_a_deletion_drives_no_terminal(api: str, cli: Cli) -> None:
    job_id = cli("submit", "-", "--json", stdin=json.dumps({**SPEC, "name": HOSTILE})).json["id"]
    asked = cli("delete", job_id, stdin="n\n")
    assert "[bold]c[/bold]" in asked.out + asked.err
    assert (asked.out + asked.err).replace("\n", "").isprintable(), asked


def test_rows_of_a_dataset(api: str, cli: Cli, tmp_path: Path) -> None:
    row = {"q": HOSTILE, "a": "zwö"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dataset = cli("datasets", "upload", str(tmp_path / "rows.jsonl"), "--json").json
    (line,) = cli("datasets", "rows", dataset["id"]).out.splitlines()
    assert json.loads(line) == row
    assert line.isprintable() and "zwö" in line


def test_a_shell_that_completes_is_offered_plain_words(api: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh evaluates what typer gives it, and typer renders markup."""
    names = ["[red]x[/red]", "\\$(id) `id` \"x\" 'y'", HOSTILE, "ends with \\"]
    jobs = [{"id": f"job_{number}", "status": "queued", "name": name} for number, name in enumerate(names)]

    class Fake:
        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: object) -> None: ...

        def list_jobs(self, **_: object) -> dict[str, Any]:
            return {"data": jobs}

    monkeypatch.setattr(completion, "connect", lambda _: Fake())
    context: Any = None
    offered = completion.complete_job(context, "job_")
    assert [id_ for id_, _ in offered] == [job["id"] for job in jobs]
    shell = ZshComplete(context, {}, "ratchet", "_RATCHET_COMPLETE")
    items: list[Any] = [CompletionItem(id_, help=help_) for id_, help_ in offered]
    lines = [shell.format_completion(item) for item in items]
    assert lines[0] == '"job_0":"queued  [red]x[/red]"'
    for line in lines:
        assert line.isprintable()
        assert not set("\\$`'") & set(line) and line.count('"') == 4
