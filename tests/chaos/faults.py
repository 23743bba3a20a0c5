"""The faults, each with a name. A fault arranges, breaks, waits within its bound, and says what the oracle shall look at."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from chaos import points
from chaos.loops import session_spec
from chaos.oracle import Standing, examine, left_behind
from chaos.rig import Rig, is_alive, rl_spec, sqlite_locked, wait_until
from chaos.servers import OwnPostgres, own_postgres_server
from service.store import checkpoints
from service.store.tables import Dataset

SPEC = rl_spec(24)
SHORT_SPEC = rl_spec(4)
LOOP = session_spec(12)
LONG = rl_spec(160, checkpoints={"every_steps": 5}, eval={"every_steps": 40, "temperature": 1.0})
# As in production: what is away for 20 s does not outlast a lease.
LASTING = {"lease_ttl_s": 60.0, "lease_self_stop_s": 45.0, "lease_renew_s": 10.0}


@dataclass(frozen=True)
class Outcome:
    """What the oracle shall look at. `recovered_s`: from the fault, or from the return of what was away, to the next step."""

    recovered_s: float
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> its spec
    problems: list[str] = field(default_factory=list)  # seen on the way
    may_fall_back: bool = False


@dataclass(frozen=True)
class Fault:
    name: str
    bring: Callable[[Rig], Outcome]
    bound_s: float
    settings: dict[str, Any] = field(default_factory=dict)
    postgres: bool = False
    small_disk: bool = False
    environment: dict[str, str] = field(default_factory=dict)  # of the workers and the API


@dataclass(frozen=True)
class Verdict:
    recovered_s: float
    problems: list[str]


def bring(fault: Fault, rigs: Callable[..., Rig], undisturbed: Callable[[dict[str, Any]], Standing]) -> Verdict:
    with ExitStack() as stack:
        options: dict[str, Any] = dict(fault.settings)
        if fault.postgres:
            options["postgres"] = stack.enter_context(own_postgres_server())
        rig = rigs(**options)
        rig.environment |= fault.environment
        if fault.small_disk:
            stack.enter_context(_small_disk(rig.store.blobs.root))
        outcome = fault.bring(rig)
        problems = list(outcome.problems)
        if outcome.recovered_s > fault.bound_s:
            problems.append(f"4: it took {outcome.recovered_s:.1f} s to recover, allowed are {fault.bound_s:.0f} s")
        for job_id, spec in outcome.jobs.items():
            problems += examine(rig, job_id, undisturbed(spec), may_fall_back=outcome.may_fall_back)
        problems += left_behind(rig)
        if problems:
            print(rig.tails())
        return Verdict(outcome.recovered_s, problems)


# ---------------------------------------------------------------- a worker dies


# At which pass of the point, so that it lies in the middle of the job.
MIDDLE = {"while sampling": 25, "mid update": 13, "inside a transaction": 8, "after step row": 8, "before fsync": 20}
ONCE_A_CHECKPOINT = ("while writing", "after fsync", "between rename and row", "between row and ring", "between row and delete")
PASSES = MIDDLE | dict.fromkeys(ONCE_A_CHECKPOINT, 3)


def kill_child_at(rig: Rig, point: str, spec: dict[str, Any] = SPEC) -> Outcome:
    rig.start_worker()
    order = rig.arm(point, at_pass=PASSES.get(point, 1))
    job_id = rig.submit(spec)
    at = rig.struck(order)
    rig.finished(job_id)
    if point == "after the end":  # the job has nothing to recover from; the worker has
        at = time.time()
        job_id = rig.submit(spec)
        rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: spec})


def kill_parent(rig: Rig, spec: dict[str, Any] = SPEC) -> Outcome:
    """The kernel ends its child with it; the other worker takes over when the lease has ended."""
    job_id, holder = _on_one_of_two(rig, spec)
    child, at = rig.child_of(job_id), time.time()
    holder.kill()
    wait_until(lambda: not is_alive(child), 5, "the child to die with its parent")
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: spec})


def _on_one_of_two(rig: Rig, spec: dict[str, Any], step: int = 5) -> tuple[str, Any]:
    """A job that one of two workers runs, and that worker."""
    rig.start_worker()
    rig.start_worker()
    job_id = rig.submit(spec)
    rig.reached(job_id, step)
    return job_id, rig.holder_of(job_id)


def zombie(rig: Rig, point: str, at_pass: int, spec: dict[str, Any] = LONG) -> Outcome:
    """Stopped until another has taken the job and gone on with it; then it wakes up in the middle of its work."""
    order = rig.arm(point, at_pass=at_pass, do="stop")
    rig.start_worker()
    rig.start_worker()
    job_id = rig.submit(spec)
    at = rig.struck(order)
    pid = points.done_by(order)
    stopped_at = rig.job(job_id).step
    rig.until(job_id, lambda job: job.attempt > 1 and job.step > stopped_at)
    os.kill(pid, signal.SIGCONT)
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: spec})


# ---------------------------------------------------------------- sessions: the client's loop is in the middle of it all

# As PASSES, for a session of LOOP: in the middle.
SESSION_PASSES = {"while sampling": 25, "mid update": 13, "inside a transaction": 9, "before fsync": 12}
SESSION_PASSES |= dict.fromkeys(("before an answer", "after an answer"), 17)
SESSION_PASSES |= dict.fromkeys(("while writing", "between rename and row", "between row and delete"), 2)


def kill_child_of_session(rig: Rig, point: str, spec: dict[str, Any] = LOOP) -> Outcome:
    rig.start_api()
    rig.start_worker()
    order = rig.arm(point, at_pass=SESSION_PASSES.get(point, 1))
    session_id = rig.submit(spec)
    at = rig.struck(order)
    rig.finished(session_id)
    return Outcome(rig.went_on_after(session_id, at), {session_id: spec})


def with_api(rig: Rig, fault: Callable[..., Outcome], **options: Any) -> Outcome:
    """A fault of a job, brought to a session."""
    rig.start_api()
    return fault(rig, **options)


def kill_api_after_an_append(rig: Rig, spec: dict[str, Any] = LOOP) -> Outcome:
    """The operation is logged, and its client does not know; it sends it again."""
    rig.start_worker()
    rig.start_api()
    session_id = rig.submit(spec)
    rig.reached(session_id, 4)
    order = rig.arm(points.APPEND_POINT, at_pass=2)
    at = rig.struck(order)
    rig.start_api()
    rig.finished(session_id)
    return Outcome(rig.went_on_after(session_id, at), {session_id: spec})


def break_under_session(rig: Rig, break_: Callable[[Rig], None], spec: dict[str, Any] = LOOP) -> Outcome:
    rig.start_worker()
    rig.start_api()
    session_id = rig.submit(spec)
    rig.reached(session_id, 7)
    break_(rig)
    at = time.time()
    rig.finished(session_id)
    return Outcome(rig.went_on_after(session_id, at), {session_id: spec})


def api_gone(rig: Rig) -> None:
    """Its client waits for an answer, or sends an operation; another API comes back at the same address."""
    next(process for process in rig.started if process.log.name.startswith("chaos.api")).kill()
    time.sleep(5)
    rig.start_api()


def redis_gone(rig: Rig) -> None:
    rig.redis.kill()
    time.sleep(5)
    rig.redis.start()


def postgres_restarted(rig: Rig) -> None:
    assert rig.postgres is not None
    rig.postgres.stop_at_once()
    time.sleep(1)
    rig.postgres.start()


def all_killed(rig: Rig) -> None:
    """Every process at once, as when a machine loses its power; then all come back."""
    for process in list(rig.started):
        process.signal(signal.SIGKILL)
    rig.redis.kill()
    time.sleep(1)
    rig.redis.start()
    rig.start_worker()
    rig.start_api()


# ---------------------------------------------------------------- a worker is stopped


def drain(rig: Rig, spec: dict[str, Any] = LONG) -> Outcome:
    job_id, holder = _on_one_of_two(rig, spec)
    at = time.time()
    holder.signal(signal.SIGTERM)
    wait_until(lambda: not holder.alive, rig.settings.drain_grace_s, "the drained worker to end")
    job = rig.finished(job_id)
    problems = [] if job.crashes == 0 else ["4: a drain counted as a crash"]
    left = next(event.created_at.timestamp() for event in rig.events(job_id) if event.data.get("reason") == "drained")
    return Outcome(rig.went_on_after(job_id, max(at, left)), {job_id: spec}, problems)


def drain_killed_before_the_ring(rig: Rig) -> Outcome:
    job_id, holder = _on_one_of_two(rig, LONG)
    order = rig.arm(points.DRAIN_POINT)
    holder.signal(signal.SIGTERM)
    at = rig.struck(order)
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: LONG})


def drain_every_few_seconds(rig: Rig) -> Outcome:
    """Always one worker, always a new one: the job crawls on, and is whole."""
    worker, slowest = rig.start_worker(), 0.0
    job_id = rig.submit(LONG)
    for _ in range(5):
        time.sleep(3)
        if rig.job(job_id).status in ("succeeded", "failed"):
            break
        at = time.time()
        worker.signal(signal.SIGTERM)
        worker = rig.start_worker()
        before = rig.job(job_id).attempt
        rig.until(job_id, lambda job, before=before: job.attempt > before or job.status == "succeeded")
        slowest = max(slowest, time.time() - at)
    rig.finished(job_id)
    return Outcome(slowest, {job_id: LONG})


# ---------------------------------------------------------------- Redis


def redis_away(rig: Rig, away_s: float, how: str = "kill") -> Outcome:
    """One job runs on, one is created meanwhile and starts when Redis is back."""
    rig.start_worker()
    running = rig.submit(LONG)
    rig.reached(running, 5)
    rig.redis.kill() if how == "kill" else rig.redis.freeze()
    began = time.time()
    waiting = rig.submit(SPEC)
    rig.finished(running)
    time.sleep(max(0.0, away_s - (time.time() - began)))
    problems = [] if rig.job(running).attempt == 1 else ["4: a running job was disturbed"]
    rig.redis.start() if how == "kill" else rig.redis.thaw()
    at = time.time()
    rig.finished(waiting)
    return Outcome(rig.went_on_after(waiting, at), {running: LONG, waiting: SPEC}, problems)


def flush(rig: Rig) -> Outcome:
    """The rings of the waiting jobs are gone with everything else; each starts all the same when the worker is free."""
    rig.start_worker()
    specs = {rig.submit(spec): spec for spec in (LONG, SHORT_SPEC, SHORT_SPEC)}
    first, second, third = specs
    rig.reached(first, 5)
    rig.redis.flush()
    slowest = 0.0
    for before, after in ((first, second), (second, third)):
        rig.finished(before)
        rig.finished(after)
        free = rig.job(before).finished_at
        assert free is not None
        slowest = max(slowest, rig.went_on_after(after, free.timestamp()))
    return Outcome(slowest, specs)


def messages_tenfold(rig: Rig) -> Outcome:
    rig.messages_a_ring(10)
    rig.start_worker()
    rig.start_worker()
    at = time.time()
    specs = {rig.submit(SHORT_SPEC): SHORT_SPEC for _ in range(4)}
    for job_id in specs:
        rig.finished(job_id)
    twice = [job_id for job_id in specs if rig.job(job_id).attempt != 1]
    return Outcome(rig.went_on_after(next(iter(specs)), at), specs, [f"4: {job_id} was run twice" for job_id in twice])


def messages_dropped(rig: Rig) -> Outcome:
    """Nothing is heard for ten seconds, though every ring says that it was taken."""
    rig.messages_a_ring(0)
    rig.start_worker()
    job_id = rig.submit(SPEC)
    time.sleep(10)
    assert rig.job(job_id).status == "queued"
    rig.messages_a_ring(1)
    at = time.time()
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: SPEC})


def race(rig: Rig) -> Outcome:
    """Two idle workers are rung for the same job at the same moment, again and again."""
    rig.start_worker()
    rig.start_worker()
    rig.messages_a_ring(2)
    first, slowest = rig.submit(SHORT_SPEC), 0.0
    rig.finished(first)
    specs = {first: SHORT_SPEC}
    for _ in range(5):
        at = time.time()
        job_id = rig.submit(SHORT_SPEC)
        rig.finished(job_id)
        specs[job_id] = SHORT_SPEC
        slowest = max(slowest, rig.went_on_after(job_id, at))
    twice = [job_id for job_id in specs if rig.job(job_id).attempt != 1]
    return Outcome(slowest, specs, [f"4: {job_id} was run twice" for job_id in twice])


# ---------------------------------------------------------------- the API


def kill_api_before_the_ring(rig: Rig) -> Outcome:
    """The job is there and nobody was told. The client saw its connection break, and sends the same request again."""
    rig.start_worker()
    rig.start_api()
    order = rig.arm("between commit and ring")
    headers = {"Idempotency-Key": "the same"}
    with rig.client() as client, pytest.raises(httpx.HTTPError):
        client.post("/v1/jobs", json=SPEC, headers=headers)
    at = rig.struck(order)
    rig.start_api()
    with rig.client() as client:
        again = client.post("/v1/jobs", json=SPEC, headers=headers)
        listed = client.get("/v1/jobs").json()["data"]
    job_id = again.json()["id"]
    problems = [] if again.status_code == 201 and [job["id"] for job in listed] == [job_id] else [f"4: {again.text}, {listed}"]
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: SPEC}, problems)


def kill_api_in_an_upload(rig: Rig, where: str) -> Outcome:
    rows = b'{"q": "1", "a": "2"}\n' * 200_000
    headers = {"Idempotency-Key": "the same", "Content-Type": "application/jsonl"}
    api = rig.start_api()
    order = None if where == "body" else rig.arm(where)

    def half() -> Iterator[bytes]:
        middle = len(rows) // 2
        yield rows[:middle]
        if order is None:
            api.kill()
        yield rows[middle:]

    with rig.client() as client, pytest.raises(httpx.HTTPError):
        client.post("/v1/datasets?name=rows", content=half(), headers=headers)
    at = time.time()
    rig.start_api()
    with rig.client() as client:

        def taken() -> bool:
            answer = client.post("/v1/datasets?name=rows", content=rows, headers=headers)
            assert answer.status_code in (201, 409), answer.text
            return answer.status_code == 201

        wait_until(taken, 90, "the upload to be taken", every_s=1)
    recovered_s = time.time() - at
    with rig.store.begin(readonly=True) as session:
        sizes = list(session.scalars(select(Dataset.rows)))
    return Outcome(recovered_s, problems=[] if sizes == [200_000] else [f"2: datasets of {sizes} rows"])


# ---------------------------------------------------------------- the database


def postgres_away(rig: Rig, server: OwnPostgres, away_s: float) -> Outcome:
    rig.start_worker()
    job_id = rig.submit(LONG)
    rig.reached(job_id, 12)
    server.stop_at_once()
    time.sleep(away_s)
    server.start()
    at = time.time()
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: LONG})


def postgres_away_at_the_start(rig: Rig) -> Outcome:
    """A worker that starts before its database does is a whole one all the same: it takes jobs, and drains when it is told."""
    assert rig.postgres is not None
    rig.postgres.stop_at_once()
    worker = rig.start_worker()
    time.sleep(5)
    rig.postgres.start()
    at = time.time()
    job_id = rig.submit(LONG)
    rig.reached(job_id, 5)
    recovered_s = rig.went_on_after(job_id, at)
    worker.signal(signal.SIGTERM)
    wait_until(lambda: not worker.alive, rig.settings.drain_grace_s, "the drained worker to end")
    rig.start_worker()
    job = rig.finished(job_id)
    return Outcome(recovered_s, {job_id: LONG}, [] if job.crashes == 0 else ["4: its job was not drained, but crashed"])


def sqlite_locked_for(rig: Rig, locked_s: float) -> Outcome:
    rig.start_worker()
    job_id = rig.submit(LONG)
    rig.reached(job_id, 12)
    with sqlite_locked(Path(rig.settings.sql_url.removeprefix("sqlite:///"))):
        time.sleep(locked_s)
    at = time.time()
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: LONG})


# ---------------------------------------------------------------- the disk


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of 4 MiB where the blobs lie."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk_full(rig: Rig) -> Outcome:
    """Somebody else fills the disk; the job fails to save, tries again with growing pauses, and goes on when there is room."""
    rig.start_worker()
    job_id = rig.submit(LONG)
    rig.reached(job_id, 12)
    ballast = rig.store.blobs.root / "tmp" / "ballast"
    _fill(ballast)
    rig.until(job_id, lambda job: job.retries >= 1)
    parts = [path for path in ballast.parent.rglob("*") if path != ballast]
    problems = [f"6: {len(parts)} parts of a checkpoint that did not fit are left on the full disk"] if parts else []
    ballast.unlink()
    at = time.time()
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: LONG}, problems)


def _fill(ballast: Path) -> None:
    """Write until the disk is full."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def no_room_while_writing(rig: Rig) -> Outcome:
    order = rig.arm("while writing", at_pass=3, do="full")
    rig.start_worker()
    job_id = rig.submit(SPEC)
    at = rig.struck(order)
    rig.finished(job_id)
    return Outcome(rig.went_on_after(job_id, at), {job_id: SPEC})


