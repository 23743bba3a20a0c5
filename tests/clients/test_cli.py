"""The command line against the real API. Exit statuses are part of its contract."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer._completion_shared import get_completion_script

import service.cli
from ratchet_client import Ratchet
from service.cli import demo, exits, jobs, live
from service.cli.dry_run import print_validation
from service.cli.main import app
from service.errors import Failure
from service.ids import new_id
from service.jobs import lease
from service.jobs.lease import RolloutRow
from service.store.usage import Spent

SPEC = """
kind: rl
name: reverse [red]three[/red]
tags: [small]
model: {source: tiny}
data:
  train: {source: inline, rows: [{q: "123", a: "321"}, {q: "456", a: "654"}]}
  prompt: "rev {q}>"
  answer: "{a}"
objective: {preset: gspo}
rollout: {prompts_per_step: 2, group_size: 2, max_completion_tokens: 4}
reward: {graders: [{kind: exact, reference: "{a}"}]}
limits: {max_steps: 4}
"""
Cli = Callable[..., Any]


def test_ctrl_c_while_the_command_is_loaded_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine, where that takes seconds."""

    class Stopped(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "service.cli.main", Stopped("service.cli.main"))
    with pytest.raises(SystemExit) as ended:
        service.cli.app()
    assert ended.value.code == exits.INTERRUPTED


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.fixture
def job_id(api: str, cli: Cli, spec: str) -> str:
    return cli("submit", spec, "--json").json["id"]


# ---------------------------------------------------------------- submitting and validating


def test_submit_takes_a_file_or_standard_input(api: str, cli: Cli, spec: str) -> None:
    from_file = cli("submit", spec)
    assert from_file.code == 0 and from_file.out.startswith("job_") and "reverse [red]three[/red]" in from_file.out
    assert cli("submit", "-", "--json", stdin=SPEC).json["status"] == "queued"
    assert cli("submit", "--json", stdin='{"kind": "rl"}').code == 1
    assert [job["tags"] for job in cli("jobs", "--json").json["data"]] == [["small"], ["small"]]


def test_validate_says_what_the_job_would_be_and_creates_nothing(api: str, cli: Cli, spec: str) -> None:
    shown = cli("validate", spec)
    assert shown.code == 0 and "rev 123>" in shown.out and "optimizer steps" in shown.out
    assert cli("validate", spec, "--json").json["spec"]["optimizer"]["eps"] == 1e-8
    assert cli("jobs", "--json").json["data"] == []


def test_validate_shows_what_each_grader_pays_for_right_near_and_wrong_answers(api: str, cli: Cli) -> None:
    rows = 'rows: [{q: "x", a: 42}, {q: "y", a: 7}]'
    graders = '{kind: number, reference: "{a}"}, {kind: contains, reference: "{a}", name: there}'
    spec = SPEC.replace('rows: [{q: "123", a: "321"}, {q: "456", a: "654"}]', rows)
    told = cli("validate", "-", stdin=spec.replace('{kind: exact, reference: "{a}"}', graders))
    table = [re.split(r"\s{2,}", line.strip()) for line in told.out.splitlines()]
    assert ["row", "answer", "is", "how it was made", "number", "there", "reward"] in table
    assert ["0", "42", "right", "the reference", "1", "1", "2"] in table
    assert ["0", "-42", "near", "the other sign", "0", "1", "1"] in table
    assert ["0", "I do not know", "wrong", "no answer", "0", "0", "0"] in table
    assert ["0", "7", "wrong", "another row's", "0", "0", "0"] in table
    assert ["1", "7", "right", "the reference", "1", "1", "2"] in table


def test_validate_says_where_a_grader_was_not_asked_and_where_it_could_not_grade(capsys: pytest.CaptureFixture[str]) -> None:
    graded = {"total": None, "scores": {"exact": 1.0, "service": None}, "errors": {"service": "500 of 1"}}
    near = {"kind": "near", "answer": "43", "made": "another last digit", "total": 0.5, "scores": {"exact": 0.5}, "errors": {}}
    sample = {"prompt": "x", "reference": "42", "graded": graded, "errors": ["service: 500 of 1"], "probes": [near]}
    print_validation(
        {
            "spec": {"reward": {"graders": [{"name": "exact"}, {"name": "service"}]}},
            "spec_sha256": "",
            "data_sha256": "",
            "estimates": {},
            "samples": [sample, sample],
            "warnings": [],
        }
    )
    out, err = capsys.readouterr()
    table = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["0", "42", "right", "the reference", "1", "error", "error"] in table
    assert ["0", "43", "near", "another last digit", "0.5"] in table  # nothing is said of what was not asked
    assert err == "not graded: row 0, answer '42', by service: 500 of 1\n"


def test_validate_of_a_job_without_graders_says_nothing_of_rewards(api: str, cli: Cli) -> None:
    data = "data: {train: {source: inline, rows: [{q: x, a: y}]}, prompt: '{q}', answer: '{a}'}"
    spec = f"{{kind: supervised, model: {{source: tiny}}, {data}, limits: {{max_steps: 1}}}}"
    told = cli("validate", "-", stdin=spec)
    table = told.out.split("sample rows:\n")[1].splitlines()
    assert [line.split() for line in table] == [["row", "prompt", "learns"], ["0", "x", "y"]], told.out


