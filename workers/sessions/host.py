"""One process for many: it holds a base, and works for every session and sampler whose work shares it.

It runs one operation of the ordered lanes at a time, chosen fairly, and samples in slices in between. It is woken by signals,
and looks once a second anyway. Who has nothing to do for long is saved and leaves; if other work waits for this process, all
leave after a while.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from weakref import WeakValueDictionary

from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import JobFailed, LeaseLost
from service.jobs import lease as leases
from service.jobs import moves
from service.jobs.lease import Lease
from service.spec.model import Full
from service.spec.session import SamplerSpec, SessionSpec
from service.states import Phase, Wish
from service.store import operations, tinker
from service.store.operations import Answered, Logged
from service.store.tables import Job
from workers.identity import has_gpu, resource_classes
from workers.policy.base import Base
from workers.policy.load import adapter_of, model_folder, saved_adapter
from workers.sessions.errors import LOST, told
from workers.sessions.requests import refused
from workers.sessions.sampling import Finished, Sampling
from workers.sessions.session import Session
from workers.sessions.turns import FairTurns
from workers.sessions.versions import OtherCommit
from workers.tenure.failures import failure_of
from workers.tenure.keeper import Keeper
from workers.tenure.outcome import Failed, Outcome, Paused, obeyed
from workers.tenure.resume import start_checkpoint
from workers.tenure.session import SessionTenure

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the store without a signal
HURRIED_IDLE_S = 2.0  # how long a guest may be idle where other work waits
SLICE_S, LONG_SLICE_S = 0.05, 0.25  # of sampling: while operations in order wait, and while none does
PART_S = 0.05  # between two parts of an answer that is told while it grows
WRITTEN_S = 0.01  # of waiting for a checkpoint to be durable, or for graders, between two looks for other work
FIND_S = 0.02  # between two looks for operations to sample, while others are run in order
HEARD = frozenset({"operation", "guest"})
ROOM = 256  # rows in the engine; more are let in, fairly, as others end
AT_ONCE = 64  # guests that join together
TOGETHER = 2  # operations of a guest in one turn, a gradient and its step: nobody else waits for longer than these
TOGETHER_S = 0.05  # and only as long as they are small; their answers are stored at once


class Guest:
    """A session or sampler in this process. `session` is None for samplers, which only sample."""

    def __init__(self, tenure: SessionTenure, spec: SessionSpec | SamplerSpec) -> None:
        self.tenure, self.spec = tenure, spec
        self.id, self.project = tenure.job.id, tenure.job.project
        self.session: Session | None = None
        self.following = deque[Logged]()  # the next ones in order, as far as they are known
        self.loose: dict[str, Logged] = {}  # of unordered lanes, that are not in the engine yet
        self.sampled = set[str]()  # ids of those that are
        self.sampling: Sampling | None = None  # on its base; None: it trains all weights
        self.others = dict[str, Sampling]()  # at other commits of that base, which it uses
        self.busy_at = monotonic()

    @property
    def done(self) -> int:
        return 0 if self.session is None else self.session.place.seq

    @property
    def step(self) -> int:
        return self.tenure.job.step if self.session is None else self.session.place.step

    @property
    def is_busy(self) -> bool:
        return bool(self.following) or bool(self.loose) or bool(self.sampled)

    def snapshot(self) -> None:
        if self.session is not None:
            self.session.snapshot()


class Host:
    """Made for the first job that was claimed. `owner` is this worker's id."""

    def __init__(self, keeper: Keeper, owner: str) -> None:
        self.store, self.settings, self.doorbell = keeper.store, keeper.settings, keeper.doorbell
        self._keeper, self._owner = keeper, owner
        self._guests: dict[str, Guest] = {}
        self._turns, self._sampling_turns = FairTurns(), FairTurns()
        self._sampling: Sampling | None = None  # on the base that was loaded first
        self._other_commits = WeakValueDictionary[str, Sampling]()  # on bases at other commits, while a guest uses them
        self._base_key: str | None = None
        self._classes = resource_classes(self.settings)
        self._looked_at = self._found_loose_at = 0.0
        self._others_since: float | None = None  # since when other work waits for this process

    def run(self, lease: Lease, job: Job) -> None:
        """Work until nobody is left."""
        self._base_key = job.base_key
        self._join(lease, job)
        while self._guests:
            try:
                self._turn()
            except (OperationalError, InterfaceError):  # the leases say how long that may last
                log.warning("the store does not answer; trying again", exc_info=True)
                sleep(LOOK_S)

    @property
    def _heard(self) -> set[str]:
        """Whose signals are listened for: the guests', and the base's."""
        return {*self._guests, *([] if self._base_key is None else [self._base_key])}

    def _turn(self) -> None:
        self._attend()
        self._end_saving()
        worked = self._work()
        sampled = self._sample(SLICE_S if worked else LONG_SLICE_S)
        if monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = monotonic()
            self._look()
        writing = [guest.session.writing for guest in self._guests.values() if guest.session is not None]
        if not worked and not sampled and (unwritten := [one for one in writing if one is not None]):
            wait(unwritten, WRITTEN_S, FIRST_COMPLETED)
        elif not worked and not sampled and any(self._is_grading(guest) for guest in self._guests.values()):
            sleep(WRITTEN_S)
        elif not worked and not sampled and self._guests:
            if self.doorbell.hear(self._heard, LOOK_S, what=HEARD) == "guest":
                self._looked_at = 0.0
            self._found_loose_at = monotonic()  # what runs in order goes first, for so long

    def _end_saving(self) -> None:
        """Make visible what has become durable."""
        for guest in list(self._guests.values()):
            if guest.session is not None and guest.session.writing is not None and guest.session.writing.done():
                with self._alone(guest):
                    guest.session.end_saving()

    # ---------------------------------------------------------------- coming

    def _join(self, lease: Lease, job: Job) -> None:
        """A claimed job becomes a guest. If it cannot be loaded, it fails alone."""
        tenure = SessionTenure(self._keeper, lease, job)
        tenure.__enter__()
        log.info("%s %s: attempt %d starts", job.kind, job.id, lease.attempt)
        spec = SamplerSpec if job.kind == "sampler" else SessionSpec
        guest = Guest(tenure, spec.model_validate(job.spec))
        self._guests[job.id] = guest
        self.doorbell.hear(self._heard, 0.0, what=HEARD)  # from now on no signal is missed
        with self._alone(guest, joins=True):
            self.store.blobs.discard_before(job.id, lease.attempt)
            if isinstance(guest.spec, SessionSpec):
                guest.session = Session(tenure, guest.spec, lambda weights: self._base_at(guest, weights))
                guest.session.open()
            else:
                start = guest.spec.model.from_checkpoint
                base = self._base_at(guest, None if start is None else start_checkpoint(self.store, job, start.id))
                facts = {"source": base.source, "revision": base.revision, "device": str(base.device)}
                tenure.loaded(facts, Phase.SAMPLING)
        guest.busy_at = monotonic()

    def _base_at(self, guest: Guest, weights: Path | None) -> Base:
        """The base that all share, loaded for the first of them; or one of its own for a session that trains all weights, or
        that belongs to another commit."""
        if self._base_key is None:
            return self._load(guest, weights, None)
        guest.sampling = self._sampling_at(guest, self._commit(guest, weights), weights)
        return guest.sampling.base

    def _sampling_at(self, guest: Guest, commit: str | None, weights: Path | None = None) -> Sampling:
        """On the base at this commit, if one is known; it is loaded if it is not there."""
        first = self._sampling
        if first is not None and (commit is None or first.base.revision in (None, commit)):
            return first
        there = None if commit is None else self._other_commits.get(commit)
        if there is None:
            there = Sampling(self._load(guest, weights, commit), self.store, self._base_key)
        if first is None:
            self._sampling = there
        elif commit is not None:
            guest.others[commit] = self._other_commits[commit] = there
        return there

    def _load(self, guest: Guest, weights: Path | None, commit: str | None) -> Base:
        device, threads = "cuda" if has_gpu(self.settings) else "cpu", self.settings.torch_threads
        return Base.load(guest.spec.model, device=device, threads=threads, checkpoint=weights, revision=commit)

    @property
    def _samplings(self) -> list[Sampling]:
        return [*([] if self._sampling is None else [self._sampling]), *self._other_commits.values()]

    def _commit(self, guest: Guest, weights: Path | None) -> str | None:
        """The commit of its base on the hub that a guest belongs to, as far as it is known: its adapter's, else that of its
        first load. A branch may have moved since; another guest's base at another commit is none of its."""
        if weights is None:
            return guest.tenure.job.resolved.get("revision")
        adapter = adapter_of(guest.spec.model)
        return None if isinstance(adapter, Full) else saved_adapter(model_folder(weights, adapter)).revision

    # ---------------------------------------------------------------- staying, and leaving

    def _attend(self) -> None:
        """Obey wishes, and let those go whose time or budget is spent."""
        for guest in list(self._guests.values()):
            with self._alone(guest):
                wish = guest.tenure.check()
                if wish is not None:
                    self._leave(guest, obeyed(wish), save=wish is not Wish.CANCEL)
                elif guest.tenure.budget_spent:
                    self._leave(guest, Paused("budget_spent"))

    def _look(self) -> None:
        """What need not be looked at all the time."""
        self._found_loose_at = 0.0
        self._find()  # nobody leaves who has work
        ours, others = leases.queued(self.store, self._classes, self._base_key)
        self._others_since = None if not others else self._others_since or monotonic()
        gives_way = others and monotonic() - (self._others_since or 0.0) >= self.settings.session_slice_s
        idle_s = min(HURRIED_IDLE_S, self.settings.session_idle_s) if others else self.settings.session_idle_s
        gone_s, silent = min(idle_s, self.settings.tinker_silence_s), self._silent()
        for guest in list(self._guests.values()):
            with self._alone(guest):
                self._in_time(guest)
                if gives_way:
                    guest.snapshot()
                    guest.tenure.give_way()
                    self._forget(guest)
                elif not guest.is_busy and monotonic() - guest.busy_at >= (gone_s if guest.id in silent else idle_s):
                    guest.snapshot()
                    guest.tenure.rest(guest.done)
                    self._forget(guest)
        self._forget_withdrawn()
        if ours and self._base_key is not None and self._guests and not gives_way:
            for lease, job in leases.claim_beside(
                self.store, self.settings, self._owner, self._classes, self._base_key, AT_ONCE
            ):
                self._join(lease, job)

    def _silent(self) -> set[str]:
        """Guests with nothing to do whose clients are gone, as their heartbeats say."""
        idle = [guest for guest in self._guests.values() if not guest.is_busy]
        if not idle:
            return set()
        since = idle[0].tenure.now - timedelta(seconds=self.settings.tinker_silence_s)
        with self.store.look() as connection:
            return tinker.silent(connection, [guest.id for guest in idle], since)

    def _in_time(self, guest: Guest) -> None:
        """If no time is left, save and raise JobFailed."""
        job, run_s, allowed_s = guest.tenure.job, guest.tenure.run_s, guest.spec.limits.max_runtime_s
        if job.deadline_at is not None and guest.tenure.now > job.deadline_at:
            guest.snapshot()
            failed = moves.deadline(job)
            raise JobFailed(failed.code, failed.detail)
        if run_s > allowed_s:
            guest.snapshot()
            detail = f"it was in the hands of a worker for {run_s:.0f} s, allowed are {allowed_s:.0f} s (limits.max_runtime_s)"
            raise JobFailed("max_runtime", detail)

    def _leave(self, guest: Guest, outcome: Outcome, *, save: bool = True) -> None:
        if save:
            guest.snapshot()
        guest.tenure.settle(outcome)
        self._forget(guest)

    def _forget(self, guest: Guest) -> None:
        """Nothing of it stays in this process."""
        if self._guests.pop(guest.id, None) is None:
            return
        for sampling in self._samplings:
            sampling.leave(guest.id)
        if guest.session is not None:
            guest.session.close()
        guest.tenure.__exit__(None, None, None)

    @contextmanager
    def _alone(self, guest: Guest, *, joins: bool = False) -> Iterator[None]:
        """What happens inside concerns this guest only. If its lease is lost it is forgotten; if its work fails, it fails."""
        try:
            yield
        except LeaseLost as lost:
            log.warning(
                "%s %s: attempt %d is over, %s", guest.tenure.job.kind, guest.id, guest.tenure.lease.attempt, lost.detail
            )
            self._forget(guest)
        except Exception as error:
            if isinstance(error, OperationalError | InterfaceError) and not joins:
                raise
            failure = failure_of(error)
            log.warning("%s %s failed: %s", guest.tenure.job.kind, guest.id, failure.detail, exc_info=True)
            with self._alone_at_the_end(guest):
                guest.tenure.settle(Failed(failure, guest.step))

    @contextmanager
    def _alone_at_the_end(self, guest: Guest) -> Iterator[None]:
        try:
            yield
        except LeaseLost as lost:
            log.warning("%s could not be settled, %s", guest.id, lost.detail)
        finally:
            self._forget(guest)

    # ---------------------------------------------------------------- operations in order

    def _work(self) -> bool:
        """Run the operation whose turn it is, and small ones behind it. False if none waits."""
        self._find()
        ready = [guest for guest in self._guests.values() if guest.following and guest.session and guest.session.is_ready]
        waiting = {guest.id: guest.project for guest in ready}
        if not waiting:
            return False
        guest = self._guests[self._turns.next(waiting)]
        with self._alone(guest):
            self._run_next(guest)
        return True

    def _run_next(self, guest: Guest) -> None:
        session, began = guest.session, monotonic()
        assert session is not None
        for turn in range(1, TOGETHER + 1):
            row, since = guest.following[0], monotonic()
            session.do(row)
            if session.is_grading:  # it keeps its turn
                break
            guest.following.popleft()
            self._turns.spend(guest.project, guest.id, row.cost)
            guest.busy_at = monotonic()
            if session.ended:
                self._forget(guest)
                return
            if turn == TOGETHER or not guest.following:
                break
            expected_s = (guest.busy_at - since) * guest.following[0].cost / row.cost
            if guest.busy_at + expected_s > began + TOGETHER_S:
                break
        session.store_answers()

    def _is_grading(self, guest: Guest) -> bool:
        return guest.session is not None and guest.session.is_grading

    def _find(self) -> None:
        """Find the next operations in order, where none is known; and those to sample, if it is time or none is in order."""
        guests = self._guests
        unknown = {g.id: g.done for g in guests.values() if g.session is not None and not g.following}
        is_time = monotonic() - self._found_loose_at >= FIND_S
        if not unknown and not is_time and self._is_in_order:
            return
        with self.store.look() as connection:
            for row in operations.ready(connection, unknown):
                guests[row.job_id].following.append(row)
            if is_time or not self._is_in_order:
                self._found_loose_at = monotonic()
                known = [row_id for guest in guests.values() for row_id in (*guest.loose, *guest.sampled)]
                for row in operations.loose(connection, list(guests), known=known):
                    guests[row.job_id].loose[row.id] = row

    @property
    def _is_in_order(self) -> bool:
        """Whether an operation is known that runs in order."""
        return any(guest.following for guest in self._guests.values())

    # ---------------------------------------------------------------- sampling

    def _sample(self, slice_s: float) -> bool:
        """Sample for a while. False if there is nothing to sample."""
        until, told_at = monotonic() + slice_s, monotonic()
        while self._admit():
            for sampling in self._samplings:
                if sampling.pending:
                    self._answer(sampling.step())
            if monotonic() >= told_at + PART_S:
                self._tell_parts()
                told_at = monotonic()
            if monotonic() >= until:
                self._tell_parts()
                return True
        return False

    def _tell_parts(self) -> None:
        for sampling in self._samplings:
            for lane, parts in sampling.parts():
                self.doorbell.tell(lane, parts)

    def _forget_withdrawn(self) -> None:
        """Operations that wait no more, though nobody here answered them: their callers went away."""
        known = {row_id for guest in self._guests.values() for row_id in (*guest.loose, *guest.sampled)}
        if not known:
            return
        with self.store.look() as connection:
            gone = operations.finished(connection, known)
        for sampling in self._samplings:
            for owner, tokens in sampling.withdraw(gone).items():
                self._guests[owner].tenure.meter.sampled(tokens)
        for guest in self._guests.values():
            guest.sampled -= gone
            guest.tenure.forget_traces(gone)
            for row_id in gone & guest.loose.keys():
                del guest.loose[row_id]

    def _admit(self) -> bool:
        """Let operations into the engine, as far as there is room. False if there is nothing in it."""
        while waiting := {guest.id: guest.project for guest in self._guests.values() if guest.loose}:
            if self._pending >= ROOM:
                break
            guest = self._guests[self._sampling_turns.next(waiting)]
            row = guest.loose.pop(next(iter(guest.loose)))
            self._sampling_turns.spend(guest.project, guest.id, row.cost)
            with self._alone(guest):
                self._add(guest, row)
        return self._pending > 0

    @property
    def _pending(self) -> int:
        """Rows in the engines."""
        return sum(sampling.pending for sampling in self._samplings)

    def _add(self, guest: Guest, row: Logged) -> None:
        guest.busy_at, job = monotonic(), guest.tenure.job
        if job.crashes:
            if row.attempt is not None and job.crashes >= guest.spec.limits.max_attempts - 1:
                guest.tenure.answer([Answered(row.id, error=LOST)])
                return
            with self.store.begin() as session:
                operations.at_work(session, row.id, attempt=guest.tenure.lease.attempt)
        trace = guest.tenure.trace(row, Phase.SAMPLING)
        try:
            if guest.sampling is None:
                raise refused(
                    "no_base",
                    "this session trains all weights, so that no other version can be sampled beside it",
                    hint="sample in order (with a seq), or a saved checkpoint",
                )
            try:
                guest.sampling.add(guest.id, guest.project, guest.spec.seed, row, trace)
            except OtherCommit as other:
                self._sampling_at(guest, other.commit).add(guest.id, guest.project, guest.spec.seed, row, trace)
            guest.sampled.add(row.id)
        except (OperationalError, InterfaceError):
            guest.loose[row.id] = row
            raise
        except Exception as error:
            guest.tenure.answer([Answered(row.id, error=told(error))])

    def _answer(self, finished: list[Finished]) -> None:
        """Store the answers, in one transaction for each guest."""
        for guest in [self._guests[owner] for owner in dict.fromkeys(one.owner for one in finished)]:
            answered = list[Answered]()
            for one in finished:
                if one.owner != guest.id:
                    continue
                guest.sampled.discard(one.row.id)
                if isinstance(one.result, Exception):
                    answered.append(Answered(one.row.id, error=told(one.result), began=one.began))
                else:
                    guest.tenure.meter.sampled(one.result.sampled)
                    answered.append(Answered(one.row.id, one.result.answer, began=one.began))
            guest.busy_at = monotonic()
            with self._alone(guest):
                guest.tenure.answer(answered)