def broken_checkpoint(rig: Rig, break_: Callable[[Path], None], spec: dict[str, Any] = LONG, step: int = 22) -> Outcome:
    """While no worker runs; the next one finds out, and goes on from the checkpoint before."""
    worker = rig.start_worker()
    job_id = rig.submit(spec)
    rig.reached(job_id, step)
    worker.kill()
    time.sleep(0.5)  # the child dies with it, and writes no more
    job = rig.job(job_id)
    assert job.checkpoint_id is not None
    with rig.store.begin(readonly=True) as session:
        newest = checkpoints.get(session, "default", job.checkpoint_id)
    break_(rig.store.blobs.path(newest.path))
    rig.start_worker()
    at = time.time()
    rig.finished(job_id)
    resumed = _resumed_at(rig, job_id)
    problems = [] if resumed is not None and resumed < newest.step else [f"1: resumed at {resumed}, broken was {newest.step}"]
    return Outcome(rig.went_on_after(job_id, at), {job_id: spec}, problems, may_fall_back=True)


def _resumed_at(rig: Rig, job_id: str) -> int | None:
    """The step before the second attempt's first."""
    told = rig.events(job_id)
    claimed = [event.seq for event in told if event.type == "status_changed" and event.data["to"] == "running"]
    return next((event.data["step"] - 1 for event in told if event.seq > claimed[1] and event.type == "step"), None)


