"""One attempt at a job, while this process holds the lease. All its writes to the store go through here."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from service import tracing
from service.errors import Failure, LeaseLost
from service.failures import CODES
from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease, RolloutRow
from service.spec.job import CheckpointsSpec, KeepBest
from service.states import Phase, Status, Wish
from service.store.tables import Job
from service.store.usage import NOTHING, Spent
from workers.policy.checkpoint import write_manifest
from workers.tenure.keeper import Hold, Keeper
from workers.tenure.log_tail import LogTail
from workers.tenure.meter import Meter
from workers.tenure.outcome import Cancelled, Drained, Failed, Outcome, Paused, Succeeded

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_LAST_S = 5.0, 300.0  # the pause before a retry doubles from first to last
EventRow = tuple[str, dict[str, Any]]  # type and data
WRITERS = ThreadPoolExecutor(2, "writer")  # of checkpoints, for all that this process holds


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint: `write` fills a folder, the other fields describe it."""

    step: int
    adapter: str
    write: Callable[[Path], None]
    metrics: Mapping[str, float]  # of an evaluation at this very step; empty if there was none


class Tenure:
    """Use `with Tenure(keeper, lease, job, ...) as tenure:`. The lease is renewed until the attempt is settled.

    Only for the main thread; what a writer's does stands in `_finish`. If the lease is lost, every method that writes raises
    LeaseLost and writes nothing. Writes are retried while the store is down and the lease may still be ours.
    """

    def __init__(self, keeper: Keeper, lease: Lease, job: Job, *, stall_timeout_s: float) -> None:
        self.store, self.settings, self.doorbell = keeper.store, keeper.settings, keeper.doorbell
        self.lease, self.job = lease, job
        names = {"job_id": job.id, "kind": job.kind, "attempt": lease.attempt}
        self._trace = tracing.Stages("attempt", parent=job.resolved.get("traceparent"), **names)
        self.meter = Meter(Phase.LOADING, self._trace)
        self.saved_at: int | None = None  # the step of the newest checkpoint, which may still be on its way to the disk
        self.budget_spent = False  # the budget of the job or its project is used up
        self.broken = set[str]()  # checkpoints of the job that were found to be broken
        self._keeper, self._tail = keeper, LogTail(keeper.settings)
        self._hold = Hold(lease, stall_timeout_s=stall_timeout_s, tail=self._tail)
        self._saving: tuple[Future[None], Spent] | None = None  # the checkpoint that is copied and not visible yet
        self._since_copy = NOTHING  # committed since: that checkpoint does not cover it
        self._committing = Lock()  # steps and checkpoints, which tell the ledger what is covered

    def __enter__(self) -> Self:
        self._tail.__enter__()
        self._keeper.hold(self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._saving is not None:  # the lease is lost: what is written now, no row will name
            wait([self._saving[0]])  # if it takes long, the keeper ends the process
        self._keeper.let_go(self._hold)
        self._tail.__exit__(kind, error, trace)
        self._trace.end(None if kind is None else kind.__name__)
        self._tell_followers()

    # ---------------------------------------------------------------- between pieces of work

    def check(self, phase: Phase | None = None) -> Wish | None:
        """Set the next phase, record progress and return the owner's wish. Raises LeaseLost if the lease is lost."""
        wish = self._hold.check(phase)
        if phase is not None:
            self.meter.enter(phase)
        return wish

    @property
    def phase(self) -> Phase:
        return self._hold.phase

    def blame(self, phase: Phase) -> None:
        """A later failure will name this phase, even if another phase has begun since."""
        self._hold.phase = phase

    @property
    def run_s(self) -> float:
        """Seconds that the job has run, over all its attempts."""
        return self.job.run_s + self._hold.ran_s

    @property
    def now(self) -> datetime:
        """By the database's clock, which said when the job was claimed; whatever this machine's own does meanwhile."""
        assert self.job.claimed_at is not None
        return self.job.claimed_at + timedelta(seconds=self._hold.ran_s)

    # ---------------------------------------------------------------- what the work leaves behind

    def begin(self, step: int, facts: dict[str, Any], *, saved: bool) -> None:
        """The job is loaded at `step`: remove what an earlier attempt wrote beyond it. `saved`: `step` has a checkpoint."""
        self.saved_at = step if saved else None
        leases.rewind(self.store, self.lease, step, anew=not saved)
        self.note(facts)

    def note(self, facts: dict[str, Any]) -> None:
        """Add to the job's resolved facts, with an event."""
        leases.set_resolved(self.store, self.lease, facts)

    def commit_step(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        rollouts: Sequence[RolloutRow] = (),
        events: Sequence[EventRow] = (),
    ) -> None:
        """Write everything that a step produced, in one transaction, and set `budget_spent`."""
        spent, tries = self.meter.take(), count()

        def commit() -> bool:
            again = next(tries) > 0
            return leases.commit_step(self.store, self.lease, step, metrics, rollouts, events, spent=spent, again=again)

        with self._committing:
            self.budget_spent = self._hold.patiently(commit)
            self._since_copy += spent
        self._tell_followers()

    def save(
        self,
        contents: Contents,
        keep: CheckpointsSpec,
        best: Sequence[KeepBest] = (),
        *,
        final: bool = False,
        behind: bool = False,
    ) -> None:
        """Write a checkpoint atomically, point the job at it, and release older ones.

        A second call at the same step does nothing, unless it is the final one. `behind`: return when the content is
        copied; a thread does the rest. There is one at a time, so that they become visible in order: a second call first waits
        for the one before. If that failed, this one stands in for it, and raises what it fails with.
        """
        try:
            self.finish_saving()
        except LeaseLost:
            raise
        except Exception:
            log.warning("job %s: the checkpoint before could not be saved; saving what is newer", self.job.id, exc_info=True)
            behind = False
        if self.saved_at == contents.step and not final:
            return
        self.check(Phase.SAVING)
        folder = self._filled(contents)
        spent, self._since_copy = self.meter.take(), NOTHING
        self.saved_at = contents.step
        self._saving = WRITERS.submit(self._finish, folder, contents, keep, best, spent, final=final), spent
        if not behind:
            self.finish_saving()

    @property
    def could_not_save(self) -> bool:
        """Whether the checkpoint that was being written has failed."""
        return self._saving is not None and self._saving[0].done() and self._saving[0].exception() is not None

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and raise what it failed with."""
        if self._saving is None:
            return
        self.check(Phase.SAVING)
        (saving, spent), self._saving = self._saving, None
        try:
            saving.result()
        except BaseException:
            self.meter.give_back(spent)
            self.saved_at = None
            self.blame(Phase.SAVING)
            raise

    def _finish(
        self,
        folder: Path,
        contents: Contents,
        keep: CheckpointsSpec,
        best: Sequence[KeepBest],
        spent: Spent,
        *,
        final: bool,
    ) -> None:
        """In the writer's thread: make the copy durable, then visible."""
        row = self._seal(folder, contents, final=final, checkpoint_id=new_id("ckpt"))
        with self._committing:
            after = self._since_copy
            self._hold.patiently(lambda: leases.commit_checkpoint(self.store, self.lease, row, spent=spent, after=after))
        for path in self._hold.patiently(lambda: leases.retain(self.store, self.lease, keep, best, self.broken)):
            try:
                self.store.blobs.delete(path)
            except Exception:  # the checkpoint is there; what no row names, a sweep deletes
                log.warning("job %s: %s could not be deleted", self.job.id, path, exc_info=True)
        log.info("job %s: checkpoint %s at step %d", self.job.id, row.id, row.step)
        self._tell_followers()

    def _filled(self, contents: Contents) -> Path:
        """A temporary folder with the content: a copy in the system's page cache, which is not durable yet. An incomplete one
        is removed at once, because the disk may be full."""
        folder = self.store.blobs.temporary_dir((self.job.id, self.lease.attempt))
        try:
            contents.write(folder)
        except BaseException:
            self.store.blobs.discard(folder)
            raise
        return folder

    def _seal(self, folder: Path, contents: Contents, *, final: bool, checkpoint_id: str) -> CheckpointRow:
        """Make the folder a durable blob. This may run in another thread: it touches nothing of this tenure that changes."""
        blobs, relative = self.store.blobs, f"checkpoints/{self.job.id}/{checkpoint_id}"
        try:
            manifest_sha256 = write_manifest(folder)
            size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            blobs.commit_dir(folder, relative)
        except BaseException:
            blobs.discard(folder)
            raise
        return CheckpointRow(
            id=checkpoint_id,
            step=contents.step,
            adapter=contents.adapter,
            model=self.job.spec["model"],
            path=relative,
            size_bytes=size_bytes,
            manifest_sha256=manifest_sha256,
            metrics=dict(contents.metrics),
            has_optimizer=True,
            is_final=final,
        )

    # ---------------------------------------------------------------- the end

    def settle(self, outcome: Outcome) -> None:
        """Record how the attempt ended. The lease is then released. Raises what a checkpoint that is being written fails with,
        unless the attempt has failed or was cancelled."""
        if isinstance(outcome, Failed):
            self._describe(outcome)
            self._trace.end(outcome.failure.code)
        try:
            self.finish_saving()
        except LeaseLost:
            raise
        except Exception:
            if not isinstance(outcome, Failed | Cancelled):
                raise
            log.warning("job %s: a checkpoint before its end could not be saved", self.job.id, exc_info=True)
        end = self._ending(outcome)
        self._end(lambda spent: end(self.store, self.lease, spent=spent))
        if isinstance(outcome, Drained):
            self.doorbell.ring(self.job.id, self.job.resource_class)  # another worker continues at once

    def _end(self, end: Callable[[Spent], Status]) -> Status:
        spent = replace(self.meter.take(), ran_s=self._hold.ran_s)
        status = self._hold.patiently(lambda: end(spent))
        self._keeper.let_go(self._hold)
        return status

    def _ending(self, outcome: Outcome) -> Callable[..., Status]:
        match outcome:
            case Succeeded(result, reason):
                return partial(leases.succeed, result=result, reason=reason)
            case Paused(reason):
                return partial(leases.pause, reason=reason)
            case Cancelled():
                return leases.cancelled
            case Drained():
                return partial(leases.release, reason="drained")
            case Failed(failure, _, result):
                return self._failing(failure, result)

    def _failing(self, failure: Failure, result: dict[str, Any] | None) -> Callable[..., Status]:
        if failure.retryable:  # at the limits.max_attempts-th such failure the job fails
            delay_s = min(RETRY_FIRST_S * 2**self.job.retries, RETRY_LAST_S)
            return partial(leases.release, reason=failure.code, failure=failure, delay_s=delay_s)
        if CODES[failure.code].pauses:
            return partial(leases.park, failure=failure)
        return partial(leases.fail, failure=failure, result=result)

    def _describe(self, failed: Failed) -> None:
        """Add to the failure where it happened, and the last log lines."""
        failure = failed.failure
        failure.phase, failure.attempt, failure.step = self.phase.value, self.lease.attempt, failed.step
        self._tail.add_to(failure)

    def _tell_followers(self) -> None:
        self.doorbell.signal(self.job.id, "events")