def test_validate_of_a_supervised_job_says_what_it_will_learn(api: str, cli: Cli) -> None:
    rows = "{q: '1', a: '23'}, {q: '2', a: '4'}"
    data = f"data: {{train: {{source: inline, rows: [{rows}]}}, prompt: '{{q}}', answer: '{{a}}'}}"
    told = cli("validate", "-", stdin=f"{{kind: supervised, model: {{source: tiny}}, {data}, limits: {{max_steps: 1}}}}")
    facts = dict(re.findall(r"^(\S.*?) {2,}(.*)$", told.out, re.MULTILINE))
    assert facts["train rows"] == "2" and facts["learnt tokens per epoch"] == "5"  # three characters, two end tokens
    assert not {"completions", "sampled tokens at most"} & facts.keys()


def test_validate_shows_a_chat_and_each_turn_that_is_learnt(api: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    chat = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3?")]
    messages = [{"role": role, "content": content} for role, content in chat] + [call]
    data = {"train": {"source": "inline", "rows": [{"m": messages}]}, "chat": "m", "learn": "all"}
    spec = {"kind": "supervised", "model": {"source": str(tmp_path)}, "data": data, "limits": {"max_steps": 1}}
    sample = cli("validate", "-", "--json", stdin=json.dumps(spec)).json["samples"][0]
    assert sample["learns"] == ["4", json.dumps(call)]
    told = cli("validate", "-", stdin=json.dumps(spec))
    [row] = [line for line in told.out.splitlines() if line.startswith("0 ")]
    assert "system: Be brief.  user: 2+2?  assistant: 4  user: And 3?" in row and "4 … {" in row


def test_show_says_what_the_job_runs_on(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    found = {"device": "cpu", "dtype": "float32", "architecture": "Llama", "parameters": 12345, "trainable_parameters": 678}
    lease.set_resolved(hand.store, held, {**found, "revision": None, "further": {}})
    [line] = [line for line in cli("show", job_id).out.splitlines() if line.startswith("runs on")]
    assert line.split(None, 2)[2] == "cpu, float32, Llama, 12,345 parameters, 678 of them trained"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("keys", "create", "x", "--scope", "all"), "'--scope': 'all' is not one of 'read', 'write', 'admin'."),
        (("sample", "x", "y", "-n", "0"), "'--count' / '-n': Input should be greater than or equal to 1"),
        (("sample", "x", "y", "--tools", "[]"), "they need --chat"),
        (("sample", "x", "y", "--chat", "--tools", '{"a": 1}'), "--tools: must be a list of objects"),
        (("sample", "x", "y", "--chat", "--tools", "[1]"), "--tools: must be a list of objects"),
        (("sample", "x", "y", "--chat", "--chat-template-kwargs", "{"), "is neither JSON nor a file of JSON"),
        (("sample", "x", "y", "--chat", "--chat-template-kwargs", "/absent"), "No such file or directory"),
    ],
)
def test_a_wrong_option_is_said_in_plain_words(cli: Cli, args: tuple[str, ...], says: str) -> None:
    refused = cli(*args)
    assert refused.code == 2 and says in refused.err and "Value error" not in refused.err, refused.err


def test_everything_wrong_with_a_spec_is_said_with_where_what_and_allowed(api: str, cli: Cli) -> None:
    wrong = SPEC.replace("preset: gspo", "preset: gspoo").replace("group_size: 2", "group_size: 0").replace("tags:", "tagz:")
    for command in ("validate", "submit"):
        refused = cli(command, "-", stdin=wrong)
        assert (refused.code, refused.out) == (1, "")
        for said in ("/objective/preset", "came: gspoo", "gspo_token", "/rollout/group_size", "came: 0", "/tagz", "tags"):
            assert said in refused.err, (said, refused.err)
    assert cli("jobs", "--json").json["data"] == []


def test_a_single_fault_is_said_once(api: str, cli: Cli) -> None:
    refused = cli("validate", "-", stdin=SPEC.replace("kind: exact", "kind: exakt"))
    assert refused.err.count("/reward/graders/0/kind") == 1 and "came: exakt" in refused.err and "allowed: " in refused.err


def test_broken_yaml_is_said_with_its_line(api: str, cli: Cli) -> None:
    refused = cli("submit", "-", stdin="kind: rl\nmodel: {source: tiny\n")
    assert refused.code == 1 and "line 3" in refused.err


def test_a_missing_file_is_a_plain_error(api: str, cli: Cli) -> None:
    refused = cli("submit", "nowhere.yaml")
    assert (refused.code, refused.err) == (1, "error: nowhere.yaml: No such file or directory\n")


# ---------------------------------------------------------------- jobs


def test_jobs_are_listed_with_filters_and_shown(cli: Cli, job_id: str) -> None:
    listed = cli("jobs", "--status", "queued", "--tag", "small").out
    assert job_id in listed and "reverse [red]three[/red]" in listed and "0/4" in listed
    assert "no jobs" in cli("jobs", "--kind", "supervised").err
    shown = cli("show", job_id).out
    assert job_id in shown and "rl, gspo" in shown and "cancel" in shown
    assert cli("show", job_id, "--json").json["spec_sent"]["name"] == "reverse [red]three[/red]"


def test_a_list_goes_on_behind_its_last_id(api: str, cli: Cli, spec: str) -> None:
    ids = [cli("submit", spec, "--json").json["id"] for _ in range(3)]
    first = cli("jobs", "--limit", "2")
    assert f"--after {ids[1]}" in first.err
    assert [job["id"] for job in cli("jobs", "--after", ids[1], "--json").json["data"]] == [ids[0]]


