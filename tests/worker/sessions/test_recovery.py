"""A worker that dies at any point: no gradient is lost, none is counted twice, the weights are the same to the bit."""

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from session_operations import FULL, LORA, forward_backward, loop, row, train_step

from service.store import checkpoints, clock
from workers.policy.learner import Learner
from workers.sessions.session import Session
from workers.tenure.tenure import Tenure

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
KILLED = -signal.SIGKILL
DROPOUT = {**LORA, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}}


def work_of_a_session() -> list[dict[str, Any]]:
    return [*loop(2), train_step(), *loop(2, first=2), forward_backward(row(20, 21, 22))]


def finish(rig: Any, *jobs: str) -> None:
    """The gradient that was still open is used."""
    for job in jobs:
        rig.send(job, {"kind": "optim_step", "optimizer": {"learning_rate": 1e-2}})
    rig.work()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


POINTS = ["before_answer:2", "after_answer:2", "inside_backward:2", "after_step:2", "replaying:1", "after_answer:3", "none"]


@pytest.mark.parametrize(
    ("database_url", "model"),
    [("sqlite", LORA), ("sqlite", FULL), ("sqlite", DROPOUT), ("postgresql", LORA)],
    ids=["sqlite-lora", "sqlite-full", "sqlite-dropout", "postgresql-lora"],
    indirect=["database_url"],
)
def test_killed_again_and_again_the_weights_are_the_same(
    rig: Any, run_killed: Callable[..., list[int]], model: dict[str, Any]
) -> None:
    limits = {"max_attempts": 50}
    disturbed = rig.session(model, limits=limits, checkpoints={"every_steps": 3})
    rig.send(disturbed, *work_of_a_session())
    ended = run_killed(*POINTS)
    assert ended == [KILLED] * (len(POINTS) - 1) + [0]
    quiet = rig.session(model, checkpoints={"every_steps": 3})
    rig.send(quiet, *work_of_a_session())
    finish(rig, disturbed, quiet)
    assert rig.job(disturbed).step == rig.job(quiet).step == 9
    assert same(rig.weights(disturbed), rig.weights(quiet))
    for seq in range(1, len(work_of_a_session()) + 2):
        assert rig.answer(disturbed, seq) == rig.answer(quiet, seq), seq


