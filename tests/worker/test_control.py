"""Pause and cancel of jobs whose training process does not obey, stalls, deadlines: with real workers and real signals."""

import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from service.jobs import lifecycle
from service.local.worker import is_alive
from service.store import checkpoints, metrics, usage
from service.store.tables import Event, Job, Rollout


@pytest.fixture
def deaf() -> Iterator[dict[str, Any]]:
    """A grader whose service takes connections and never answers: the training process waits in it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        yield {"graders": [{"kind": "http", "url": url, "timeout_s": 300, "max_retries": 0}]}


def no_eval(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "data": {name: value for name, value in spec["data"].items() if name != "eval"}}


def told(stack: Any, job_id: str, type_: str) -> list[dict[str, Any]]:
    with stack.store.begin(readonly=True) as session:
        query = select(Event).where(Event.job_id == job_id, Event.type == type_).order_by(Event.seq)
        return [event.data for event in session.scalars(query)]


def is_gone(pid: int) -> bool:
    """Celery's pool may leave a dead child unreaped for five seconds: it runs no more, and holds nothing."""
    deadline = time.monotonic() + 5
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def freeze(pid: int, database: Path) -> None:
    """Not in the middle of a write, with which it would hold up everybody who has the same SQLite file."""
    deadline = time.monotonic() + 10
    while True:
        os.kill(pid, signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(database, timeout=0.2, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                return
        except sqlite3.OperationalError:
            assert time.monotonic() < deadline
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)


@pytest.mark.parametrize(("action", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_training_process_that_does_not_obey_is_killed_and_its_job_settled(
    shared: Any, specs: Any, deaf: dict[str, Any], action: str, status: str
) -> None:
    job_id = shared.submit(no_eval(specs.rl(reward=deaf))).id
    child = shared.until(job_id, lambda job: job.phase == "grading").resolved["process"]["pid"]
    getattr(lifecycle, action)(shared.store, shared.doorbell, "default", job_id, grace_s=1.0)
    asked = time.monotonic()
    job = shared.until(job_id, lambda job: job.status == status, timeout_s=30)
    assert time.monotonic() - asked < 20
    assert (job.status_reason, job.crashes, job.retries, job.lease_owner) == ("unresponsive", 0, 0, None)
    assert told(shared, job_id, "failure")[-1]["code"] == "unresponsive"
    assert is_gone(child)
    if action == "pause":
        lifecycle.cancel(shared.store, shared.doorbell, "default", job_id)
    shared.succeeded(shared.submit(no_eval(specs.rl(limits={"max_steps": 1}))).id)  # the worker has a new process


def test_a_frozen_training_process_is_killed_and_what_was_saved_is_kept(shared: Any, specs: Any) -> None:
    job_id = shared.submit(specs.rl(limits={"max_steps": 5000})).id
    child = shared.until(job_id, lambda job: job.checkpoint_id is not None).resolved["process"]["pid"]
    freeze(child, shared.settings.data_dir / "ratchet.db")
    lifecycle.pause(shared.store, shared.doorbell, "default", job_id, grace_s=60.0)
    lifecycle.pause(shared.store, shared.doorbell, "default", job_id, grace_s=0.5)  # asked again with less patience
    paused = shared.until(job_id, lambda job: job.status == "paused", timeout_s=30)
    assert is_gone(child) and paused.checkpoint_id is not None
    lifecycle.resume(shared.store, shared.doorbell, "default", job_id)
    shared.until(job_id, lambda job: job.status == "running" and job.step > paused.step)
    lifecycle.cancel(shared.store, shared.doorbell, "default", job_id)
    shared.finished(job_id)


def test_a_cancelled_job_saves_its_last_step_if_asked_to(shared: Any, specs: Any) -> None:
    saved = {}
    for save in (True, False):
        job_id = shared.submit(specs.rl(limits={"max_steps": 5000}, checkpoints={"every_steps": 5000})).id
        shared.until(job_id, lambda job: job.step >= 2)
        lifecycle.cancel(shared.store, shared.doorbell, "default", job_id, save=save)
        job = shared.finished(job_id)
        assert (job.status, job.error) == ("cancelled", None)
        saved[save] = job.checkpoint_id
    assert saved[True] is not None and saved[False] is None


def test_a_job_that_makes_no_progress_is_given_up_by_name(shared: Any, specs: Any, deaf: dict[str, Any]) -> None:
    limits = {"max_steps": 2, "stall_timeout_s": 1.5, "max_attempts": 1}
    job = shared.finished(shared.submit(no_eval(specs.rl(reward=deaf, limits=limits))).id)
    assert (job.status, job.status_reason, job.crashes) == ("failed", "stalled", 0)
    assert (job.error["category"], job.error["retryable"], job.error["phase"]) == ("infra", True, "grading")
    assert "loaded at step 0" in "".join(job.error["log_tail"])


@pytest.mark.parametrize("limit", ["deadline", "max_runtime"])
def test_a_running_job_that_is_out_of_time_is_saved_and_ends(shared: Any, specs: Any, limit: str) -> None:
    limits = {"max_steps": 100_000, f"{limit}_s": 3600}
    job_id = shared.submit(specs.rl(limits=limits, checkpoints={"every_steps": 100_000})).id
    shared.until(job_id, lambda job: job.step >= 2)
    lifecycle.pause(shared.store, shared.doorbell, "default", job_id)
    paused = shared.until(job_id, lambda job: job.status == "paused")
    with shared.store.begin() as session:  # an hour passes, in which it ran
        late = {"deadline_at": paused.created_at} if limit == "deadline" else {"run_s": 3600.0}
        session.execute(update(Job).where(Job.id == job_id).values(**late, status="queued", status_reason="test"))
    shared.doorbell.ring(job_id, "any")
    job = shared.finished(job_id)
    assert (job.status, job.status_reason) == ("failed", limit)
    assert job.checkpoint_id is not None


def test_a_sample_that_cannot_be_graded_is_masked_and_reported(shared: Any, specs: Any) -> None:
    """Every answer contains an empty reference: those rows cannot be graded."""
    spec = no_eval(specs.rl(limits={"max_steps": 2}, log_rollouts={"every_steps": 1, "groups": 4}))
    spec["reward"] = {"graders": [{"kind": "contains", "reference": "{a}"}], "on_error": "mask", "max_error_rate": 1.0}
    rows = [{"q": str(n), "a": "" if n % 4 == 0 else str(n)} for n in range(8)]
    spec["data"] = {**spec["data"], "train": {"source": "inline", "rows": rows, "shuffle": False}}
    job = shared.succeeded(shared.submit(spec).id)
    assert job.step == 2
    for event in told(shared, job.id, "reward_errors"):
        assert (event["count"], event["samples"], len(event["failed"])) == (4, 16, 4)
        assert {one["group"] for one in event["failed"]} == {0}
        assert "empty" in event["failed"][0]["errors"]["contains"]
    assert len(told(shared, job.id, "reward_errors")) == 2
    with shared.store.begin(readonly=True) as session:
        groups = list(session.scalars(select(Rollout).where(Rollout.job_id == job.id, Rollout.step == 1)))
    assert {sample["reward"] is None for group in groups if group.reference == "" for sample in group.samples} == {True}
    assert {sample["reward"] is None for group in groups if group.reference != "" for sample in group.samples} == {False}


def test_a_job_rests_when_its_budget_is_spent_and_the_ledger_agrees_with_its_steps(shared: Any, specs: Any) -> None:
    spec = specs.rl(limits={"max_steps": 8, "budget": {"tokens": 150}}, checkpoints={"every_steps": 100})
    job_id = shared.submit(spec).id
    paused = shared.until(job_id, lambda job: job.status == "paused")
    assert (paused.status_reason, paused.error) == ("budget_spent", None)
    assert 0 < paused.step < 8 and paused.checkpoint_id is not None
    lifecycle.resume(shared.store, shared.doorbell, "default", job_id, budget={"tokens": None})
    job = shared.succeeded(job_id)
    with shared.store.begin(readonly=True) as session:
        spent = usage.of_job(session, job_id)
        curves = metrics.series(session, job_id, ["tokens/sampled", "tokens/trained"])
    assert spent.attempts == 2
    assert spent.trained_tokens == sum(value or 0 for value in curves["tokens/trained"].value)
    assert spent.sampled_tokens > sum(value or 0 for value in curves["tokens/sampled"].value), "evaluations sample, too"
    assert (spent.wasted_sampled_tokens, spent.wasted_trained_tokens) == (0, 0)
    assert spent.worker_s == pytest.approx(job.run_s, abs=0.1)
    assert all(spent.phase_s[phase] > 0 for phase in ("loading", "sampling", "grading", "updating", "saving"))


@pytest.mark.parametrize("broken", ["newest", "all"])
def test_what_a_broken_checkpoint_costs_is_wasted_to_the_token(shared: Any, specs: Any, broken: str) -> None:
    """With its evaluations: what was spent less what was wasted is what an undisturbed run spends."""
    spec = specs.rl(limits={"max_steps": 8}, eval={"every_steps": 2}, checkpoints={"every_steps": 2})
    undisturbed = shared.submit(spec).id
    job_id = shared.submit(spec | {"limits": {"max_steps": 8, "budget": {"tokens": 700}}}).id
    paused = shared.until(job_id, lambda job: job.status == "paused")
    with shared.store.begin(readonly=True) as session:
        saved = checkpoints.of_job(session, job_id)
    assert saved[0].step == paused.step > 2 and len(saved) > 1
    for row in saved if broken == "all" else saved[:1]:
        with next(shared.store.blobs.path(row.path).rglob("*.safetensors")).open("r+b") as file:
            file.truncate(100)
    lifecycle.resume(shared.store, shared.doorbell, "default", job_id, budget={"tokens": None})
    shared.succeeded(job_id)
    shared.succeeded(undisturbed)
    with shared.store.begin(readonly=True) as session:
        spent, calm = usage.of_job(session, job_id), usage.of_job(session, undisturbed)
    assert (calm.wasted_sampled_tokens, calm.wasted_trained_tokens) == (0, 0)
    assert spent.wasted_sampled_tokens > 0
    assert spent.sampled_tokens - spent.wasted_sampled_tokens == calm.sampled_tokens
    assert spent.trained_tokens - spent.wasted_trained_tokens == calm.trained_tokens
