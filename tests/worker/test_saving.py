"""Checkpoints that are written while a job's loop goes on: what a kill, a disk that fails and an end make of them."""

import signal
from collections.abc import Callable
from concurrent.futures import wait
from threading import Event
from time import sleep
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from service.doorbell import Doorbell
from service.errors import BucketRefused, JobFailed
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.settings import Settings
from service.spec.job import JobSpec
from service.store import checkpoints, events, jobs, usage
from service.store.session import Store
from service.store.tables import Checkpoint, Job
from service.validation import parse
from workers import runner
from workers.loops import managed
from workers.loops.attempt import StepResult
from workers.tenure.keeper import Keeper
from workers.tenure.tenure import Tenure

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
KILLED = -signal.SIGKILL


class Rig:
    def __init__(self, store: Store, settings: Settings, doorbell: Doorbell) -> None:
        self.store, self.settings, self.doorbell = store, settings, doorbell

    def submit(self, spec: dict[str, Any]) -> str:
        resolved = resolve(self.store, self.settings, "default", parse(JobSpec, spec))
        return create_job(self.store, self.doorbell, project="default", sent=spec, resolved=resolved).id

    def work(self) -> None:
        """Run what is queued, in this process."""
        with Keeper(self.store, self.settings, self.doorbell) as keeper:
            while (claimed := leases.claim(self.store, self.settings, "w", {"any"})) is not None:
                runner.run(keeper, *claimed)

    def job(self, job_id: str) -> Job:
        with self.store.begin(readonly=True) as session:
            return jobs.get(session, "default", job_id)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.store.begin(readonly=True) as session:
            return checkpoints.of_job(session, job_id)

    def told(self, job_id: str, kind: str) -> list[Any]:
        with self.store.begin(readonly=True) as session:
            return [one.data["step"] for one in events.after(session, job_id, 0, limit=1000) if one.type == kind]

    def weights(self, job_id: str) -> dict[str, Tensor]:
        """Every tensor of the newest checkpoint, optimizer state too."""
        folder = self.store.blobs.path(self.checkpoints(job_id)[0].path)
        return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}

    def go_on(self, job_id: str) -> None:
        """Do not wait for the pause before a retry; resume it if it rests."""
        if self.job(job_id).status == "paused":
            lifecycle.resume(self.store, self.doorbell, "default", job_id)
        with self.store.begin() as session:
            jobs.get(session, "default", job_id).not_before = None


@pytest.fixture
def rig(store: Store, settings: Settings, doorbell: Doorbell) -> Rig:
    return Rig(store, settings, doorbell)


@pytest.fixture
def spec(specs: Any) -> dict[str, Any]:
    return specs.rl(limits={"max_steps": 10}, checkpoints={"every_steps": 4}, update={"minibatches": 1})


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 0
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_killed_between_the_copy_and_the_row_a_job_goes_on_from_the_last_durable_checkpoint(
    rig: Rig, run_killed: Callable[..., list[int]], spec: dict[str, Any]
) -> None:
    disturbed = rig.submit(spec)
    assert run_killed("held/after_step:7") == [KILLED]
    assert (rig.job(disturbed).step, rig.told(disturbed, "step")[-1]) == (6, 6), "the loop went on"
    assert rig.checkpoints(disturbed) == []
    assert run_killed("before_its_row:1") == [KILLED]  # durable, and no row names it
    assert rig.checkpoints(disturbed) == []
    assert run_killed("after_its_row:2", "none") == [KILLED, 0]
    job = rig.job(disturbed)
    assert (job.status, job.attempt) == ("succeeded", 4)
    assert rig.told(disturbed, "checkpoint_saved") == [4, 8, 10]
    quiet = rig.submit(spec)
    rig.work()
    assert_same(rig.weights(disturbed), rig.weights(quiet))


ERRORS = [
    (OSError(28, "No space left on device"), "queued", "io_error"),
    (BucketRefused("the bucket is not ours"), "paused", "bucket_refused"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=["full disk", "bucket"])
def test_a_checkpoint_that_cannot_be_written_ends_the_attempt_as_ever(
    rig: Rig, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, code: str
) -> None:
    plain = Tenure._seal

    def seal(self: Tenure, *args: Any, **kwargs: Any) -> Any:
        if args[1].step >= 8:
            raise error
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tenure, "_seal", seal)
    job_id = rig.submit(spec)
    rig.work()
    job = rig.job(job_id)
    assert (job.status, job.status_reason) == (status, code)
    assert job.error is not None
    assert (job.error["code"], job.error["phase"]) == (code, "saving")
    assert [row.step for row in rig.checkpoints(job_id)] == [4]
    monkeypatch.setattr(Tenure, "_seal", plain)
    rig.go_on(job_id)
    quiet = rig.submit(spec)
    rig.work()
    assert_same(rig.weights(job_id), rig.weights(quiet))