@SQLITE
def test_killed_with_answers_that_are_not_stored_yet(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    disturbed, quiet = (rig.session(limits={"max_attempts": 50}, checkpoints={"every_steps": 3}) for _ in range(2))
    rig.send(disturbed, *work_of_a_session())
    points = [
        "together/before_answer:1",
        "together/after_step:2",
        "together/after_answer:1",
        "together/before_answer:1",
        "none",
    ]
    assert run_killed(*points) == [KILLED] * 4 + [0]
    rig.send(quiet, *work_of_a_session())
    finish(rig, disturbed, quiet)
    assert same(rig.weights(disturbed), rig.weights(quiet))
    for seq in range(1, len(work_of_a_session()) + 2):
        assert rig.answer(disturbed, seq) == rig.answer(quiet, seq), seq


@SQLITE
@pytest.mark.parametrize("point", ["while_saving:1", "before_it_is_visible:1", "after_saving:1"])
def test_killed_around_a_snapshot(rig: Any, run_killed: Callable[..., list[int]], point: str) -> None:
    """A gradient that no step has taken yet outlives the snapshot."""
    operations = [*loop(2), forward_backward(row(20, 21, 22)), {"kind": "save_checkpoint", "name": "now"}]
    disturbed, quiet = rig.session(), None
    rig.send(disturbed, *operations)
    assert run_killed(point, "none") == [KILLED, 0]
    quiet = rig.session()
    rig.send(quiet, *operations)
    finish(rig, disturbed, quiet)
    assert same(rig.weights(disturbed), rig.weights(quiet))
    saved = rig.answer(disturbed, 8)["checkpoint_id"]
    assert same(rig.weights(disturbed, saved), rig.weights(quiet, rig.answer(quiet, 8)["checkpoint_id"]))


def saves_in_the_middle() -> list[dict[str, Any]]:
    return [*loop(2), forward_backward(row(20, 21, 22)), {"kind": "save_checkpoint", "name": "now"}, *loop(1, first=2)]


@pytest.mark.parametrize("purpose", ["training", "sampler"])
def test_killed_between_the_copy_and_the_disk_while_the_loop_went_on(
    rig: Any, run_killed: Callable[..., list[int]], purpose: str
) -> None:
    """What was saved is what the weights were then, though later operations were answered before it was durable."""
    disturbed, quiet = (rig.session(limits={"max_attempts": 50}) for _ in range(2))
    sent = [{**one, **({"purpose": purpose} if one["kind"] == "save_checkpoint" else {})} for one in saves_in_the_middle()]
    rig.send(disturbed, *sent)
    assert run_killed("held/after_answer:9") == [KILLED]
    assert [rig.operation(disturbed, seq).status for seq in (7, 8, 9, 10, 11)] == ["done", "waiting", "done", "done", "waiting"]
    assert rig.checkpoints(disturbed) == []
    assert run_killed("while_saving:1", "before_it_is_visible:1", "after_answer:1", "none") == [KILLED] * 3 + [0]
    rig.send(quiet, *sent)
    finish(rig, disturbed, quiet)
    assert same(rig.weights(disturbed), rig.weights(quiet))
    saved, undisturbed = (rig.answer(job, 8)["checkpoint_id"] for job in (disturbed, quiet))
    assert same(rig.weights(disturbed, saved), rig.weights(quiet, undisturbed))
    assert all(rig.answer(disturbed, seq) == rig.answer(quiet, seq) for seq in range(1, 12) if seq != 8)


@SQLITE
def test_a_checkpoint_that_kills_its_worker_fails_and_not_the_session(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    job = rig.session()
    rig.send(job, *saves_in_the_middle())
    assert run_killed("held/after_answer:9", "while_saving:1", "none") == [KILLED, KILLED, 0]
    assert rig.error(job, 8)["code"] == "operation_lost"
    assert rig.operation(job, 8).started_at is None  # nobody works on one that is given up
    assert [rig.operation(job, seq).status for seq in (7, 9, 10, 11)] == ["done"] * 4
    assert (rig.job(job).status, rig.job(job).step) == ("paused", 3)


@SQLITE
def test_the_loop_goes_on_while_a_checkpoint_is_written(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a disk that refuses one fails its operation only."""
    plain, order = Tenure._seal, list[str]()

    def slow(self: Tenure, folder: Path, contents: Any, **more: Any) -> Any:
        waited = [sleep(0.01) for _ in range(1000) if rig.operation(job, 9).status == "waiting"]
        order.append("written" if len(waited) < 1000 else "held up")
        if contents.step == 3:
            raise OSError(28, "no space left on device")
        return plain(self, folder, contents, **more)

    monkeypatch.setattr(Tenure, "_seal", slow)
    job, second = rig.session(), {"kind": "save_checkpoint", "name": "second"}
    rig.send(job, *loop(2), {"kind": "save_checkpoint", "name": "now"}, *loop(1, first=2), second, *loop(1, first=3))
    rig.work()
    assert order[0] == "written"
    assert rig.answer(job, 7)["step"] == 2
    assert (rig.error(job, 11)["code"], rig.error(job, 11)["category"]) == ("io_error", "server")
    assert [one.name for one in rig.checkpoints(job)] == [None, "now"]
    quiet = rig.session()
    rig.send(quiet, *loop(4))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))


@SQLITE
def test_killed_after_its_last_operation_it_ends_with_the_checkpoint_that_its_client_was_told(
    rig: Any, run_killed: Callable[..., list[int]]
) -> None:
    job = rig.session()
    rig.send(job, *loop(1), {"kind": "finish"})
    assert run_killed("before_settling:1", "none") == [KILLED, 0]
    told = rig.answer(job, 4)["checkpoint_id"]
    assert (rig.job(job).status, rig.job(job).checkpoint_id) == ("succeeded", told)
    assert [one.is_final for one in rig.checkpoints(job) if one.id == told] == [True]


@SQLITE
def test_a_build_that_replays_nothing_is_caught(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    """The negative control of the tests above."""
    disturbed = rig.session()
    rig.send(disturbed, *work_of_a_session())
    assert run_killed("after_answer:4", "wrong") == [KILLED, 0]
    quiet = rig.session()
    rig.send(quiet, *work_of_a_session())
    finish(rig, disturbed, quiet)
    assert not same(rig.weights(disturbed), rig.weights(quiet))


@SQLITE
def test_an_operation_that_kills_its_worker_fails_and_not_the_session(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    """Each attempt dies in the first operation that it runs (the third in order), until that one is given up."""
    job = rig.session()
    rig.send(job, *loop(2))
    ended = run_killed("in_operation:3", "in_operation:1", "none")
    assert ended == [KILLED, KILLED, 0]
    assert rig.error(job, 3) == {
        "code": "operation_lost",
        "detail": "the worker died each time it ran this operation; nothing of it was kept",
        "category": "server",
        "hint": "send less at once: it may not fit the worker's memory",
    }
    assert [rig.operation(job, seq).status for seq in (1, 2, 4, 5, 6)] == ["done"] * 5
    assert (rig.job(job).status, rig.job(job).crashes) == ("paused", 0)


@SQLITE
def test_an_operation_that_ran_beside_is_not_blamed(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    """The worker dies twice between operations: nobody's operation is given up."""
    job = rig.session()
    rig.send(job, *loop(2))
    assert run_killed("after_answer:2", "after_answer:1", "none") == [KILLED, KILLED, 0]
    assert [rig.operation(job, seq).status for seq in range(1, 7)] == ["done"] * 6


def tear(rig: Any, checkpoint: Any) -> None:
    next(rig.store.blobs.path(checkpoint.path).rglob("optimizer.safetensors")).write_bytes(b"torn")


def sample(tokens: int) -> dict[str, Any]:
    return {"kind": "sample", "prompts": [[5, 6, 7]], "sampling": {"max_tokens": tokens}}


@SQLITE
def test_a_sampler_that_answers_between_its_crashes_goes_on(rig: Any, run_killed: Callable[..., list[int]]) -> None:
    """Four crashes, each behind an answer, where three without one end it."""
    sampler = rig.sampler()
    for number in range(4):
        rig.send_loose(sampler, sample(2), lane=f"s{number}")
        assert run_killed("after_answer:1") == [KILLED]
        assert rig.answer(sampler, 1, f"s{number}")
        assert (rig.job(sampler).status, rig.job(sampler).crashes) == ("queued", 1)


@SQLITE
def test_a_sample_that_kills_its_worker_fails_though_others_are_answered(
    rig: Any, run_killed: Callable[..., list[int]]
) -> None:
    """The oldest is let in first; the process dies of it whenever it is."""
    sampler = rig.sampler()
    rig.send_loose(sampler, sample(2), lane="poison")
    assert run_killed("in_sample:1") == [KILLED]
    rig.send_loose(sampler, sample(2), lane="beside")
    assert run_killed("in_sample:1", "none") == [KILLED, 0]
    assert rig.error(sampler, 1, "poison")["code"] == "operation_lost"
    assert rig.answer(sampler, 1, "beside")
    assert (rig.job(sampler).status, rig.job(sampler).crashes) == ("paused", 0)


@SQLITE
@pytest.mark.parametrize("with_optimizer", [None, True, False], ids=["steps", "load", "load without optimizer"])
def test_a_broken_snapshot_is_replaced_by_the_one_before_and_the_log(rig: Any, with_optimizer: bool | None) -> None:
    job, quiet = (rig.session(checkpoints={"every_steps": 2}) for _ in range(2))
    for one in (job, quiet):
        rig.send(one, *loop(1), {"kind": "save_checkpoint", "name": "first"}, *loop(1, first=1))
        rig.work()
        if with_optimizer is None:
            rig.send(one, *loop(2, first=2), forward_backward(row(20, 21, 22)))
        else:
            first = rig.answer(one, 4)["checkpoint_id"]
            rig.send(one, forward_backward(row(20, 21)))
            rig.send(one, {"kind": "load_checkpoint", "checkpoint": first, "optimizer": with_optimizer})
        rig.work()
    newest, before = [checkpoint for checkpoint in rig.checkpoints(job) if checkpoint.name is None]
    tear(rig, newest)
    assert before.step < newest.step or with_optimizer is not None
    finish(rig, job, quiet)
    for one in (job, quiet):
        rig.send(one, *loop(1, first=5))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))
    assert rig.job(job).status == "paused"


@SQLITE
@pytest.mark.parametrize("name", [lambda step: {"name": "latest", "overwrite": True}, lambda step: {"name": f"s{step}"}])
def test_a_client_that_saves_at_each_step_has_snapshots_to_fall_back_to(rig: Any, name: Callable[[int], Any]) -> None:
    """Whether it overwrites one name or deletes what it saved before: what it names is no part of the session's own safety."""
    job, quiet = (rig.session(checkpoints={"every_steps": 2}) for _ in range(2))
    for one in (job, quiet):
        for step in range(5):
            rig.send(one, *loop(1, first=step), {"kind": "save_checkpoint", **name(step)})
        rig.work()
    newest, *_ = saved = rig.checkpoints(job)
    assert newest.name is not None and rig.job(job).checkpoint_id == newest.id
    tear(rig, newest)
    with rig.store.begin() as session:
        checkpoints.remove(session, [one.id for one in saved if one.name is not None], clock.now(session))
    for one in (job, quiet):
        rig.send(one, *loop(1, first=5))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))