def flip_a_byte(folder: Path) -> None:
    file = next(folder.rglob("model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0b100
    file.write_bytes(content)


def remove_a_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def cut_a_file(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _with_postgres(rig: Rig, away_s: float) -> Outcome:
    assert rig.postgres is not None
    return postgres_away(rig, rig.postgres, away_s)


FAULTS = [
    *(Fault(f"kill -9 of the child: {point}", partial(kill_child_at, point=point), 30) for point in points.WORKER_POINTS),
    Fault("kill -9 of the parent", kill_parent, 30),
    Fault("zombie: SIGSTOP mid update beyond its lease", partial(zombie, point="mid update", at_pass=13), 30),
    Fault("zombie: SIGSTOP between rename and row", partial(zombie, point="between rename and row", at_pass=2), 30),
    Fault("zombie: SIGSTOP after a step's row", partial(zombie, point="after step row", at_pass=8), 30),
    Fault(
        "zombie: SIGSTOP inside a transaction, PostgreSQL",
        partial(zombie, point="inside a transaction", at_pass=8),
        60,
        postgres=True,
    ),
    *(
        Fault(f"session: kill -9 of the child: {point}", partial(kill_child_of_session, point=point), 30)
        for point in points.SESSION_POINTS
    ),
    Fault("session: kill -9 of the parent", partial(with_api, fault=kill_parent, spec=LOOP), 30),
    Fault(
        "session: zombie: SIGSTOP mid update beyond its lease",
        partial(with_api, fault=zombie, point="mid update", at_pass=13, spec=LOOP),
        30,
    ),
    Fault(
        "session: zombie: SIGSTOP before an answer",
        partial(with_api, fault=zombie, point="before an answer", at_pass=17, spec=LOOP),
        30,
    ),
    Fault("session: SIGTERM: another worker goes on", partial(with_api, fault=drain, spec=LOOP), 15),
    Fault("session: kill -9 of Redis, away for 5 s", partial(break_under_session, break_=redis_gone), 30),
    Fault("session: FLUSHALL", partial(break_under_session, break_=lambda rig: rig.redis.flush()), 30),
    Fault("session: kill -9 of the API, away for 5 s", partial(break_under_session, break_=api_gone), 30),
    Fault("session: kill -9 of the API between commit and answer", kill_api_after_an_append, 30),
    Fault("session: PostgreSQL restarted", partial(break_under_session, break_=postgres_restarted), 30, LASTING, postgres=True),
    Fault("session: kill -9 of everything at once", partial(break_under_session, break_=all_killed), 60),
    Fault("SIGTERM: another worker goes on", drain, 15),
    Fault("SIGTERM, and kill -9 between release and ring", drain_killed_before_the_ring, 30),
    Fault("SIGTERM every 3 s", drain_every_few_seconds, 30),
    Fault("kill -9 of Redis, away for 5 s", partial(redis_away, away_s=5), 30),
    Fault("Redis away for 60 s", partial(redis_away, away_s=60), 30),
    Fault("Redis frozen for 20 s", partial(redis_away, away_s=20, how="freeze"), 30),
    Fault("FLUSHALL", flush, 30),
    Fault("every message delivered ten times", messages_tenfold, 30),
    Fault("every message dropped for 10 s", messages_dropped, 30),
    Fault("two workers racing for one job", race, 30),
    Fault("kill -9 of the API between commit and ring", kill_api_before_the_ring, 30),
    Fault("kill -9 of the API in the middle of an upload", partial(kill_api_in_an_upload, where="body"), 30),
    Fault("kill -9 of the API between file and row", partial(kill_api_in_an_upload, where="between file and row"), 90),
    Fault("PostgreSQL restarted", partial(_with_postgres, away_s=1), 30, LASTING, postgres=True),
    Fault("PostgreSQL away for 20 s", partial(_with_postgres, away_s=20), 30, LASTING, postgres=True),
    Fault("PostgreSQL away when the worker starts", postgres_away_at_the_start, 30, LASTING, postgres=True),
    Fault("SQLite locked for 20 s", partial(sqlite_locked_for, locked_s=20), 30, LASTING),
    Fault("disk full", disk_full, 30, small_disk=True),
    Fault("no room while saving", no_room_while_writing, 30),
    Fault("one byte flipped in a checkpoint", partial(broken_checkpoint, break_=flip_a_byte), 30),
    Fault("a file of a checkpoint missing", partial(broken_checkpoint, break_=remove_a_file), 30),
    Fault("a file of a checkpoint cut", partial(broken_checkpoint, break_=cut_a_file), 30),
]