def test_an_evaluation_that_is_made_up_for_may_be_the_best(
    rig: Rig, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service was down when the best step was evaluated: its checkpoint is kept when the job goes on."""
    spec |= {"eval": {"every_steps": 2}, "early_stopping": {"patience": 9}, "checkpoints": {"every_steps": 9, "keep_last": 1}}
    answers = iter([0.1, 0.2, None, 0.9, 0.3, 0.4, 0.3])

    def evaluate(attempt: Any, step: int) -> StepResult:
        if (reward := next(answers)) is None:
            raise JobFailed("grader_unhealthy", "the service is down")
        return StepResult({"eval/reward/mean": reward})

    monkeypatch.setattr(managed, "evaluate", evaluate)
    job_id = rig.submit(spec)
    rig.work()
    assert (rig.job(job_id).status, rig.job(job_id).step) == ("paused", 4)
    rig.go_on(job_id)
    rig.work()
    job = rig.job(job_id)
    assert [(one.step, one.metrics) for one in rig.checkpoints(job_id)] == [
        (10, {"eval/reward/mean": 0.3}),
        (4, {"eval/reward/mean": 0.9}),
    ]
    assert job.result is not None
    assert job.result["best"]["step"] == 4 and job.result["best"]["checkpoint_id"] == rig.checkpoints(job_id)[1].id


def test_after_one_that_failed_the_newer_state_is_saved(
    rig: Rig, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, copy, write = Tenure._seal, Tenure._filled, Tenure.commit_step
    failed, uncommitted = list[int](), [7]

    def filled(self: Tenure, contents: Any) -> Any:
        if contents.step == 4 and uncommitted:
            self.meter.sampled(uncommitted.pop())  # of a step that did not come to its end: no commit has them yet
        return copy(self, contents)

    def seal(self: Tenure, *args: Any, **kwargs: Any) -> Any:
        if args[1].step == 4 and not failed:
            failed.append(4)
            raise OSError(5, "Input/output error")
        return plain(self, *args, **kwargs)

    def commit(self: Tenure, step: int, *args: Any, **kwargs: Any) -> None:
        write(self, step, *args, **kwargs)
        if step == 5 and self._saving is not None:
            wait([self._saving[0]], 60)

    job_id = rig.submit(spec)
    with monkeypatch.context() as patched:
        patched.setattr(Tenure, "_filled", filled)
        patched.setattr(Tenure, "_seal", seal)
        patched.setattr(Tenure, "commit_step", commit)
        rig.work()
    saved = rig.told(job_id, "checkpoint_saved")
    assert failed == [4] and (rig.job(job_id).status, rig.job(job_id).attempt) == ("succeeded", 1)
    assert saved[0] in (4, 5) and saved[-1] == 10, saved  # at the next step, not at the next checkpoint
    quiet = rig.submit(spec)
    rig.work()
    assert_same(rig.weights(job_id), rig.weights(quiet))
    with rig.store.begin(readonly=True) as session:
        assert usage.of_job(session, job_id).tokens == usage.of_job(session, quiet).tokens + 7


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    rig: Rig, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, commit, seen, saved, goes_on = Tenure._seal, leases.commit_step, list[int](), dict[int, int](), Event()

    def seal(self: Tenure, *args: Any, **kwargs: Any) -> Any:
        if args[1].step == 4:
            assert goes_on.wait(60), "the loop stands still"
            sleep(0.2)  # it comes to the next checkpoint meanwhile
        saved[args[1].step] = max(seen)
        return plain(self, *args, **kwargs)

    def commit_step(*args: Any, **kwargs: Any) -> bool:
        done = commit(*args, **kwargs)
        seen.append(args[2])
        if args[2] == 8:
            goes_on.set()
        return done

    monkeypatch.setattr(Tenure, "_seal", seal)
    monkeypatch.setattr(leases, "commit_step", commit_step)
    job_id = rig.submit(spec)
    rig.work()
    assert rig.job(job_id).status == "succeeded"
    assert saved[4] == 8, "the fourth step's was written when the eighth was done"
    assert rig.told(job_id, "checkpoint_saved") == [4, 8, 10]
    assert [(row.step, row.is_final) for row in rig.checkpoints(job_id)] == [(10, True), (8, False)]
    with rig.store.begin(readonly=True) as session:
        when = [one.type for one in events.after(session, job_id, 0, limit=1000)]
    assert when.index("checkpoint_saved") > [i for i, kind in enumerate(when) if kind == "step"][7]


def test_whoever_pauses_or_cancels_waits_for_what_is_being_written(
    rig: Rig, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = Tenure._seal, Event()

    def seal(self: Tenure, *args: Any, **kwargs: Any) -> Any:
        if args[1].step == 4:
            lifecycle.cancel(rig.store, rig.doorbell, "default", job_id)
            asked.set()
            while rig.job(job_id).status != "cancelled" and self._hold.wish is None:
                sleep(0.01)
            sleep(0.2)  # time to end without the checkpoint
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tenure, "_seal", seal)
    job_id = rig.submit(spec | {"limits": {"max_steps": 10_000}, "checkpoints": {"every_steps": 4}})
    rig.work()
    job = rig.job(job_id)
    assert asked.is_set()
    assert (job.status, [row.step for row in rig.checkpoints(job_id)][-1]) == ("cancelled", 4)
    assert job.checkpoint_id is not None
