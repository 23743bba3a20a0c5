"""The tenure of a session or sampler: beside others in one process, with operations in place of steps."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from service import tracing
from service.jobs import lease as leases
from service.jobs.lease import Answered, CheckpointRow
from service.spec.work import WorkLimits
from service.states import Phase, Status, Wish
from service.store.checkpoints import Purpose
from service.store.operations import Logged
from service.store.tables import Job
from workers.tenure.keeper import Keeper
from workers.tenure.tenure import WRITERS, Contents, Lease, Tenure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """What a checkpoint's owner says about it."""

    name: str | None = None
    purpose: Purpose = "training"
    ttl_s: float | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Saving:
    """A checkpoint whose content is copied, and is being made durable."""

    written: Future[CheckpointRow]
    named: Named
    replay_from: int | None
    keep_last: int | None
    answered: Answered | None

    @property
    def is_snapshot(self) -> bool:
        """Of the session's own, which no client can delete or overwrite."""
        return self.named.name is None


class SessionTenure(Tenure):
    """The log's tail has only the lines of its own operations, see `working`. All guests of a process have one patience: a
    process that hangs hangs for all of them."""

    def __init__(self, keeper: Keeper, lease: Lease, job: Job) -> None:
        super().__init__(keeper, lease, job, stall_timeout_s=WorkLimits().stall_timeout_s)
        self._operations: dict[str, tracing.Stages] = {}  # spans of those at work, by id

    def __enter__(self) -> Self:
        self._keeper.hold(self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.forget_traces(list(self._operations))
        super().__exit__(kind, error, trace)

    def check(self, phase: Phase | None = None) -> Wish | None:
        """As of every tenure; and progress of all guests, for one thread works for all of them in turn."""
        wish = super().check(phase)
        self._keeper.progress()
        return wish

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is logged inside belongs to this session."""
        with self._tail:
            yield

    @property
    def lost(self) -> bool:
        return self._hold.lost is not None

    def loaded(self, facts: Mapping[str, Any], phase: Phase) -> None:
        """The work can begin. What an earlier attempt wrote stays: answers that were given are kept."""
        self._hold.patiently(lambda: leases.set_resolved(self.store, self.lease, dict(facts)))
        self.check(phase)

    # ---------------------------------------------------------------- traces

    def trace(self, row: Logged, phase: Phase) -> str | None:
        """The work on the operation enters a phase. Its span begins with the first one, is a child of the request that it came
        with, links the attempt, and ends when the answer is stored. Returns its traceparent; None while nothing is traced."""
        if not tracing.is_on():
            return None
        span = self._operations.get(row.id)
        if span is None:
            facts = {
                "operation_id": row.id,
                "kind": row.kind,
                "seq": row.seq,
                "job_id": self.job.id,
                "attempt": self.lease.attempt,
            }
            span = tracing.Stages("operation", parent=row.traceparent, links=[self._trace.traceparent], **facts)
            self._operations[row.id] = span
        span.enter(phase)
        return span.traceparent

    def _end_traces(self, answered: Iterable[Answered]) -> None:
        for each in answered:
            if (span := self._operations.pop(each.id, None)) is not None:
                span.end(None if each.error is None else each.error["code"])

    def forget_traces(self, ids: Iterable[str]) -> None:
        """Nobody here answers these operations."""
        for id_ in ids:
            if (span := self._operations.pop(id_, None)) is not None:
                span.end("not_answered")

    # ---------------------------------------------------------------- what the work leaves behind

    def answer(self, answered: Sequence[Answered]) -> None:
        """Store what came of some operations, in one transaction, and set `budget_spent`."""
        spent = self.meter.take()
        self.budget_spent = self._hold.patiently(
            lambda: leases.answer_operations(self.store, self.settings, self.lease, answered, spent=spent)
        )
        self._end_traces(answered)
        self._tell_followers()

    def begin_saving(
        self,
        contents: Contents,
        named: Named,
        *,
        replay_from: int | None,
        keep_last: int | None,
        answered: Answered | None = None,
        row_id: str,
        final: bool = False,
    ) -> "Saving":
        """Copy the contents into files; a thread makes them durable. Nobody sees them before `end_saving`."""
        self.check()
        self.meter.enter(Phase.SAVING)
        try:
            folder = self._filled(contents)
        finally:
            self.meter.enter(self.phase)
        written = WRITERS.submit(self._seal, folder, contents, final=final, checkpoint_id=row_id)
        return Saving(written, named, replay_from, keep_last, answered)

    def end_saving(self, saving: "Saving") -> None:
        """Wait until it is durable; then record it, and with it, in one transaction, everything that it makes needless."""
        self.meter.enter(Phase.SAVING)
        try:
            row, named = saving.written.result(), saving.named
        finally:
            self.meter.enter(self.phase)
        row = replace(
            row,
            name=named.name,
            purpose=named.purpose,
            ttl_s=named.ttl_s,
            user_metadata=named.user_metadata,
            has_optimizer=named.purpose == "training",
        )
        spent = self.meter.take()
        removed = self._hold.patiently(
            lambda: leases.commit_snapshot(
                self.store,
                self.settings,
                self.lease,
                row,
                replay_from=saving.replay_from,
                answered=saving.answered,
                overwrite=named.overwrite,
                keep_last=saving.keep_last,
                broken=self.broken,
                spent=spent,
            )
        )
        self._end_traces([] if saving.answered is None else [saving.answered])
        for path in removed:
            self.store.blobs.delete(path)
        self._tell_followers()

    def drop(self, saving: "Saving") -> None:
        """Forget what is being written: nobody has heard of it. It is deleted when it is there; nobody waits for that."""

        def delete(written: Future[CheckpointRow]) -> None:
            try:
                self.store.blobs.delete(written.result().path)
            except Exception:
                log.warning("a checkpoint of %s was not written, and is not needed", self.job.id, exc_info=True)

        saving.written.add_done_callback(delete)

    def finish(self, result: dict[str, Any], answered: Answered) -> None:
        """The session's last operation is done, and with it the session."""
        self._end(lambda spent: leases.finish(self.store, self.settings, self.lease, result, answered, spent=spent))
        self._end_traces([answered])

    def rest(self, done: int) -> None:
        """The session was idle: it leaves this process until an operation comes. `done`: the last one in order that ran."""
        if self._end(lambda spent: leases.rest(self.store, self.lease, done, spent=spent)) is Status.QUEUED:
            self.doorbell.ring(self.job.id, self.job.resource_class)

    def give_way(self) -> None:
        """Back to the queue, behind the work that waits for this process."""
        self._end(lambda spent: leases.release(self.store, self.lease, "gave_way", spent=spent))
        self.doorbell.ring(self.job.id, self.job.resource_class)
