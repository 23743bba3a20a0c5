"""One session in this process: its learner, where it stands in its log of operations, and how it comes back after a crash.

The log is the write-ahead log, a checkpoint with the optimizer's state is the snapshot. Whatever happens to the process, the
next one loads the newest whole snapshot and runs the operations behind it again, so that the weights are the same to the bit
(on a CPU); those that were answered keep their answers.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Self

import orjson
from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import InvalidRequest, JobFailed, LeaseLost, NotFound
from service.ids import new_id
from service.sessions.codec import pack
from service.spec.session import SessionSpec
from service.spec.training import OptimizerSpec
from service.states import Phase
from service.store import checkpoints, operations
from service.store.operations import Answered, Logged
from service.store.tables import Operation
from workers.identity import this_process
from workers.loops import known_metrics
from workers.policy.base import Base
from workers.policy.checkpoint import CheckpointBroken
from workers.policy.errors import PolicyFailed
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.reference import open_reference
from workers.sessions.errors import LOST, told
from workers.sessions.evaluating import Evaluation
from workers.sessions.requests import Request, refused
from workers.sessions.sampling import sample, seed_of
from workers.sessions.training import MUTATING, STEPS, TRAINING, Done, Trainer
from workers.tenure.resume import sound, start_checkpoint, there, verified
from workers.tenure.session import Named, Saving, SessionTenure
from workers.tenure.tenure import Contents

log = logging.getLogger(__name__)

FILE = "session.json"
PHASES = {  # of operations that do not train, as their spans name them
    "sample": Phase.SAMPLING,
    "eval": Phase.SAMPLING,
    "save_checkpoint": Phase.SAVING,
    "load_checkpoint": Phase.LOADING,
    "finish": Phase.SAVING,
}
REPLAYED_AT_ONCE = 16  # operations read together


@dataclass
class Place:
    """Where a session stands in its log."""

    seq: int = 0  # the last operation of the ordered lane that has run
    gradient_from: int | None = None  # the first one whose gradient no optimizer step has taken yet
    step: int = 0  # optimizer steps, over the whole session

    @property
    def replay_from(self) -> int:
        """Where a replay begins, if the weights are those of now."""
        return self.seq + 1 if self.gradient_from is None else self.gradient_from

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(orjson.dumps({**asdict(self), "replay_from": self.replay_from}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        saved = orjson.loads((folder / FILE).read_bytes())
        return cls(saved["seq"], saved["gradient_from"], saved["step"])


class Session:
    """A session while this process holds its lease.

    `load_base` loads a base at a checkpoint's weights (None: the source's). Of LoRA the base is loaded once and may be shared;
    all weights are trained on one that is the session's own.
    """

    def __init__(self, tenure: SessionTenure, spec: SessionSpec, load_base: Callable[[Path | None], Base]) -> None:
        self.tenure, self.spec, self._load_base = tenure, spec, load_base
        self.place = Place()
        # The newest snapshot of its own, which nobody can delete or overwrite. A checkpoint with a name is as good to load, but
        # the log reaches back as if there were none.
        self.saved = Place()
        self.ended = False
        self._answers: list[Answered] = []  # of operations that have run, and are not stored yet
        self._changed = False  # the weights, since they were last copied for a snapshot
        self._uncopied = 0  # the step at which that failed
        self._saving: tuple[Saving, Place] | None = None  # what is copied and not durable yet, and where that stood
        self._evaluation: Evaluation | None = None  # of the next operation, whose answers are being graded
        self._suspect = tenure.job.crashes > 0  # an operation may have killed its worker
        self._began: float | None = None  # when the work on the operation of now began; None: it is given up without any
        self._loads, self._trainer = 0, None

    # ---------------------------------------------------------------- loading, and doing again

    def open(self) -> None:
        """Load the newest snapshot, or the start, and do again what came after it. Raises JobFailed."""
        self._load()
        self.tenure.loaded({**self.trainer.learner.facts, "process": this_process()}, Phase.UPDATING)
        self._after_a_crash()

    def _load(self) -> None:
        self.end_saving()
        self._uncopied = 0
        store = self.tenure.store
        with store.begin(readonly=True) as session:
            rows = checkpoints.of_job(session, self.tenure.job.id)
        newest = sound(self.tenure, rows)
        own = newest if newest is None or newest.name is None else sound(self.tenure, [row for row in rows if row.name is None])
        snapshot = None if newest is None else store.blobs.path(newest.path)
        self.place = Place() if snapshot is None else Place.load(snapshot)
        self.saved = Place() if own is None else Place.load(store.blobs.path(own.path))
        self.close()
        self._trainer, self._changed = (
            self._trained_from(self._start() if snapshot is None else Start(snapshot, snapshot)),
            False,
        )
        self._replay()

    def _after_a_crash(self) -> None:
        """Refuse an operation that was at work each time the worker died, so that the session can go on without it."""
        if not self._suspect:
            return
        following = self._since(self.place.seq + 1)[:1]
        if not following or following[0].seq != self.place.seq + 1:
            self.snapshot(anyway=True)  # it was none of ours
        elif self._is_poison(following[0]):
            self._answer(following[0], Answered(following[0].id, error=LOST))
            self.snapshot(anyway=True)

    def _is_poison(self, row: Operation) -> bool:
        return row.attempt is not None and self.tenure.job.crashes >= self.spec.limits.max_attempts - 1

    def _start(self) -> Start:
        start = self.spec.model.from_checkpoint
        folder = self._start_folder()
        return Start(folder, folder if start is not None and start.load == "weights+optimizer" else None)

    def _start_folder(self) -> Path | None:
        start = self.spec.model.from_checkpoint
        return None if start is None else start_checkpoint(self.tenure.store, self.tenure.job, start.id)

    def _trained_from(self, start: Start) -> Trainer:
        """A new learner beside the one that there is, if any."""
        self._loads += 1
        learner = Learner(
            self._load_base(start.weights),
            adapter_of(self.spec.model),
            name=f"{self.tenure.job.id}-{self._loads}",
            optimizer=OptimizerSpec(),  # each operation brings its own settings
            steps=1,
            seed=self.spec.seed,
            start=start,
        )
        return Trainer(
            learner,
            self.spec.seed,
            open_reference=lambda: open_reference(learner, self.spec.model, self._start_folder()),
            beat=self._beat,
        )

    def _beat(self) -> None:
        self.tenure.check()

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    def _replay(self) -> None:
        """Run what the weights do not hold yet of the operations that were answered."""
        at, snapshot = self.place.replay_from, self.place.seq
        while rows := self._since(at):
            for row in rows:
                if row.seq != at:  # a gap
                    return
                if row.status == "waiting":
                    if not self._was_being_saved(row):
                        return
                    self._save_again(row)
                elif row.status == "done" and (row.seq > snapshot or row.kind == "forward_backward"):
                    self._again(row)
                self.place.seq, at = max(self.place.seq, row.seq), at + 1

    def _was_being_saved(self, row: Operation) -> bool:
        """Later operations were answered already: its checkpoint was copied, and was not durable when the worker died."""
        with self.tenure.store.begin(readonly=True) as session:
            return operations.answered_after(session, row.job_id, row.seq)

    def _save_again(self, row: Operation) -> None:
        if self._suspect and self._is_poison(row):
            self._answer(row, Answered(row.id, error=LOST))
            return
        assert row.request is not None
        self.do(Logged(row.id, row.job_id, row.lane, row.seq, row.kind, row.request, row.cost, row.attempt, row.traceparent))
        self.end_saving()

    def _since(self, seq: int) -> list[Operation]:
        with self.tenure.store.begin(readonly=True) as session:
            return operations.since(session, self.tenure.job.id, seq, limit=REPLAYED_AT_ONCE)

    def _again(self, row: Operation) -> None:
        if row.kind not in MUTATING and row.kind != "load_checkpoint":
            return
        if row.request is None:
            raise JobFailed(
                "checkpoint_broken",
                f"operation {row.seq} has to run again, but its request is gone: the session's newest checkpoint is broken",
            )
        self.tenure.check()
        request = Request.read(row.request)
        if row.kind in MUTATING:
            self._run(request, row)
            return
        try:
            self._take(request.head)
        except InvalidRequest as gone:
            detail = f"operation {row.seq} has to run again, but what it loaded cannot be loaded any more: {gone.detail}"
            raise JobFailed("checkpoint_broken", detail) from gone

    # ---------------------------------------------------------------- operations

    def do(self, row: Logged) -> None:
        """Run the next operation. Its client's errors are its answer; others leave the session as it was.

        The answer of an operation that trains waits for `store_answers`, so that several are stored at once; until then a
        crash undoes the operation, which nobody has heard of.
        """
        if self._evaluation is None:
            self._began = monotonic()
        with self.tenure.working():
            try:
                if self._suspect:
                    self._mark(row)
                if not self.is_grading:
                    self.tenure.trace(row, PHASES.get(row.kind, Phase.UPDATING))
                self._do(Request.read(row.request), row)
            except (LeaseLost, OperationalError, InterfaceError):  # the lease is lost, or the store is away
                raise
            except Exception as error:
                self.store_answers()  # what is loaded again shall have them
                self._answer(row, Answered(row.id, error=self._error(row, error)))
            if self._suspect and not self.ended:
                self.end_saving()
            if self._suspect and not self.ended:  # it was not this one
                self.snapshot(anyway=True)

    def store_answers(self) -> None:
        """Whoever waits for them reads them from now on, and a replay does them again."""
        if self._answers:
            self.tenure.answer(self._answers)
            self._answers = []

    def _mark(self, row: Logged) -> None:
        """Note that the operation is at work, in case that it kills this process."""
        with self.tenure.store.begin() as session:
            operations.at_work(session, row.id, attempt=self.tenure.lease.attempt)

    def _do(self, request: Request, row: Logged) -> None:
        if row.kind in TRAINING:
            done = self._run(request, row)
            self.tenure.meter.trained(done.trained)
            known_metrics.check(done.metrics, "session", strict=self.tenure.settings.strict_metrics)
            self.place.seq = row.seq
            self._answers.append(Answered(row.id, done.answer, step=self.place.step, metrics=done.metrics, began=self._began))
            copied = self._saving[1] if self._saving is not None and self._saving[0].is_snapshot else self.saved
            if self.place.step - max(copied.step, self._uncopied) >= self.spec.checkpoints.every_steps:
                self._snapshot_by_itself()
        else:
            OTHERS[row.kind](self, request, row)

    def _run(self, request: Request, row: Logged | Operation) -> Done:
        learner = self.trainer.learner
        before = learner.updates
        done = TRAINING[row.kind](self.trainer, request, row.seq)
        self.place.step += learner.updates - before
        if row.kind in STEPS:
            self.place.gradient_from, self._changed = None, True
        elif row.kind in MUTATING and self.place.gradient_from is None:
            self.place.gradient_from = row.seq
        return done

    def _answer(self, row: Logged | Operation, answered: Answered) -> None:
        self.place.seq = row.seq
        self._answers.append(replace(answered, step=self.place.step, began=self._began))
        self.store_answers()

    def _error(self, row: Logged, error: Exception) -> dict[str, Any]:
        """What its client reads. After a failure in the middle of an operation that trains, everything is as before it."""
        if not isinstance(error, InvalidRequest):
            log.warning("operation %d (%s) of %s failed", row.seq, row.kind, self.tenure.job.id, exc_info=error)
            if row.kind in MUTATING:
                self._load()
        return told(error)

    # ---------------------------------------------------------------- checkpoints

    def snapshot(self, *, anyway: bool = False) -> None:
        """Save, if the weights have changed since the last time, and wait until it is durable. A gradient that no step has
        taken is computed again."""
        self.end_saving()
        if self._changed or anyway:
            self._save(Named(), new_id("ckpt"))
            self.end_saving(raises=True)

    def _snapshot_by_itself(self) -> None:
        """One that nobody asked for. If it cannot be copied (a full disk), the log still has everything, and it is tried again
        after as many steps."""
        try:
            self._save(Named(), new_id("ckpt"))
        except (LeaseLost, OperationalError, InterfaceError):
            raise
        except Exception:
            self._uncopied = self.place.step
            log.warning("a snapshot of %s could not be written", self.tenure.job.id, exc_info=True)

    def _save(self, named: Named, checkpoint_id: str, answered: Answered | None = None, *, final: bool = False) -> None:
        """Copy the weights as they are; `end_saving` makes a checkpoint of the copy. One at a time, so that they become
        visible in their order."""
        self.store_answers()
        self.end_saving()
        learner, place = self.trainer.learner, Place(self.place.seq, self.place.gradient_from, self.place.step)
        training = named.purpose == "training"

        def write(folder: Path) -> None:
            learner.save(folder, optimizer=training)
            if training:
                place.save(folder)

        saving = self.tenure.begin_saving(
            Contents(place.step, learner.kind, write, {}),
            named,
            # If this one cannot be read, the one before and the log behind that must do; after the end nothing replays.
            replay_from=None if named.name is not None else (place if final else self.saved).replay_from,
            keep_last=self.spec.checkpoints.keep_last if named.name is None else None,
            answered=None if answered is None else replace(answered, began=self._began),
            row_id=checkpoint_id,
            final=final,
        )
        self._saving = saving, place
        if training:
            self._changed = False

    @property
    def writing(self) -> Future[Any] | None:
        """Done when the checkpoint that is being written is durable."""
        return None if self._saving is None else self._saving[0].written

    def end_saving(self, *, raises: bool = False) -> None:
        """Wait until what is being written is durable, and make it visible. If it cannot be written, the operation that asked
        for it fails; a snapshot of our own is tried again after the next step, for the log has everything, unless `raises`."""
        if self._saving is None:
            return
        (saving, place), self._saving = self._saving, None
        training = saving.named.purpose == "training"
        try:
            self.tenure.end_saving(saving)
        except (LeaseLost, OperationalError, InterfaceError):
            raise
        except Exception as error:
            self._changed = self._changed or training
            if saving.answered is not None:
                self.tenure.answer([replace(saving.answered, answer=None, error=told(error))])
                if saving.named.name is None:  # weights that were loaded, which no replay would find again
                    self._load()
            elif raises:
                raise
            log.warning("a checkpoint of %s could not be written", self.tenure.job.id, exc_info=True)
            return
        if training:
            self._suspect = False
        if saving.is_snapshot:
            self.saved = place

    def save_checkpoint(self, request: Request, row: Logged) -> None:
        head = request.head
        self.end_saving()  # it may have this name
        with self.tenure.store.begin(readonly=True) as session:
            there = checkpoints.named(session, self.tenure.job.id, head["purpose"], head["name"])
        if there is not None and not head["overwrite"]:
            raise refused(
                "name_taken",
                f"there is a checkpoint {head['name']!r} already ({there.id})",
                "/name",
                hint="use another name, or overwrite: true",
            )
        named = Named(head["name"], head["purpose"], head["ttl_s"], head["overwrite"], head["metadata"] or None)
        checkpoint_id = new_id("ckpt")
        facts = {
            "checkpoint_id": checkpoint_id,
            "name": head["name"],
            "purpose": head["purpose"],
            "step": self.place.step,
        }
        self.place.seq = row.seq
        self._save(named, checkpoint_id, Answered(row.id, pack(facts, {})))

    def load_checkpoint(self, request: Request, row: Logged) -> None:
        """The weights of a checkpoint of this project. Gradients that were not used yet are dropped."""
        checkpoint_id = request.head["checkpoint"]
        self._take(request.head)
        self.place.seq = row.seq
        self._save(Named(), new_id("ckpt"), Answered(row.id, pack({"checkpoint_id": checkpoint_id}, {})))
        self.end_saving()

    def _take(self, head: dict[str, Any]) -> None:
        """Raises InvalidRequest; everything is then as it was."""
        checkpoint_id, with_optimizer = head["checkpoint"], head["optimizer"]
        try:
            with there(self.tenure.store, self.tenure.job.project, checkpoint_id):
                folder = self._checkpoint(checkpoint_id, with_optimizer=with_optimizer)
                loaded = self._trained_from(Start(folder, folder if with_optimizer else None))
        except PolicyFailed as error:
            raise refused(error.code, error.failure.detail, "/checkpoint", hint=error.failure.hint) from error
        except NotFound as error:
            raise refused("checkpoint_not_found", error.detail, "/checkpoint") from error
        self.trainer.unload()
        self._trainer, self.place.gradient_from, self._changed = loaded, None, True

    def _checkpoint(self, checkpoint_id: str, *, with_optimizer: bool) -> Path:
        store = self.tenure.store
        try:
            with store.begin(readonly=True) as session:
                found = checkpoints.get(session, self.tenure.job.project, checkpoint_id)
            if with_optimizer and not found.has_optimizer:
                raise refused(
                    "no_optimizer_state",
                    f"{checkpoint_id} was saved to sample from, without the optimizer's state",
                    "/optimizer",
                    hint="optimizer: false starts the optimizer anew",
                )
            return verified(store, found)
        except CheckpointBroken as error:
            raise refused("checkpoint_broken", str(error), "/checkpoint") from error

    def finish(self, request: Request, row: Logged) -> None:
        """The last operation: what comes after it is not run any more."""
        checkpoint_id = new_id("ckpt")
        self._save(Named(), checkpoint_id, final=True)
        self.end_saving(raises=True)
        answered = Answered(row.id, pack({"checkpoint_id": checkpoint_id}, {}), began=self._began)
        self.tenure.finish({"ended": "finished", "steps": self.place.step}, answered)
        self.place.seq, self.ended = row.seq, True

    def sample(self, request: Request, row: Logged) -> None:
        """Answers of the weights as they are now."""
        if request.head["checkpoint"] is not None:
            detail = "a sample in order is of the session's own weights: checkpoint must be null"
            raise refused("invalid_request", detail, "/checkpoint")
        done = sample(self.trainer.learner, request, seed_of(request, self.spec.seed, row))
        self.tenure.meter.sampled(done.sampled)
        self._answer(row, Answered(row.id, done.answer))

    def eval(self, request: Request, row: Logged) -> None:
        """Answers of the weights as they are now, graded; the metrics are of the session's step.

        The first call samples, and `is_grading` from then on; the second one answers. A suspect does both at once.
        """
        if self._evaluation is None:
            seed = seed_of(request, self.spec.seed, row)
            self._evaluation = Evaluation(self.trainer.learner, request, seed, self.tenure.job.id)
            self.tenure.trace(row, Phase.GRADING)
            if not self._suspect:
                return
        evaluation, self._evaluation = self._evaluation, None
        done = evaluation.result()
        self.tenure.meter.sampled(done.sampled)
        known_metrics.check(done.metrics, "session", strict=self.tenure.settings.strict_metrics)
        self._answer(row, Answered(row.id, done.answer, metrics=done.metrics))

    @property
    def is_grading(self) -> bool:
        """The operation that was begun last is not answered yet: another process grades, and others may go on."""
        return self._evaluation is not None

    @property
    def is_ready(self) -> bool:
        """Whether `do` has something to do."""
        return self._evaluation is None or self._evaluation.done

    def close(self) -> None:
        """Nothing of it stays on the base, nor of what nobody has heard of."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        if self._saving is not None:
            self.tenure.drop(self._saving[0])
            self._saving = None
        if self._trainer is not None:
            self._trainer.unload()
            self._trainer = None


OTHERS: dict[str, Callable[[Session, Request, Logged], None]] = {
    "sample": Session.sample,
    "eval": Session.eval,
    "save_checkpoint": Session.save_checkpoint,
    "load_checkpoint": Session.load_checkpoint,
    "finish": Session.finish,
}
