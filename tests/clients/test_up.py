"""`ratchet up` with everything real: Redis, Celery workers, the API, SQLite; stopped politely, and not."""

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chaos.rig import Zygote
from ratchet_client import Ratchet
from ratchet_client.discovery import find
from service.errors import NotFound
from service.local import redis_server
from service.local.down import down
from service.local.place import CannotStart, locked
from service.local.up import Stop
from service.local.worker import is_alive

RATCHET = [sys.executable, "-P", "-m", "service.cli"]
JOB: dict[str, Any] = {
    "kind": "supervised",
    "model": {"source": "tiny", "tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16}},
    "data": {"train": {"source": "inline", "rows": [{"q": "12", "a": "21"}]}, "prompt": "{q}>", "answer": "{a}"},
    "update": {"batch_size": 1},
    "checkpoints": {"every_steps": 50},
}
LOSS = {"items": [{"objective": "cross_entropy", "batch": {"log_probs": [[-1.5]]}}]}

# A shell that starts these tests in the background has them ignore SIGINT, and what they start with them.
CTRL_C = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Up:
    """One `ratchet up` on a free port, in a session of its own."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.parent / f"up-{time.monotonic_ns()}.log"
        up = [*RATCHET, "up", "--data-dir", str(data_dir), "--port", "0"]
        with self.log.open("wb") as log:
            env = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
            self.process = subprocess.Popen(up, stdout=log, stderr=log, cwd=data_dir.parent, env=env, start_new_session=True)
        self.until(lambda: "is ready at" in self.said())

    def said(self) -> str:
        return self.log.read_text()

    def until(self, holds: Callable[[], Any], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def client(self) -> Ratchet:
        return Ratchet(*find(data_dir=self.data_dir))

    def family(self) -> dict[int, str]:
        """Every process below this one: its id and its command."""
        return {pid: _command(pid) for pid in _descendants(self.process.pid)}

    def child(self, command: str) -> int:
        (pid,) = [pid for pid in _children(self.process.pid) if command in _command(pid)]
        return pid

    def stop(self, within_s: float) -> None:
        """Ctrl-C, and a good end in time; else every process tells where it stands."""
        os.kill(self.process.pid, CTRL_C)
        try:
            assert self.process.wait(within_s) == 0, self.said()
        except subprocess.TimeoutExpired:
            for pid in (*self.family(), self.process.pid):
                os.kill(pid, signal.SIGABRT)  # PYTHONFAULTHANDLER: the stacks of its threads go to its log
            time.sleep(1)
            logs = [f"--- {log}\n{log.read_text()[-10_000:]}" for log in sorted(self.data_dir.rglob("*.log"))]
            raise AssertionError("\n".join([f"still there after {within_s:.0f} s\n{self.said()}", *logs])) from None

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> set[int]:
    found = set(_children(pid))
    return found.union(*map(_descendants, found)) if found else found


def _command(pid: int) -> str:
    """Empty for one that is gone, or dead and not yet reaped by its new parent."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def assert_all_gone(family: dict[int, str], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while left := {pid: command for pid, command in family.items() if command and _command(pid) == command}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path, unlike pytest's own; with packages in it that are not ours."""
    path = Path(tempfile.mkdtemp(prefix="ratchet-up-"))
    for name in ("service", "workers"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def shared() -> Iterator[Up]:
    """For tests that end nothing but what comes back by itself."""
    with tempfile.TemporaryDirectory(prefix="ratchet-up-") as folder:
        up = Up(Path(folder) / "data", RATCHET_SERVES="training")  # these are about jobs and sessions
        yield up
        up.stop(within_s=60)


@pytest.fixture
def start() -> Iterator[Callable[[Path], Up]]:
    started: list[Up] = []

    def up(data_dir: Path) -> Up:
        started.append(Up(data_dir))
        return started[-1]

    yield up
    for one in started:
        one.kill()


def test_up_serves_restarts_what_dies_and_stops_without_a_trace(folder: Path, start: Callable[[Path], Up]) -> None:
    up = start(folder / "data")
    url, key = find(data_dir=up.data_dir)
    assert httpx.get(f"{url}/readyz").status_code == 200 and url in up.said()
    assert key.startswith("tml-") and stat.S_IMODE((up.data_dir / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(up.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((up.data_dir / "redis").stat().st_mode) == 0o700

    redis_server, worker = up.child("redis-server"), up.child("training@")
    os.kill(redis_server, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    up.until(lambda: up.said().count("starting it again") == 2)
    with up.client() as ratchet:
        job = ratchet.wait(ratchet.create_job({**JOB, "limits": {"max_steps": 2}})["id"], timeout_s=60)
    assert job["status"] == "succeeded", job["error"]
    assert {up.child("redis-server"), up.child("training@")}.isdisjoint({redis_server, worker})
    headers = {"Authorization": f"Bearer {key}", "Prefer": "wait=60"}
    losses = httpx.post(f"{url}/v1/losses", json=LOSS, headers=headers, timeout=60)
    assert losses.status_code == 200 and losses.json()["data"][0]["loss"] == 1.5, losses.text + up.said()

    family = up.family()
    up.stop(within_s=60)
    assert_all_gone(family)
    assert [name for name in ("url", "key") if (up.data_dir / name).exists()] == ["key"]


def test_a_session_goes_on_through_the_death_of_its_worker(shared: Up, tmp_path: Path) -> None:
    def loop(killed_at: int | None) -> tuple[list[dict[str, float]], dict[str, bytes]]:
        """Metrics and final weights of a loop, in the middle of which the process that trains is killed."""
        told: list[dict[str, float]] = []
        with shared.client() as ratchet, ratchet.session(model=JOB["model"], seed=3, checkpoints={"every_steps": 3}) as session:
            for step in range(6):
                groups = session.sample(["12>", "34>"], num_samples=4, max_tokens=6)
                for answer in (answer for group in groups for answer in group.answers):
                    answer.reward = float(len(set(answer.tokens)))
                session.submit.forward_backward([{"tokens": [5, 6], "target_tokens": [6, step]}])
                stepped = session.submit.train_step(groups, objective="gspo", optimizer={"learning_rate": 1e-2})
                if step == killed_at:
                    trainer = [pid for pid in _children(shared.child("training@")) if "spawn_main" in _command(pid)]
                    assert trainer
                    for pid in trainer:
                        os.kill(pid, signal.SIGKILL)
                told.append(stepped.result(240))
            model = ratchet.download_checkpoint(session.finish(), tmp_path / f"killed-{killed_at}") / "model"
            job = ratchet.wait(session.id, timeout_s=60)
            assert (job["status"], job["step"], job["attempt"]) == ("succeeded", 6, 1 if killed_at is None else 2)
        return told, {path.name: path.read_bytes() for path in model.glob("*.safetensors")}

    assert loop(None) == loop(4)


def test_the_first_loop_of_the_readme_runs_as_it_is_printed(
    shared: Up, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RATCHET_URL", "RATCHET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RATCHET_DATA_DIR", str(shared.data_dir))
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (loop,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "ratchet.session(" in block]
    assert loop.count("range(60)") == 1
    exec(compile(loop.replace("range(60)", "range(2)"), "README.md", "exec"), {})
    first, second, checkpoint = capsys.readouterr().out.split("\n")[:3]
    assert first.startswith("0 0.") and second.startswith("1 0.") and checkpoint.startswith("ckpt_")


def test_down_stops_it_from_another_terminal(folder: Path, start: Callable[[Path], Up], cli: Callable[..., Any]) -> None:
    nothing = cli("down", "--data-dir", str(folder / "data"))
    assert nothing.code == 1 and "no `ratchet up` runs from" in nothing.err
    up = start(folder / "data")
    family = up.family()
    assert cli("down", "--data-dir", str(up.data_dir)).code == 0
    assert up.process.wait(60) == 0, up.said()
    assert_all_gone(family)
    again = cli("down", "--data-dir", str(up.data_dir))
    assert again.code == 1 and "no `ratchet up` runs from" in again.err


@pytest.mark.parametrize("said", ["", "1\n", "4194304\n", "own"])
def test_down_signals_nobody_who_does_not_hold_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Numbers of another machine: none yet, a process that is here, too, one that is not, this one."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr("service.local.down.LOOKS", 2)
    with (tmp_path / "lock").open("w") as file:
        file.write(f"{os.getpid()}\n" if said == "own" else said)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(NotFound, match="on the machine or in the container"):
            down(tmp_path, print)
    assert not killed


def test_down_waits_for_the_process_it_stopped_not_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, holder = (tmp_path / "lock").open("w+"), os.getpid() + 1
    fcntl.flock(file, fcntl.LOCK_EX)
    fd = tmp_path / "proc" / str(holder) / "fd"
    fd.mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir()
    (fd / "3").symlink_to(tmp_path / "lock")
    looks: list[float] = []

    def look(seconds: float) -> None:  # the lock is never seen free: its number comes late, and the next `up` takes it at once
        looks.append(seconds)
        file.seek(0)
        file.write(f"{holder if len(looks) == 1 else 1:<8}\n")
        file.flush()
        if len(looks) == 3:
            (fd / "3").unlink()

    killed: list[tuple[int, int]] = []
    monkeypatch.setattr("service.local.down.PROC", tmp_path / "proc")
    monkeypatch.setattr("service.local.down.sleep", look)
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    with file:
        down(tmp_path, print)
    assert killed == [(holder, signal.SIGTERM)] and len(looks) == 3


def test_up_starts_while_down_looks_whether_the_lock_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr("service.local.place.sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        with locked(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    "asked", [[signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP], [signal.SIGINT, signal.SIGTERM]]
)
def test_only_ctrl_c_hurries_and_only_once_a_stop_was_asked_for(asked: list[int]) -> None:
    stop = Stop()
    for number in asked:
        stop(number, None)
        assert stop.asked and not stop.hurry
    stop(signal.SIGINT, None)
    stop(signal.SIGTERM, None)
    assert stop.hurry


def test_a_killed_up_leaves_nothing_and_the_next_one_goes_on(
    folder: Path, start: Callable[[Path], Up], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_SERVES", "training")  # this one is about jobs
    up = start(folder / "data")
    key = (up.data_dir / "key").read_text()
    with up.client() as ratchet:
        job_id = ratchet.create_job({**JOB, "limits": {"max_steps": 160}})["id"]
        up.until(lambda: ratchet.get_job(job_id)["step"] > 60)
    family = up.family()
    up.process.kill()
    up.process.wait()
    assert_all_gone(family)

    up = start(folder / "data")
    assert (up.data_dir / "key").read_text() == key
    with up.client() as ratchet:
        job = ratchet.wait(job_id, timeout_s=60)
        reasons = [event["data"].get("reason") for event in ratchet.list_events(job_id, limit=1000)["data"]]
    assert (job["status"], job["step"], job["attempt"]) == ("succeeded", 160, 2)
    assert "worker_lost" in reasons  # settled at once, not when its lease ended


def test_a_killed_process_counts_as_dead_before_anybody_has_waited_for_it() -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert is_alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 5
    while is_alive(process.pid):
        assert time.monotonic() < deadline, "a zombie holds nothing"
        time.sleep(0.01)
    assert Path(f"/proc/{process.pid}").exists(), "still a zombie, or this shows nothing"
    process.wait()
    assert not is_alive(process.pid)


# ---------------------------------------------------------------- what cannot start


@pytest.fixture
def refused(zygote: Zygote, tmp_path: Path) -> Callable[..., str]:
    """Starts `ratchet up`, which says on one line why it does not start."""

    def run(*args: str, **environment: str) -> str:
        log = tmp_path / "log"
        assert zygote.child(["service.cli", "up", *args], environment, log).wait() == 1
        said = log.read_text()
        assert said.startswith("error: ") and len(said.splitlines()) == 1, said
        return said

    return run


def test_a_second_up_on_the_same_directory_is_refused(folder: Path, refused: Callable[..., str]) -> None:
    with (folder / "lock").open("w") as file:
        file.write("4321\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refused("--data-dir", str(folder), "--port", "0")
    assert "process 4321" in said and str(folder) in said and "--data-dir" in said


def test_a_taken_port_is_said_to_be(folder: Path, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused("--data-dir", str(folder / "data"), "--port", port)


@pytest.mark.parametrize("name", ["RATCHET_DATABASE_URL", "ratchet_database_url"])
@pytest.mark.parametrize("url", ["", "mysql://host/name"])
def test_urls_of_what_it_brings_itself_are_not_even_read(
    folder: Path, refused: Callable[..., str], name: str, url: str
) -> None:
    """It comes as far as the port, which is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused("--data-dir", str(folder / "data"), "--port", port, **{name: url})


def test_a_setting_that_makes_no_sense_is_named(folder: Path, refused: Callable[..., str]) -> None:
    assert "RATCHET_LEASE_TTL_S" in refused("--data-dir", str(folder / "data"), "--port", "0", RATCHET_LEASE_TTL_S="soon")


def test_without_a_redis_server_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(redis_server, "find_spec", lambda name: None)
    with pytest.raises(CannotStart, match="install Redis") as caught:
        redis_server.redis_binary()
    assert "\n" not in caught.value.detail
    monkeypatch.undo()
    assert os.access(redis_server.redis_binary(), os.X_OK)


@pytest.mark.parametrize("name", ["d" * 120, "with space", "per%cent"])
def test_a_path_that_no_socket_can_have_gets_a_short_one_for_a_while(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / name
    data_dir.mkdir()
    with redis_server.socket_folder(data_dir) as folder:
        assert folder.parent == Path("/tmp") and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists() and (data_dir / "redis").is_dir()