def test_pause_resume_cancel_delete_and_what_is_refused(cli: Cli, job_id: str) -> None:
    assert "paused" in cli("pause", job_id).out
    assert f"it rests (pause_requested); it goes on with: ratchet resume {job_id}" in cli("watch", job_id).out
    assert "paused" in cli("pause", job_id).out
    assert "queued" in cli("resume", job_id).out
    unfinished = cli("delete", job_id, "--yes")
    assert unfinished.code == 1 and "error: " in unfinished.err
    assert "cancelled" in cli("cancel", job_id).out
    refused = cli("resume", job_id)
    assert refused.code == 1 and refused.err.count("fork, delete") == 1 and "allowed now: " in refused.err
    assert cli("delete", job_id, stdin="n\n").code != 0
    assert cli("delete", job_id, stdin="y\n").code == 0
    gone = cli("show", job_id)
    assert gone.code == 1 and job_id in gone.err


def test_fork_changes_parts_of_the_spec(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    checkpoint_id = hand.save(held, 4, weights=b"w")
    hand.succeed(held)
    changes = "optimizer: {learning_rate: 1e-4}\nname: again"
    forked = cli("fork", job_id, "--changes", "-", "--json", stdin=changes).json
    assert (forked["parent_id"], forked["name"], forked["from_checkpoint_id"]) == (job_id, "again", checkpoint_id)
    assert forked["spec"]["optimizer"]["learning_rate"] == 1e-4
    assert cli("fork", job_id, "--changes", "-", stdin="- a list").code == 1
    twice = cli("fork", job_id, "--changes", "-", stdin="name: a\nname: b")
    assert twice.code == 1 and "line 2" in twice.err and "'name' stands twice" in twice.err
    for text in ("name: !!int x", "name: &a [*a]"):
        refused = cli("fork", job_id, "--changes", "-", stdin=text)
        assert refused.code == 1 and "are not taken" in refused.err
    noted = cli("fork", job_id, "--changes", "-", "--json", stdin="metadata: {day: 2024-01-31, at: 12:30, again: yes}").json
    assert noted["spec"]["metadata"] == {"day": "2024-01-31", "at": "12:30", "again": "yes"}  # as the service reads YAML


# ---------------------------------------------------------------- following


def test_watch_exits_as_the_job_does_and_says_why(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "policy/clip_fraction_low": 0.125, "policy/approx_kl_k3": 0.001})
    failure = Failure("grader_unhealthy", "3 of 4 samples could not be graded \x1b[2J", hint="mend the grader")
    hand.fail(held, failure)
    watched = cli("watch", job_id)
    assert watched.code == 4
    for said in ("reward 0.250", "clip fraction 0.125", "KL 0.001", "grader_unhealthy", "hint: mend the grader", "failed"):
        assert said in watched.out, (said, watched.out)
    assert "\x1b" not in watched.out


def test_submit_follow_lasts_as_long_as_the_job(api: str, cli: Cli, hand: Any, spec: str) -> None:
    def work() -> None:
        held = hand.take(within_s=10)
        for step in (1, 2, 3, 4):
            hand.step(held, step, {"reward/mean": step / 4})
        hand.succeed(held)

    worker = threading.Thread(target=work)
    worker.start()
    followed = cli("submit", spec, "--follow")
    worker.join()
    assert followed.code == 0 and "step 4/4  reward 1.000" in followed.out and "succeeded" in followed.out


def test_a_cancelled_job_has_an_exit_status_of_its_own(cli: Cli, job_id: str) -> None:
    cli("cancel", job_id)
    assert cli("watch", job_id).code == 5


def test_what_is_not_there_is_told_with_what_lists_those_that_are(cli: Cli, api: str) -> None:
    """In the same words whether it never was or is another project's."""
    ids = {"job": new_id("job"), "checkpoint": new_id("ckpt"), "webhook": new_id("whk")}
    for of, command in ("job", ("show",)), ("checkpoint", ("checkpoints", "pin")), ("webhook", ("webhooks", "test")):
        id_ = ids[of]
        said = cli(*command, id_)
        assert said.code == 1 and said.err.endswith(
            f"error: no {of} {id_} in this project (not_found)\n  hint: `ratchet {of}s` lists those that this key sees: "
            "its own project's\n"
        )


def test_a_job_that_rests_ends_the_watch_with_a_status_of_its_own_and_says_how_to_go_on(
    cli: Cli, hand: Any, job_id: str
) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25})
    lease.park(hand.store, held, Failure("grader_unhealthy", "3 of 4 samples could not be graded", hint="mend the grader"))
    watched = cli("watch", job_id)
    assert watched.code == 6 and "paused" in watched.out
    assert f"ratchet resume {job_id}" in watched.out and "hint: mend the grader" in watched.out
    assert cli("watch", job_id, "--json").code == 6
    assert "6  the followed job paused" in cli("--help").out


def test_a_spent_budget_says_with_which_option_the_job_goes_on() -> None:
    def told(budget: dict[str, Any]) -> str:
        job: Any = {"id": "job_1", "status_reason": "budget_spent", "spec": {"limits": {"budget": budget}}}
        job["usage"] = {"tokens": 6, "worker_s": 2.5}
        return jobs._how_it_goes_on(job)

    assert told({"tokens": 5, "worker_s": None}) == "give it more: ratchet resume job_1 --tokens N"
    assert told({"worker_s": 2.5}) == "give it more: ratchet resume job_1 --worker-s N"
    assert told({"tokens": 7, "worker_s": 2.0}) == "give it more: ratchet resume job_1 --worker-s N"
    assert "ratchet budget" in told({}) and "ratchet budget" in told({"tokens": 7, "worker_s": None})


def test_an_evaluation_without_rewards_tells_its_loss(cli: Cli) -> None:
    event: Any = {"type": "evaluation", "data": {"step": 3, "metrics": {"eval/loss": 0.25}}}
    assert str(live.note_of(event)) == "eval at step 3: loss 0.250"


