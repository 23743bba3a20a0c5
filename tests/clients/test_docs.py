"""What the pages tell people to type works: each block of code in them is read here, and what can run is run.

A block says its language. Commands run in the order of their page against one service; names such as JOB stand for objects
that were made before. What needs another machine, an index or minutes is read only: HELD_BACK says which, and why.
"""

import ast
import contextlib
import hashlib
import hmac
import importlib
import io
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, reduce
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from starlette.testclient import TestClient
from typer.core import TyperGroup
from typer.main import get_command

from job_specs import RL
from ratchet_client import Ratchet
from service.cli.main import app
from service.spec.job import JobSpec, RLSpec
from service.spec.objective import ObjectiveSpec
from service.validation import parse

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("**/*.md"))]
LANGUAGES = {"sh", "python", "yaml", "json", "http", "math", "text", "promql"}
HELD_BACK = {
    "ratchet up": "it stays until Ctrl-C; test_up.py",
    "ratchet down": "it stops what other pages need; test_up.py",
    "ratchet demo": "a minute; it runs in CI by itself",
    "ratchet export": "it imports heavy packages; test_sinks.py",
    "ratchet sample": "it loads torch; test_sample.py",
    "ratchet --install-completion": "it writes to the shell's own files",
    "ratchet --show-completion": "it writes to the shell's own files",
    "make": "its targets are looked up in the Makefile",
    "pip": "it needs an index",
    "cp .env.example": "part of a deployment; tests/stack",
    "docker": "it needs Docker; tests/stack",
    "trackio": "it stays until Ctrl-C",
    "wandb": "it needs an account",
    "tensorboard": "it stays until Ctrl-C",
    "kubectl": "it needs a cluster; test_kubernetes.py",
    "vllm": "it needs a GPU",
    "python": "an example's file, which is looked up",
    "examples/smollm2/run.sh": "an example's file, which is looked up",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    name = str(page.relative_to(ROOT))
    return [
        Block(name, (token.map or [0])[0] + 1, token.info, token.content)
        for token in MarkdownIt().parse(page.read_text())
        if token.type in ("fence", "code_block")
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands_of(text: str) -> list[str]:
    """The commands of a shell block. Lines that go on (a backslash, an open quote) are one; `;` divides."""
    found, open_ = [], ""
    for line in text.splitlines(keepends=True):
        open_ += line
        try:
            words = shlex.shlex(open_, posix=True, punctuation_chars=";")
            words.whitespace_split = True
            words = list(words)
        except ValueError:
            continue
        if open_.endswith("\\\n"):
            continue
        if ";" in words and "'" not in open_:
            found += [part.strip() for part in re.sub(r"#.*", "", open_).split(";")]
        elif words:
            found.append(open_)
        open_ = ""
    assert not open_, f"a quote stays open in {text}"
    return found


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def why_not(words: list[str]) -> str | None:
    typed = " ".join(words).removeprefix(".venv/bin/")
    return next((why for begins, why in HELD_BACK.items() if typed.startswith(begins)), None)


# ---------------------------------------------------------------- read


def test_every_block_says_its_language() -> None:
    assert len(BLOCKS) > 60
    assert not [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles_and_its_imports_are_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_job_or_a_part_of_one(block: Block) -> None:
    given = yaml.safe_load(block.text)
    if "kind" in given:
        parse(JobSpec, given)
    elif given.keys() <= RLSpec.model_fields.keys():
        parse(JobSpec, {**RL, **given})
    else:
        ObjectiveSpec.model_validate(given).resolve()


def inline_commands() -> list[tuple[str, str]]:
    """`ratchet ...` in running text."""
    return [
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for code in re.findall(
            r"`(ratchet [^`\n]*)`", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        )
    ]


def test_every_command_line_is_one_that_ratchet_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown command or option, and an argument too many or too few, is an error of click's."""
    monkeypatch.chdir(tmp_path)
    for name in ("job.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ratchet: Any = get_command(app)
    inside = [ratchet]
    while inside:  # nothing is done
        monkeypatch.setattr(each := inside.pop(), "callback", lambda **_: None)
        inside += each.commands.values() if isinstance(each, TyperGroup) else []
    typed = [(str(block), command) for block in of("sh") for command in commands_of(block.text)]
    whole = [(where, words_of(command)) for where, command in typed if words_of(command)[0] == "ratchet"]
    wrong = []
    for where, words in [*whole, *((where, words_of(code)) for where, code in inline_commands())]:
        words = [word for word in words[1:] if word != "COMMAND"]
        try:
            if len(words) > 2 or any(not re.fullmatch("[a-z]+", word) for word in words):
                if "completion" not in words[0]:
                    ratchet.main(args=words, standalone_mode=False)
            else:  # a name alone: `ratchet metrics`
                reduce(lambda at, word: at.commands[word] if isinstance(at, TyperGroup) else at, words, ratchet)
        except Exception as error:
            wrong.append(f"{where}: {shlex.join(words)}: {error!r}")
    assert len(whole) > 25 and not wrong, "\n".join(wrong)


def test_targets_and_files_in_commands_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in of("sh"):
        for command in commands_of(block.text):
            words = words_of(command)
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, (str(block), command)
            for word in words:
                if word.startswith(("examples/", "deploy/", ".env.", "bench/")):
                    assert (ROOT / word).exists(), (str(block), command)


# ---------------------------------------------------------------- run


@dataclass
class Place:
    """A folder of one's own beside a running service, and what the names in the pages stand for."""

    url: str
    settings: Any
    stands_for: dict[str, str]
    log: Path
    folder: Path
    key: str
    job: str  # a spec

    @cached_property
    def running(self) -> str:
        """A job that will not end by itself."""
        with Ratchet() as ratchet:
            return ratchet.create_job({**yaml.safe_load(self.job), "limits": {"max_steps": 100_000}})["id"]

    def fresh_folder(self) -> Path:
        """As a beginner's: the key that `ratchet up` writes, and the example."""
        folder = Path(mkdtemp(dir=self.folder))
        (folder / ".ratchet").mkdir()
        (folder / ".ratchet/key").write_text(self.key)
        (folder / "examples").mkdir()
        (folder / "examples/copy-digits.yaml").write_text(self.job)
        return folder

    def put_in(self, text: str) -> str:
        for name, value in self.stands_for.items():
            text = re.sub(rf"(?<![\w$]){re.escape(name)}(?!\w)", value, text)
        return text


SHORTER = {
    "max_steps: 60": "max_steps: 2",
    '"max_steps": 60': '"max_steps": 2',
    "range(60)": "range(2)",
    "range(20)": "range(2)",
    "STEPS = 40": "STEPS = 2",
}


def shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


@pytest.fixture
def _in_a_fresh_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.fresh_folder())


@pytest.fixture(scope="module")
def place(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("beginner")
    job = shorter((ROOT / "examples/copy-digits.yaml").read_text())
    with whole(RATCHET_SESSION_IDLE_S="1", RATCHET_SESSION_SLICE_S="1") as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_URL", running.url)
        patch.setenv("RATCHET_API_KEY", running.key)
        with Ratchet() as ratchet:
            done = ratchet.create_job({**yaml.safe_load(job), "limits": {"max_steps": 1}})["id"]
            list(ratchet.follow(done))
            session = ratchet.session(model={"source": "tiny"})
            checkpoint = str(ratchet.get_job(done)["checkpoint_id"])
            webhook = ratchet.create_webhook("https://example.com/ratchet", events=["job.failed"])["id"]
            stands_for = {
                "http://127.0.0.1:8000": running.url,
                "JOB": done,
                "job_01k...": done,
                "$SESSION": session.id,
                "SESSION": session.id,
                "CHECKPOINT": checkpoint,
                "ckpt_01k...": checkpoint,
                "whk_01k...": webhook,
                "/backups": str(folder / "backups"),
            }
            yield Place(running.url, running.settings, stands_for, running.log, folder, running.key, job)
            session.close()


@pytest.mark.usefixtures("_in_a_fresh_folder")
@pytest.mark.parametrize("page", sorted({block.page for block in of("sh")}))
def test_commands_do_what_they_are_for(page: str, place: Place, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_DATA_DIR", str(place.settings.data_dir))
    monkeypatch.setenv("RATCHET_REDIS_URL", place.settings.redis_url.get_secret_value())
    for block in of("sh"):
        for command in commands_of(block.text) if block.page == page else ():
            if re.match("ratchet (pause|resume|cancel) JOB", command):
                command = command.replace("JOB", place.running)
            command = shorter(place.put_in(command))
            words = words_of(command)
            if why_not(words):
                continue
            if words[0] == "ratchet":
                said, deadline = cli(*words[1:]), time.monotonic() + 30
                while said.code and words[1] == "resume" and time.monotonic() < deadline:  # it is still being paused
                    time.sleep(0.1)
                    said = cli(*words[1:])
                assert said.code == 0, f"{block}: {command}: {said.err}\n{place.log.read_text()[-2000:]}"
                for spec in Path().glob("*.yaml"):
                    spec.write_text(re.sub(r"max_steps: \d+", "max_steps: 2", spec.read_text()))
            else:
                assert words[0] in ("cp", "curl", "export"), f"{block}: {command}: run it, or hold it back with a reason"
                ran = subprocess.run(
                    ["bash", "-euc", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert ran.returncode == 0, f"{block}: {command}: {ran.stdout}{ran.stderr}"


def run(block: Block, place: Place, **names: Any) -> dict[str, Any]:
    """Run a block of Python in a namespace of its own. Returns the namespace."""
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(shorter(place.put_in(block.text)), str(block), "exec"), names)
    return names


def python(page: str, *says: str) -> list[Block]:
    """The blocks of a page that say so, one for each."""
    return [next(block for block in of("python") if block.page == page and each in block.text) for each in says]


@pytest.mark.usefixtures("_in_a_fresh_folder")
def test_a_job_and_a_loop_of_ones_own_as_in_the_readme(place: Place) -> None:
    job, loop = python("README.md", "create_job", "ratchet.session(")
    assert Path(run(job, place)["folder"], "README.md").is_file()
    assert 0 <= run(loop, place)["total"] <= 64
    session, loss = python("docs/three-ways-in.md", "ratchet.session(", "ratchet.losses(")
    assert run(session, place)["checkpoint"]
    assert run(loss, place)["answer"]["data"][0]["status"] == "ok"


@pytest.mark.usefixtures("_in_a_fresh_folder")
def test_the_programs_of_the_first_hour(place: Place) -> None:
    loop, chat = python("docs/first-hour.md", "my first loop", "OpenAI(")
    assert "reward/mean" in run(loop, place)["metrics"]
    run(chat, place)


def test_the_loss_as_one_function(place: Place) -> None:
    for page in ("README.md", "examples/loss_client/README.md"):
        (block,) = python(page, "ratchet_loss(")
        log_probs = torch.full((2, 3), -1.0, requires_grad=True)
        old = torch.full((2, 3), -1.1)
        names = {
            "log_probs": log_probs,
            "old_log_probs": old,
            "mask": torch.ones(2, 3),
            "advantages": torch.tensor([1.0, -1.0]),
        }
        run(block, place, **names, rewards=torch.tensor([1.0, 0.0]), group_ids=torch.tensor([0, 0]))
        assert log_probs.grad is not None and log_probs.grad.abs().sum() > 0


def test_sessions_as_on_their_page(place: Place) -> None:
    loop, ahead, row, custom = python("docs/sessions.md", "my loop", "submit.", "def row", "my_loss(")
    assert run(loop, place)["metrics"]
    rows = [run(row, place)["row"]([5, 6], [7])]
    with Ratchet() as ratchet, ratchet.session(model={"source": "tiny"}) as session:
        run(ahead, place, session=session, rows=rows, batches=iter([rows]))
        run(
            custom,
            place,
            session=session,
            rows=rows,
            torch=torch,
            my_loss=lambda log_probs: -sum(each.sum() for each in log_probs),
        )
        session.finish()


def test_the_tinker_client_as_on_its_page(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", place.url)
    monkeypatch.setenv("TINKER_API_KEY", place.key)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    (block,) = python("docs/tinker.md", "ServiceClient")
    names = run(block, place)
    assert names["step"].result().metrics["loss:sum"] > 0
    names["service"].close("success").result()


def test_the_judge_of_the_graders_page_takes_what_is_signed_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_SECRET", "shared")
    judge = TestClient(run(python("docs/graders.md", "/score")[0], place)["app"])
    body = json.dumps({"samples": [{"completion": " 4", "row": {"answer": "4"}}, {"completion": "5", "row": {"answer": "4"}}]})
    now = str(int(time.time()))
    signature = hmac.new(b"shared", f"{now}.{body}".encode(), hashlib.sha256).hexdigest()
    for says, status in ((signature, 200), ("0" * 64, 401)):
        answer = judge.post("/score", content=body, headers={"Ratchet-Signature": f"t={now},v1={says}"})
        assert answer.status_code == status
    assert judge.post("/score", content=body).status_code == 401
    answer = judge.post("/score", content=body, headers={"Ratchet-Signature": f"t={now},v1={signature}"})
    assert answer.json() == {"rewards": [1.0, 0.0]}


def test_a_webhook_is_verified_as_on_its_page(place: Place) -> None:
    (block,) = python("docs/webhooks.md", "verify(")
    secret, at, body = "whsec_" + "QUJD" * 8, datetime.now(UTC), '{"type": "webhook.test"}'
    signed = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", at, body),
    }
    block = replace(block, text=block.text.replace("whsec_...", secret))
    assert run(block, place, body=body, headers=signed)["event"] == {"type": "webhook.test"}
    with pytest.raises(WebhookVerificationError):
        run(block, place, body=body + " ", headers=signed)


@pytest.mark.parametrize("name", ["first_job", "own_loop"])
def test_the_notebooks_run(name: str, place: Place) -> None:
    """Cell by cell in one namespace, as a kernel does it."""
    names: dict[str, Any] = {}
    book = json.loads((ROOT / f"examples/notebooks/{name}.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    for number, cell in enumerate(cells):
        names |= run(Block(f"{name}.ipynb", number, "python", "".join(cell["source"])), place, **names)