@SQLITE
def test_after_a_fallback_the_broken_snapshot_goes_and_the_sound_one_stays(rig: Any) -> None:
    job, quiet = (rig.session(checkpoints={"every_steps": 3}) for _ in range(2))
    for one in (job, quiet):
        rig.send(one, *loop(4))
    rig.work()
    broken, before = rig.checkpoints(job)
    tear(rig, broken)
    for step in (4, 5):  # each time a snapshot is saved: the next must be replaceable, too
        for one in (job, quiet):
            rig.send(one, *loop(1, first=step))
        rig.work()
        newest, older = rig.checkpoints(job)
        assert older.id == before.id and newest.step == step + 1
        tear(rig, newest)
    rig.send(job, *loop(1, first=6))
    rig.send(quiet, *loop(1, first=6))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))


@SQLITE
def test_a_snapshot_that_cannot_be_copied_is_left_for_later(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk costs no operation anything: the log has everything, and nothing is loaded anew."""
    job, quiet = (rig.session(checkpoints={"every_steps": 2}) for _ in range(2))
    plain, full, loads = Learner.save, [3], list[str]()
    plain_load = Session._load

    def save(self: Learner, folder: Path, **how: Any) -> None:
        if full[0] and self.updates == full[0] - 1:
            full[0] = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, folder, **how)

    def load(self: Session) -> None:
        loads.append(self.tenure.job.id)
        plain_load(self)

    monkeypatch.setattr(Learner, "save", save)
    monkeypatch.setattr(Session, "_load", load)
    for one in (job, quiet):
        rig.send(one, *loop(5))
    rig.work()
    assert full == [0] and sorted(loads) == sorted([job, quiet])
    assert [checkpoint.step for checkpoint in rig.checkpoints(quiet)] == [5, 4]
    assert [checkpoint.step for checkpoint in rig.checkpoints(job)] == [5, 4]
    assert same(rig.weights(job), rig.weights(quiet))


@SQLITE
def test_broken_snapshots_without_their_log_fail_the_session(rig: Any) -> None:
    job = rig.session(checkpoints={"every_steps": 1, "keep_last": 3})
    rig.send(job, *loop(3))
    rig.work()
    for checkpoint in rig.checkpoints(job)[:2]:
        tear(rig, checkpoint)
    rig.send(job, *loop(1, first=3))
    rig.work()
    failed = rig.job(job)
    assert (failed.status, failed.error["code"]) == ("failed", "checkpoint_broken")
    assert rig.error(job, 10)["code"] == "session_over"


@SQLITE
def test_a_snapshot_that_is_torn_is_replaced_by_the_log(rig: Any) -> None:
    """Before its transaction there is no snapshot: the one before it and the log are enough."""
    job, quiet = rig.session(), rig.session()
    for one in (job, quiet):
        rig.send(one, *loop(3))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))