def test_an_old_pause_does_not_end_the_watch_of_a_job_that_has_gone_on(cli: Cli, hand: Any, job_id: str) -> None:
    cli("pause", job_id)
    cli("resume", job_id)
    cli("pause", job_id)
    cli("resume", job_id)
    hand.succeed(hand.take())
    watched = cli("watch", job_id)
    assert watched.code == 0 and watched.out.count("paused") == 2


def test_watch_json_prints_every_event_once_in_order(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25})
    hand.succeed(held)
    events = [json.loads(line) for line in cli("watch", job_id, "--json").out.splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "status_changed" and events[-1]["data"]["to"] == "succeeded"


def test_a_terminal_gets_a_progress_bar_with_numbers_that_move(hand: Any, job_id: str) -> None:
    held = hand.take()
    for step in (1, 2, 3):
        hand.step(held, step, {"reward/mean": step / 4, "policy/clip_fraction_high": 0.5, "policy/approx_kl_k3": 0.25})
    hand.succeed(held)
    screen = in_terminal("watch", job_id)
    for said in ("3/4", "reward 0.750", "clip fraction 0.500", "KL 0.250", "▁▄█", "reverse [red]three[/red]"):
        assert said in screen, (said, screen)


def in_terminal(*args: str, columns: int = 100) -> str:
    """Everything that the command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-m", "service.cli", *args], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how a terminal says that nobody writes any more
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    assert process.wait(30) == 0, written.decode()
    return written.decode()


# ---------------------------------------------------------------- metrics, rollouts, checkpoints


def test_metrics_are_drawn_listed_and_given_as_json(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    for step, reward in enumerate((0.1, 0.2, float("nan"), 0.9), start=1):
        hand.step(held, step, {"reward/mean": reward, "perf/step_s": 2.0})
    drawn = cli("metrics", job_id).out
    assert "reward/mean  0.900 at step 4  (1 not finite)" in drawn and "perf/step_s" not in drawn
    assert "┌" in drawn and "⠒" in drawn and "\x1b" not in drawn
    assert "perf/step_s" in cli("metrics", job_id, "--list").out
    series = cli("metrics", job_id, "reward/mean", "--json").json["series"]
    assert series == {"reward/mean": {"step": [1, 2, 3, 4], "value": [0.1, 0.2, None, 0.9]}}


def test_a_metric_that_a_job_lacks_is_refused_in_every_form_after_what_is_there_was_printed(
    cli: Cli, hand: Any, job_id: str, spec: str
) -> None:
    hand.step(hand.take(), 1, {"reward/mean": 0.25})
    for form in ((), ("--list",), ("--csv",)):
        unknown = cli("metrics", job_id, "reward/mean", "reward/men", *form)
        assert (unknown.code, unknown.err.split(";")[0]) == (1, f"{job_id} has no reward/men"), form
        assert "reward/mean" in unknown.out
        assert "did you mean reward/mean?" in unknown.err
    as_json = cli("metrics", job_id, "reward/men", "--json")
    assert as_json.code == 1 and json.loads(as_json.err)["error"]["detail"].startswith(f"{job_id} has no reward/men;")
    swapped = cli("metrics", "reward/mean", job_id)
    assert swapped.code == 2 and "ratchet metrics job_01k... reward/mean" in swapped.err
    other = cli("submit", spec, "--json").json["id"]
    both = cli("metrics", other, job_id, "reward/mean")
    assert (both.code, both.err.split(";")[0]) == (1, f"{other} has no reward/mean")
    assert "reward/mean  0.250 at step 1" in both.out  # the second job is drawn although the first has nothing


def test_nothing_measured_yet_is_no_error(cli: Cli, job_id: str) -> None:
    drawn = cli("metrics", job_id)
    assert (drawn.code, drawn.out) == (0, "") and "nothing yet" in drawn.err


def test_rollouts_show_answers_without_letting_them_drive_the_terminal(cli: Cli, hand: Any, job_id: str) -> None:
    sample = {"text": "32\x1b[2J\n1[bold]", "tokens": 4, "finish_reason": "length", "reward": 0.5, "scores": {"exact": 0.5}}
    hand.step(hand.take(), 1, {}, [RolloutRow("train", 1, 0, "rev 123>", "321", [sample])])
    shown = cli("rollouts", job_id).out
    assert "rev 123>" in shown and "321" in shown and "0.500" in shown and "(cut)" in shown
    assert "32\\x1b[2J⏎1[bold]" in shown and "\x1b" not in shown
    assert cli("rollouts", job_id, "--split", "eval", "--json").json["data"] == []


def test_checkpoints_are_listed_downloaded_and_deleted(cli: Cli, hand: Any, job_id: str, tmp_path: Path) -> None:
    held = hand.take()
    checkpoint_id = hand.save(held, 4, weights=os.urandom(3_000_000), trainer=b"{}")
    hand.succeed(held)
    assert checkpoint_id in cli("checkpoints", "--job", job_id).out
    assert [saved["id"] for saved in cli("checkpoints", "list", "--job", job_id, "--json").json["data"]] == [checkpoint_id]
    folder = tmp_path / "out"
    assert cli("checkpoints", "download", checkpoint_id, "--to", str(folder)).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "manifest.json", "trainer", "weights"]
    assert checkpoint_id in (folder / "README.md").read_text()
    assert (folder / "weights").stat().st_size == 3_000_000
    again = cli("checkpoints", "download", checkpoint_id, "--to", str(folder))
    assert again.code == 1 and "not empty" in again.err
    assert cli("checkpoints", "delete", checkpoint_id).code == 0
    assert cli("checkpoints", "show", checkpoint_id).code == 1


def test_the_best_checkpoint_of_a_job_is_downloaded_by_the_job_s_name(cli: Cli, hand: Any, job_id: str, tmp_path: Path) -> None:
    missing = cli("checkpoints", "download", "--best", job_id, "--to", str(tmp_path / "none"))
    assert missing.code == 1 and f"no checkpoint of {job_id} was evaluated" in missing.err
    held = hand.take()
    best = [hand.save(held, step, reward=reward, trainer=b"{}") for step, reward in ((2, 0.1), (4, 0.9), (6, 0.3))][1]
    assert cli("checkpoints", "download", "--best", job_id, "--to", str(tmp_path / "best")).code == 0
    assert best in (tmp_path / "best" / "README.md").read_text()


# ---------------------------------------------------------------- datasets, models, keys


def test_datasets_are_uploaded_looked_into_and_deleted(api: str, cli: Cli, tmp_path: Path) -> None:
    rows = tmp_path / "digits.jsonl"
    rows.write_text('{"q": "1", "a": "one"}\n{"q": "2", "a": "zwö"}\n')
    dataset = cli("datasets", "upload", str(rows), "--json").json
    assert (dataset["name"], dataset["rows"]) == ("digits", 2)
    assert dataset["id"] in cli("datasets").out
    assert cli("datasets", "rows", dataset["id"], "--offset", "1").out == '{"q": "2", "a": "zwö"}\n'
    assert "string" in cli("datasets", "show", dataset["id"]).out
    assert cli("datasets", "delete", dataset["id"]).code == 0
    assert cli("datasets", "--json").json["data"] == []


def test_a_broken_line_of_an_upload_is_named(api: str, cli: Cli, tmp_path: Path) -> None:
    rows = tmp_path / "digits.jsonl"
    rows.write_text('{"q": "1"}\n{"q": \n')
    refused = cli("datasets", "upload", str(rows))
    assert refused.code == 1 and "line 2" in refused.err
    assert cli("datasets", "upload", str(tmp_path / "absent.jsonl")).code == 2


def test_keys_are_made_used_and_revoked(api: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cli("keys", "create", "laptop")
    key = made.out.strip()
    assert key.startswith("tml-") and "only time" in made.err
    (key_id,) = [one["id"] for one in cli("keys", "--json").json["data"] if one["name"] == "laptop"]
    with monkeypatch.context() as patch:
        patch.setenv("RATCHET_API_KEY", key)
        assert cli("jobs").code == 0
    assert cli("keys", "revoke", key_id).code == 0
    monkeypatch.setenv("RATCHET_API_KEY", key)
    revoked = cli("jobs")
    assert revoked.code == 1 and "key" in revoked.err


def test_a_key_is_made_with_a_scope_an_end_and_a_rate(api: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--scope", "read", "--expires-in-days", "30", "--requests-per-s", "5")
    made = cli("keys", "create", "dashboard", *asked, "--json").json
    assert made["scopes"] == ["read"] and made["rate"] == {"requests_per_s": 5, "burst": 10}
    listed = next(line for line in cli("keys").out.splitlines() if "dashboard" in line)
    assert "read" in listed and "5/s" in listed and made["expires_at"][:10] in listed
    monkeypatch.setenv("RATCHET_API_KEY", made["key"])
    assert cli("jobs").code == 0
    refused = cli("keys")
    assert refused.code == 1 and "scope 'admin'" in refused.err


def test_a_key_reads_and_writes_and_expires_unless_told_otherwise(api: str, cli: Cli) -> None:
    made = cli("keys", "create", "laptop", "--json").json
    assert made["scopes"] == ["read", "write"] and made["expires_at"] is not None
    lasting = cli("keys", "create", "operator", "--scope", "admin", "--never-expires", "--json").json
    assert lasting["scopes"] == ["read", "write", "admin"] and lasting["expires_at"] is None


def test_models_name_what_a_spec_may_say(api: str, cli: Cli) -> None:
    assert "tiny" in cli("models").out
    assert cli("models", "--json").json["data"][0]["id"] == "tiny"


def test_workers_and_what_waits_for_them_are_listed(api: str, cli: Cli) -> None:
    assert "no worker is alive" in cli("workers").out + cli("workers").err
    told = cli("workers", "--json").json
    assert told["workers"] == [] and set(told["queue"]["waiting"]) == {"any", "cpu", "gpu"}
    assert {"group_by", "total"} <= cli("usage", "--by", "project", "--json").json.keys()


# ---------------------------------------------------------------- several jobs, and other programs


def test_jobs_are_compared_by_their_specs_and_by_what_they_measured(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "perf/step_s": 1.0})
    hand.succeed(held)
    other = cli("fork", job_id, "--changes", "-", "--json", stdin="optimizer: {learning_rate: 1e-4}\nname: again").json["id"]
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.75})
    hand.succeed(held)
    compared = cli("compare", job_id, other)
    assert compared.code == 0 and job_id in compared.out and other in compared.out
    (rate,) = [line for line in compared.out.splitlines() if "optimizer.learning_rate" in line]
    assert rate.split()[1:] == ["1e-05", "0.0001"]
    (reward,) = [line for line in compared.out.splitlines() if "reward/mean" in line and "eval" not in line]
    assert reward.split()[1:] == ["0.250", "0.750"] and "perf/step_s" not in compared.out
    found = cli("compare", job_id, other, "--all", "--json").json
    assert found["metrics"] == {"perf/step_s": [1.0, None], "reward/mean": [0.25, 0.75]}
    assert found["spec"]["optimizer.learning_rate"] == [1e-05, 0.0001] and "name" not in found["spec"]
    assert cli("compare", job_id).code == 2
    both = cli("metrics", job_id, other, "reward/mean")
    assert both.code == 0 and both.out.index(job_id) < both.out.index("0.250") < both.out.index(other) < both.out.index("0.750")


def test_curves_are_printed_as_csv_point_by_point(cli: Cli, hand: Any, job_id: str) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "policy/loss": float("nan")})
    hand.step(held, 2, {"reward/mean": 0.5})
    rows = cli("metrics", job_id, "--csv").out.splitlines()
    assert rows[0] == "job,metric,step,value"
    assert sorted(rows[1:]) == [f"{job_id},policy/loss,1,", f"{job_id},reward/mean,1,0.25", f"{job_id},reward/mean,2,0.5"]


def test_errors_are_json_where_json_was_asked_for(api: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = cli("show", "job_nobody", "--json")
    assert refused.code == 1 and refused.out == "" and json.loads(refused.err)["error"]["code"] == "not_found"
    wrong = cli("submit", "-", "--json", stdin="kind: rl")
    assert wrong.code == 1 and json.loads(wrong.err)["error"]["errors"][0]["pointer"].startswith("/")
    monkeypatch.setenv("RATCHET_URL", "http://127.0.0.1:9")
    away = cli("jobs", "--json")
    assert away.code == 3 and json.loads(away.err)["error"]["code"] == "no_answer"


def test_a_terminal_that_shows_only_ascii_gets_ascii(api: str, hand: Any, job_id: str) -> None:
    held = hand.take()
    for step in (1, 2, 3):
        hand.step(held, step, {"reward/mean": step / 4})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    drawn = subprocess.run([sys.executable, "-m", "service.cli", "metrics", job_id], capture_output=True, env=environment)
    assert drawn.returncode == 0 and drawn.stdout.isascii() and b"*" in drawn.stdout and b"\\u" not in drawn.stdout


def test_an_id_is_never_cut_or_folded(hand: Any, job_id: str) -> None:
    assert job_id in in_terminal("jobs", columns=40)


def test_a_wrong_command_line_is_json_too_if_that_was_asked_for(cli: Cli) -> None:
    for line in (("jobs", "--limit", "0"), ("keys", "create"), ("checkpoints", "shw"), ("compare", "job_1"), ("jobs", "--x")):
        asked = cli(*line, "--json")
        error = json.loads(asked.err)["error"]
        assert (asked.code, asked.out, error["code"]) == (2, "", "usage") and len(error["detail"]) > 10, asked
        assert cli(*line).code == 2


def test_the_version_is_said(cli: Cli) -> None:
    assert re.fullmatch(r"ratchet \d+\.\d+\.\d+\S*\n", cli("--version").out)


def test_the_shell_is_offered_ids_and_states(api: str, cli: Cli, job_id: str) -> None:
    words = {"COMP_WORDS": "ratchet show job_", "COMP_CWORD": "2", "_RATCHET_COMPLETE": "complete_bash"}
    ratchet = Path(sys.executable).parent / "ratchet"
    offered = subprocess.run([ratchet], capture_output=True, text=True, env={**os.environ, **words})
    assert job_id in offered.stdout


@pytest.mark.parametrize(
    ("pieces", "replaced", "offered", "asked"),
    [
        (("sample", " ", "dig"), "dig", ["digits@production", "digits@preview"], ["sample", "dig"]),
        (("sample", " ", "digits", "@", "pr"), "@pr", ["@production", "@preview"], ["sample", "digits@pr"]),
        (("sample", " ", "digits", "@"), "@", ["@production", "@preview"], ["sample", "digits@"]),
        (("sample", " ", ""), "", ["digits@production", "digits@preview"], ["sample", ""]),
        (
            ("sample", " ", "'a b'", "  ", "digits", "@", "p"),
            "@p",
            ["@production", "@preview"],
            ["sample", "'a b'", "digits@p"],
        ),
    ],
)
def test_bash_completes_an_alias_though_it_breaks_words_at_the_at(
    tmp_path: Path, pieces: tuple[str, ...], replaced: str, offered: list[str], asked: list[str]
) -> None:
    """`pieces` and `replaced` are what bash 5 gives to a completion function; blanks are only in the line."""
    stand_in = tmp_path / "ratchet"
    stand_in.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$COMP_WORDS" "$COMP_CWORD" > asked; echo digits@production; echo digits@preview\n'
    )
    stand_in.chmod(0o755)
    script = get_completion_script(prog_name="ratchet", complete_var="_RATCHET_COMPLETE", shell="bash")
    words = ["ratchet", *(piece for piece in pieces if not piece or piece.strip())]
    told = f"COMP_LINE={shlex.quote('ratchet ' + ''.join(pieces))}; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD={len(words) - 1}"
    called = f"_ratchet_completion {stand_in} {shlex.quote(replaced)}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    lines = f"{script}\n{told}; COMP_WORDS=({shlex.join(words)})\n{called}"
    done = subprocess.run(["bash", "--norc", "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.splitlines(), done.stderr) == (offered, "")
    assert (tmp_path / "asked").read_text() == "\n".join(["ratchet", *asked, str(len(asked)), ""])


def test_wherever_an_id_is_wanted_some_are_offered() -> None:
    """By the name that helps show for it; what only a person can make up, such as DELIVERY or a URL, is not there."""
    wanted = {"JOB", "SESSION", "CHECKPOINT", "DATASET", "KEY", "WEBHOOK", "ALIAS", "[JOB]... [NAME]..."}
    lacking, seen = list[str](), set[str]()

    def look(command: Any, path: str) -> None:
        for param in command.params:
            if param.metavar in wanted:
                seen.add(param.metavar)
                if param._custom_shell_complete is None:
                    lacking.append(f"{path} {param.name}")
        for name, below in getattr(command, "commands", {}).items():
            look(below, f"{path} {name}")

    look(typer.main.get_command(app), "ratchet")
    assert (lacking, seen) == ([], wanted)


# ---------------------------------------------------------------- finding the service, and help


def test_no_service_is_its_own_exit_status(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    nothing = cli("jobs")
    assert nothing.code == 3 and "ratchet up" in nothing.err
    monkeypatch.setenv("RATCHET_API_KEY", "tml-x")
    dead = cli("--url", "http://127.0.0.1:9", "jobs")
    assert dead.code == 3 and "http://127.0.0.1:9" in dead.err


def test_a_local_stack_is_found_by_its_data_directory(
    api: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stack"
    folder.mkdir()
    (folder / "url").write_text(api + "\n")
    (folder / "key").write_text(os.environ["RATCHET_API_KEY"] + "\n")
    monkeypatch.delenv("RATCHET_URL")
    monkeypatch.delenv("RATCHET_API_KEY")
    assert cli("--data-dir", str(folder), "jobs").code == 0
    monkeypatch.setenv("RATCHET_DATA_DIR", str(folder))
    assert cli("jobs").code == 0


def test_help_has_examples_and_the_exit_statuses(cli: Cli) -> None:
    shown = cli("--help").out
    assert "$ ratchet submit job.yaml --follow" in shown and "4  the followed job failed" in shown
    assert "$ ratchet metrics job_01k... --list" in cli("metrics", "--help").out
    misspelt = cli("jbos")
    assert misspelt.code == 2 and "jobs" in misspelt.err


def test_the_demos_jobs_are_valid_and_keep_apart_what_is_held_out(hand: Any, job_id: str) -> None:
    rows = demo.make_rows(seed=0)
    assert {part: len(found) for part, found in rows.items()} == {"train": 20_000, "held_out": 512, "probe": 128}
    trained, held_out = ({row["digits"] for row in rows[part]} for part in ("train", "held_out"))
    assert not trained & held_out and len(trained) == 20_000
    with Ratchet() as ratchet:
        ids = {part: ratchet.create_dataset(found, part)["id"] for part, found in rows.items()}
        for spec in (demo.warm_up_spec(ids, seed=0), demo.gspo_spec(ids, hand.save(hand.take(), 4, weights=b"w"), seed=0)):
            assert ratchet.validate_job(spec)["samples"][0]["graded"]["total"] == 1.0


def test_the_demo_says_what_to_do_next_and_keeps_the_model_only_in_a_new_folder(cli: Cli, tmp_path: Path) -> None:
    assert "ratchet demo --keep my-model" in demo.what_next(None)
    kept = demo.what_next(tmp_path / "my model")
    assert f"ratchet sample '{tmp_path}/my model' " in kept and "--keep" not in kept
    example = Path(__file__).parents[2] / "examples" / "copy-digits.yaml"
    assert example.is_file() and "ratchet submit examples/copy-digits.yaml --follow" in kept
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused = cli("demo", "--keep", str(tmp_path / "full"))
    assert refused.code == 1 and "is there already" in refused.err and refused.out == ""
    refused = cli("demo", "--keep", str(tmp_path / "full" / "file" / "below"))
    assert refused.code == 1 and "Not a directory" in refused.err and refused.out == "", "before anything is trained"


def test_the_example_job_is_valid(api: str, cli: Cli) -> None:
    validated = cli("validate", str(Path(__file__).parents[2] / "examples" / "copy-digits.yaml"))
    assert validated.code == 0 and "copy 1592>" in validated.out


# ---------------------------------------------------------------- what was spent


def test_usage_and_budgets(api: str, cli: Cli, job_id: str, hand: Any) -> None:
    assert "nothing was spent" in cli("usage").err
    held = hand.take()
    lease.commit_step(hand.store, held, 1, {}, spent=Spent(300, 20, {"sampling": 65.0}))
    lease.pause(hand.store, held)
    by_job = cli("usage", "--by", "job")
    assert job_id in by_job.out and "300" in by_job.out and "1:05" in by_job.out and "total" in by_job.out
    assert cli("usage", "--json").json["total"]["wasted"]["sampled_tokens"] == 300
    assert "300 tokens sampled, 20 trained" in cli("show", job_id).out
    assert cli("budget", "--tokens", "100").code != 0
    assert cli("budget", "--project", "default", "--tokens", "100", "--json").json["tokens"] == 100
    assert "100" in cli("budget").out and "since      the beginning\n" in cli("budget").out
    refused = cli("resume", job_id, "--tokens", "1000")
    assert refused.code == 1 and "budget_spent" in refused.err
    cli("budget", "--project", "default", "--unbounded")
    assert cli("resume", job_id, "--tokens", "1000", "--json").json["budget_tokens"] == 1000
    hand.take()
    cancelled = cli("cancel", job_id, "--save", "--grace-seconds", "5", "--json").json
    assert cancelled["status"] == "cancelling"


def test_checkpoints_are_pinned_pruned_and_traced(api: str, cli: Cli, job_id: str, hand: Any) -> None:
    held = hand.take()
    first, second, third = (hand.save(held, step, **{"a.bin": b"x"}) for step in (1, 2, 3))
    lease.succeed(hand.store, held, {}, "max_steps")
    assert cli("checkpoints", "pin", second).code == 0
    everything = cli("checkpoints", "prune")
    assert everything.code == 2 and "--older-than-s" in everything.err
    shown = cli("checkpoints", "prune", "--job", job_id, "--keep-last", "1", "--final")
    assert first in shown.out and "would go" in shown.out and f"{second} stays: pinned" in shown.err
    assert len(cli("checkpoints", "--json").json["data"]) == 3
    assert cli("checkpoints", "prune", "--job", job_id, "--keep-last", "1", "--final", "--yes").code == 0
    assert [one["id"] for one in cli("checkpoints", "--json").json["data"]] == [third, second]
    assert cli("checkpoints", "delete", second).code == 1
    assert cli("checkpoints", "unpin", second).code == 0 and cli("checkpoints", "delete", second).code == 0
    traced = cli("checkpoints", "lineage", third)
    assert third in traced.out and "base: tiny" in traced.out


def test_aliases_are_promoted_rolled_back_and_deleted(api: str, cli: Cli, job_id: str, hand: Any, tmp_path: Path) -> None:
    held = hand.take()
    first, second = (hand.save(held, step, **{"a.bin": b"x"}) for step in (1, 2))
    assert "no aliases" in cli("aliases").err
    assert cli("promote", first, "d@staging", "--expected", "none").out == f"d@staging points at {first}\n"
    promoted = cli("promote", "d@staging", "d@prod", "--note", "best", "--json").json
    assert (promoted["checkpoint_id"], promoted["note"]) == (first, "best")
    late = cli("promote", second, "d@prod", "--expected", second)
    assert late.code == 1 and "alias_moved" in late.err and f"points at {first}" in late.err
    assert cli("promote", second, "d@prod", "--expected", first).code == 0
    listed = cli("aliases").out
    assert "d@staging" in listed and second in listed
    assert re.search(rf"{second}.*d@prod", cli("checkpoints").out)
    assert cli("aliases", "rollback", "d@prod", "--note", "it loops").out == f"d@prod points at {first} again\n"
    told = cli("aliases", "history", "d@prod").out.splitlines()
    assert [line.split()[0] for line in told] == ["seq", "3", "2", "1"] and "it loops" in told[1] and "best" in told[3]
    assert "more: ratchet aliases history d@prod" in cli("aliases", "history", "d@prod", "--limit", "1").err
    folder = tmp_path / "downloaded"
    assert cli("checkpoints", "download", "d@prod", "--to", str(folder)).code == 0
    assert first in (folder / "README.md").read_text()
    assert cli("checkpoints", "show", "d@prod", "--json").json["id"] == first
    assert cli("aliases", "delete", "d@prod").code == 0 and cli("aliases", "show", "d@prod").code == 1
    assert cli("aliases", "show", "d@staging").out.splitlines()[0] == "id             d@staging"
    refused = cli("promote", first, "production")
    assert refused.code == 1 and "MODEL@ALIAS" in refused.err


# ---------------------------------------------------------------- webhooks


def test_webhooks_are_made_shown_and_changed(api: str, cli: Cli) -> None:
    made = cli("webhooks", "create", "https://example.com/x", "--event", "job.failed", "--json").json
    assert made["secret"].startswith("whsec_") and made["events"] == ["job.failed"]
    assert cli("webhooks", "create", "https://example.com/y").out.startswith("whsec_")
    assert "https://example.com/x" in cli("webhooks").out
    assert "disabled: its owner disabled it" in cli("webhooks", "update", made["id"], "--disable").out
    assert cli("webhooks", "update", made["id"], "--enable").out.endswith("enabled\n")
    assert cli("webhooks", "rotate", made["id"]).out.startswith("whsec_")
    tested = cli("webhooks", "test", made["id"]).out.split()[0]
    assert tested in cli("webhooks", "deliveries", made["id"]).out
    assert cli("webhooks", "redeliver", made["id"], tested).code == 0
    assert cli("webhooks", "show", made["id"], "--json").json["id"] == made["id"]
    assert cli("webhooks", "delete", made["id"]).code == 0
    assert cli("webhooks", "show", made["id"]).code == 1


# ---------------------------------------------------------------- doctor and init


def test_doctor_exits_as_what_it_found(cli: Cli, tmp_path: Path) -> None:
    absent = cli("doctor", "--data-dir", str(tmp_path / "absent"))
    assert absent.code == 1 and "ERROR    disk" in absent.out and "-> " in absent.out
    told = cli("doctor", "--data-dir", str(tmp_path / "absent"), "--json")
    assert told.code == 1 and {"versions", "disk", "database"} <= {one["check"] for one in json.loads(told.out)["data"]}


@pytest.mark.parametrize("task", ["exact", "number", "judge", "supervised"])
def test_init_writes_a_spec_that_is_valid_and_keeps_what_is_there(api: str, cli: Cli, tmp_path: Path, task: str) -> None:
    path = tmp_path / "job.yaml"
    assert cli("init", task, "--to", str(path)).code == 0
    assert path.read_text() == cli("init", task).out
    shown = cli("validate", str(path))
    assert shown.code == 0, shown
    assert len([line for line in path.read_text().splitlines() if "#" in line]) > 8
    path.write_text("mine")
    assert cli("init", task, "--to", str(path)).code == 1 and path.read_text() == "mine"


# ---------------------------------------------------------------- keys and the audit log


def test_a_key_is_rotated_and_the_audit_log_shows_it(api: str, cli: Cli, job_id: str) -> None:
    key = cli("keys", "create", "laptop", "--json").json["id"]
    assert cli("keys", "rotate", key, "--grace-s", "60").out.startswith("tml-")
    told = cli("audit").out
    assert "POST /v1/keys/{key_id}/rotate" in told and key in told
    (entry,) = cli("audit", "--about", job_id, "--json").json["data"]
    assert entry["action"] == "POST /v1/jobs"
