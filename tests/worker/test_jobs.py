"""Whole jobs on real workers: what a job leaves behind, in what order jobs run, and that nothing is lost with a process."""

import asyncio
import json
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_chats import chat_model
from sqlalchemy import select, text, update

from service.jobs import lifecycle
from service.metric_names import METRICS, RESCORE_DIFFERENCE, STALENESS, WAITED_S
from service.relay.line import losses
from service.relay.orders import Answer, Order
from service.relay.queue import RequestQueue
from service.spec.job import EarlyStopping, SupervisedSpec
from service.spec.objective import ObjectiveSpec
from service.states import Phase, Status, is_legal
from service.store import metrics
from service.store.tables import Checkpoint, Event, Job, Metric, Rollout
from service.validation import parse
from workers.loops import managed
from workers.loops.progress import Progress
from workers.losses.batch import bytes_of

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def rows(stack: Any, query: Any) -> list[Any]:
    with stack.store.begin(readonly=True) as session:
        return list(session.scalars(query))


def assert_log_is_whole(stack: Any, job: Job) -> None:
    """Numbers without a gap, and a legal path through the states."""
    events = rows(stack, select(Event).where(Event.job_id == job.id).order_by(Event.seq))
    assert [event.seq for event in events] == list(range(1, job.last_event + 1))
    moves = [(event.data["from"], event.data["to"]) for event in events if event.type == "status_changed"]
    assert all(is_legal(Status(source), Status(target)) for source, target in moves)
    assert [source for source, _ in moves[1:]] == [target for _, target in moves[:-1]]
    assert moves[-1][1] == job.status


def assert_each_step_stands_once(stack: Any, job: Job, name: str, steps: range) -> None:
    found = rows(stack, select(Metric).where(Metric.job_id == job.id, Metric.name == name).order_by(Metric.step))
    assert [metric.step for metric in found] == list(steps)


def assert_same_weights(stack: Any, one: Job, other: Job) -> None:
    ours, theirs = stack.weights(one), stack.weights(other)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_job_trains_and_leaves_metrics_rollouts_events_and_checkpoints(stack: Any, specs: Any) -> None:
    stack.start_worker()
    job = stack.succeeded(stack.submit(specs.rl()).id)
    assert (job.step, job.status_reason, job.phase, job.lease_owner) == (6, "max_steps", None, None)
    assert job.result is not None and job.result["steps"] == 6
    assert set(job.result["final"]) >= {"eval/reward/mean", "eval/loss"}
    assert job.resolved["device"] == "cpu" and job.resolved["process"]["pid"] > 0
    assert_each_step_stands_once(stack, job, "reward/mean", range(1, 7))
    points = rows(stack, select(Metric).where(Metric.job_id == job.id, Metric.name == "eval/reward/mean"))
    assert sorted(point.step for point in points) == [0, 4, 6]
    ratios = rows(stack, select(Metric).where(Metric.job_id == job.id, Metric.name == "policy/ratio_max"))
    assert any(point.value != 1.0 for point in ratios), "several minibatches a rollout must move the ratio"
    groups = rows(stack, select(Rollout).where(Rollout.job_id == job.id, Rollout.split == "train", Rollout.step == 5))
    assert len(groups) == 4 and all(len(group.samples) == 4 for group in groups)
    assert {"text", "tokens", "finish_reason", "reward", "scores"} <= set(groups[0].samples[0])
    assert_told_by_token(stack, job, [sample for group in groups for sample in group.samples])
    kept = rows(stack, select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None)))
    assert sorted(row.step for row in kept) == [4, 6]
    assert_log_is_whole(stack, job)


def assert_told_by_token(stack: Any, job: Job, samples: list[dict[str, Any]]) -> None:
    """What is kept of single tokens is what the step's metrics were made of; all groups of the step are kept."""
    told = list[dict[str, Any]]()  # of the answers that could move the policy; the others do not go through it
    for sample in samples:
        tokens = sample["by_token"]
        assert {len(column) for column in tokens.values()} == {sample["tokens"]}
        assert "".join(tokens["text"]).replace("<unk>", "").startswith(sample["text"])
        if sample["advantage"] == 0:
            assert set(tokens["log_probs"]) == set(tokens["ratio"]) == set(tokens["clipped"]) == {None}
            continue
        told.append(tokens)
        moved = [new - old for new, old in zip(tokens["log_probs"], tokens["old_log_probs"], strict=True)]
        assert tokens["ratio"] == pytest.approx([math.exp(fmean(moved))] * len(moved), rel=1e-3)  # gspo's: of the sequence
    points = {one.name: one.value for one in rows(stack, select(Metric).where(Metric.job_id == job.id, Metric.step == 5))}
    assert fmean(abs(sample["advantage"]) for sample in samples) == pytest.approx(points["advantage/abs_mean"], rel=1e-3)
    clipped = [name for tokens in told for name in tokens["clipped"]]
    for name in ("low", "high"):
        assert clipped.count(name) / len(clipped) == pytest.approx(points[f"policy/clip_fraction_{name}"])


@pytest.mark.parametrize("kind", ["rl", "supervised"])
def test_a_job_writes_every_metric_that_the_table_names_for_its_kind_and_no_other(shared: Any, specs: Any, kind: str) -> None:
    length = {"kind": "length", "name": "short", "max_tokens": 2, "weight": 0.5}
    sections = {
        "model": {**specs.rl()["model"], "dtype": "bfloat16"},
        "data": {**specs.rl()["data"], "eval": {"source": "split", "rows": 4}, "overlong": "skip"},
        "reward": {"graders": [*specs.rl()["reward"]["graders"], length]},
        "eval": {"every_steps": 1, "temperature": 1.0, "also_greedy": True, "max_completion_tokens": 4},
        "limits": {"max_steps": 1},
    }
    objective = {"preset": "gspo", "kl": {"place": "loss", "coef": 0.01}, "correct": "truncate"}
    spec = specs.rl(**sections, objective=objective) if kind == "rl" else specs.supervised(**sections)
    job = shared.succeeded(shared.submit(spec).id)
    with shared.store.begin(readonly=True) as session:
        written = metrics.names(session, job.id)
    graders = ["similarity", "short"]
    named = {name for one in METRICS if kind in one.of for name in one.names(graders)}
    assert written == sorted(named - {RESCORE_DIFFERENCE, STALENESS, WAITED_S})  # test_rescore.py, test_vllm.py


@SQLITE
def test_a_job_that_an_older_version_stored_is_read_as_this_one_reads_it(stack: Any, specs: Any) -> None:
    """`cispo` had one number for each bound, and `correct` had no floor."""
    job = stack.submit(specs.rl(objective={"preset": "cispo"}, limits={"max_steps": 2}))
    with stack.store.begin() as session:
        kept = session.get(Job, job.id)
        objective = deepcopy(kept.spec["objective"])
        objective["surrogate"] = {"kind": "cispo", "weight_min": 0.0, "weight_max": 5.0}
        del objective["correct"]["floor"], objective["correct"]["mask_level"]
        kept.spec = {**kept.spec, "objective": objective}
    stack.start_worker()
    assert stack.succeeded(job.id).step == 2


def test_a_supervised_job_learns_and_an_rl_job_starts_from_its_checkpoint(shared: Any, specs: Any) -> None:
    data = {**specs.supervised()["data"], "eval": {"source": "split", "rows": 20}}
    warm = shared.succeeded(shared.submit(specs.supervised(data=data, limits={"max_steps": 40}, eval={"every_steps": 20})).id)
    assert warm.result is not None
    assert warm.result["final"]["eval/loss"] < 0.8 * warm.result["initial"]["eval/loss"]
    job = shared.succeeded(shared.submit(specs.rl(model={"from_checkpoint": warm.checkpoint_id}, limits={"max_steps": 1})).id)
    assert job.result is not None
    assert job.from_checkpoint_id == warm.checkpoint_id
    assert job.result["initial"]["eval/loss"] < 0.8 * warm.result["initial"]["eval/loss"]


@pytest.mark.parametrize("learn", ["last", "all"])
def test_the_turns_of_a_chat_are_learnt_and_then_said(shared: Any, specs: Any, tmp_path: Path, learn: str) -> None:
    """The model reads the chat through its template, and ends its turn as that ends one."""
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    source = {"source": "inline", "rows": [{"messages": talk}, {"messages": talk[:2]}]}
    spec = specs.supervised(
        model={"source": chat_model(tmp_path / "model"), "adapter": {"kind": "full"}},
        data={"train": source, "eval": {**source, "rows": [{"messages": talk}]}, "chat": "messages", "learn": learn},
        reward={"graders": [{"kind": "exact", "reference": "two"}]},
        optimizer={"learning_rate": 1e-2},
        update={"batch_size": 2},
        limits={"max_steps": 60},
        eval={"every_steps": 60, "max_completion_tokens": 8},
    )
    job = shared.succeeded(shared.submit(spec).id)
    assert job.result is not None
    assert job.result["final"]["eval/loss"] < 0.1 < job.result["initial"]["eval/loss"]
    assert job.result["final"]["eval/reward/mean"] == 1
    trained = rows(shared, select(Metric).where(Metric.job_id == job.id, Metric.name == "tokens/trained"))
    (tokens,) = {point.value for point in trained}
    assert tokens == {"last": 4 + 4, "all": 2 * 4 + 4}[learn], "each turn of three letters and its end"


def test_a_job_whose_child_was_killed_resumes_and_ends_with_the_same_weights(shared: Any, specs: Any) -> None:
    undisturbed_id = shared.submit(specs.rl(limits={"max_steps": 14})).id
    undisturbed = shared.succeeded(undisturbed_id)
    job_id = shared.submit(specs.rl(limits={"max_steps": 14})).id
    for step in (3, 9):
        killed_at = shared.until(job_id, lambda job, step=step: job.status == "running" and job.step >= step)
        pid = killed_at.resolved["process"]["pid"]
        os.kill(pid, signal.SIGKILL)
        shared.until(job_id, lambda job, pid=pid: job.resolved["process"]["pid"] != pid)
    job = shared.succeeded(job_id)
    assert job.attempt == 3
    assert_same_weights(shared, job, undisturbed)
    assert_each_step_stands_once(shared, job, "reward/mean", range(1, 15))
    assert_log_is_whole(shared, job)


@SQLITE
def test_a_killed_worker_leaves_its_job_to_the_next_one(stack: Any, specs: Any) -> None:
    worker = stack.start_worker(RATCHET_LEASE_TTL_S="4", RATCHET_LEASE_SELF_STOP_S="3", RATCHET_LEASE_RENEW_S="1")
    job_id = stack.submit(specs.rl(limits={"max_steps": 40})).id
    child = stack.until(job_id, lambda job: job.step >= 3).resolved["process"]["pid"]
    worker.kill()
    worker.wait()
    stack.start_worker()
    job = stack.succeeded(job_id)
    assert job.attempt == 2
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert_log_is_whole(stack, job)


@SQLITE
def test_a_stopped_worker_saves_and_hands_over_and_nothing_changes(stack: Any, specs: Any) -> None:
    worker = stack.start_worker()
    undisturbed = stack.succeeded(stack.submit(specs.rl(limits={"max_steps": 30}, checkpoints={"every_steps": 100})).id)
    job_id = stack.submit(specs.rl(limits={"max_steps": 30}, checkpoints={"every_steps": 100})).id
    stack.until(job_id, lambda job: job.step >= 3)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    drained = stack.job(job_id)
    assert (drained.status, drained.status_reason, drained.crashes) == ("queued", "drained", 0)
    assert drained.checkpoint_id is not None
    stack.start_worker()
    assert_same_weights(stack, stack.succeeded(job_id), undisturbed)


def test_paused_and_resumed_equals_undisturbed(shared: Any, specs: Any) -> None:
    spec = specs.rl(limits={"max_steps": 24}, checkpoints={"every_steps": 100})
    undisturbed = shared.succeeded(shared.submit(spec).id)
    job_id = shared.submit(spec).id
    shared.until(job_id, lambda job: job.step >= 2)
    lifecycle.pause(shared.store, shared.doorbell, "default", job_id)
    paused = shared.until(job_id, lambda job: job.status == "paused", timeout_s=10)
    assert 2 <= paused.step < 24
    lifecycle.resume(shared.store, shared.doorbell, "default", job_id)
    job = shared.succeeded(job_id)
    assert_same_weights(shared, job, undisturbed)
    assert_log_is_whole(shared, job)


@SQLITE
def test_a_stored_spec_that_this_version_refuses_fails_its_job_by_name(stack: Any, specs: Any) -> None:
    job = stack.submit(specs.rl())
    older = deepcopy(job.spec)
    older["reward"]["graders"][0]["name"] = "mean"  # taken once; it overwrote the metric reward/mean
    with stack.store.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(spec=older))
    stack.start_worker()
    failed = stack.finished(job.id)
    assert (failed.status, failed.attempt, failed.error["code"]) == ("failed", 1, "invalid_request")
    assert failed.error["pointer"] == "/reward/graders/0/name" and "mean" in failed.error["detail"]


def test_a_running_job_is_cancelled_within_a_step(shared: Any, specs: Any) -> None:
    job_id = shared.submit(specs.rl(limits={"max_steps": 500})).id
    shared.until(job_id, lambda job: job.step >= 2)
    lifecycle.cancel(shared.store, shared.doorbell, "default", job_id)
    job = shared.until(job_id, lambda job: job.status == "cancelled", timeout_s=10)
    assert job.checkpoint_id is not None, "what was done so far is kept"
    assert_log_is_whole(shared, job)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_drops_its_connections_costs_at_most_a_retry(stack: Any, specs: Any) -> None:
    stack.start_worker()
    job_id = stack.submit(specs.rl(limits={"max_steps": 60})).id
    for step in (5, 30):
        stack.until(job_id, lambda job, step=step: job.step >= step)
        with stack.store.begin() as session:
            dropped = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            dropped += "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            assert session.scalar(text(dropped)) > 0
    job = stack.succeeded(job_id)
    assert job.crashes == 0
    assert_each_step_stands_once(stack, job, "reward/mean", range(1, 61))
    assert_log_is_whole(stack, job)


@SQLITE
def test_two_jobs_run_one_after_the_other_on_one_worker_and_side_by_side_on_two(stack: Any, specs: Any) -> None:
    first, second = (stack.submit(specs.rl(limits={"max_steps": 25})).id for _ in range(2))
    assert stack.job(first).status == "queued", "no worker lives yet"
    stack.start_worker()
    one, two = stack.succeeded(first), stack.succeeded(second)
    assert one.finished_at <= two.started_at
    stack.start_worker()
    stack.until(first, lambda _: stack.workers_alive() == 2)
    # Long ones: the second worker may still be loading torch when it is rung.
    long = specs.rl(limits={"max_steps": 5000}, checkpoints={"every_steps": 5000})
    third, fourth = (stack.submit(long).id for _ in range(2))
    for job_id in (third, fourth):
        stack.until(job_id, lambda job: job.status == "running" and job.step >= 1)
    assert {stack.job(job_id).status for job_id in (third, fourth)} == {"running"}
    assert len({stack.job(job_id).resolved["process"]["pid"] for job_id in (third, fourth)}) == 2


def test_a_job_ends_early_at_its_target(shared: Any, specs: Any) -> None:
    spec = specs.rl(early_stopping={"target": -1.0}, eval={"every_steps": 2}, limits={"max_steps": 50})
    job = shared.succeeded(shared.submit(spec).id)
    assert (job.step, job.status_reason) == (0, "target_reached")


def test_what_cannot_go_on_fails_with_a_named_code_a_hint_and_its_last_log_lines(
    shared: Any, specs: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    job = shared.finished(shared.submit(specs.rl(model={"source": str(tmp_path)})).id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "model_unsupported"
    assert job.error["hint"] and (job.error["category"], job.error["phase"], job.error["attempt"]) == ("user", "loading", 1)
    assert "attempt 1 starts" in job.error["log_tail"][0]
    assert f"job {job.id} failed" in job.error["log_tail"][-1]


def test_a_reward_service_that_is_down_pauses_the_job_which_goes_on_when_it_is_up(shared: Any, specs: Any) -> None:
    """The port answers when the job is resumed, and the weights are those of a job whose service was never down."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    grader = {"kind": "http", "url": f"http://127.0.0.1:{port}/", "max_retries": 0}
    spec = specs.rl(reward={"graders": [grader]}, limits={"max_steps": 4}, checkpoints={"every_steps": 100})
    del spec["data"]["eval"]
    job_id = shared.submit(spec).id
    with reward_service(port, until=2 * 16):
        shared.until(job_id, lambda job: job.step == 2)
        paused = shared.until(job_id, lambda job: job.status == "paused")
    assert (paused.status_reason, paused.error["code"], paused.error["phase"]) == ("grader_unhealthy",) * 2 + ("grading",)
    assert (paused.step, paused.retries, paused.crashes) == (2, 0, 0)
    with reward_service(port):
        lifecycle.resume(shared.store, shared.doorbell, "default", job_id)
        job = shared.succeeded(job_id)
        assert job.error is None
        assert_same_weights(shared, job, shared.succeeded(shared.submit(spec).id))
    assert_each_step_stands_once(shared, job, "reward/mean", range(1, 5))
    assert_log_is_whole(shared, job)


@pytest.mark.parametrize("on_error", ["mask", "fail"])
def test_a_failure_in_an_evaluation_loses_no_step_that_is_whole(shared: Any, specs: Any, on_error: str) -> None:
    """The service dies between the second step and its evaluation. Both steps are saved, and the evaluation is made up for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    grader = {"kind": "http", "url": f"http://127.0.0.1:{port}/", "max_retries": 0}
    spec = specs.rl(
        reward={"graders": [grader], "on_error": on_error},
        eval={"every_steps": 2, "temperature": 1.0},
        limits={"max_steps": 4},
        checkpoints={"every_steps": 100},
    )
    job_id = shared.submit(spec).id
    with reward_service(port, until=16 + 2 * 16, then="down" if on_error == "mask" else "refuses"):
        ended = shared.until(job_id, lambda job: job.status in ("paused", "failed"))
    assert (ended.status, ended.step) == ("paused" if on_error == "mask" else "failed", 2)
    kept = rows(shared, select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None)))
    assert [row.step for row in kept] == [2] and ended.checkpoint_id == kept[0].id
    assert_each_step_stands_once(shared, ended, "reward/mean", range(1, 3))
    if ended.status == "failed":
        return
    with reward_service(port):
        lifecycle.resume(shared.store, shared.doorbell, "default", job_id)
        job = shared.succeeded(job_id)
        undisturbed = shared.succeeded(shared.submit(spec).id)
    assert_same_weights(shared, job, undisturbed)
    for each in (job, undisturbed):
        points = rows(shared, select(Metric).where(Metric.job_id == each.id, Metric.name == "eval/reward/mean"))
        assert sorted(point.step for point in points) == [0, 2, 4]
    assert job.result == undisturbed.result
    assert_log_is_whole(shared, job)


def test_a_step_whose_updates_had_begun_is_not_saved(shared: Any, specs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are neither those before it nor those after it."""
    attempt: Any = SimpleNamespace(
        progress=SimpleNamespace(step=3), policy=SimpleNamespace(updates=7), tenure=SimpleNamespace(phase=Phase.UPDATING)
    )
    saved: list[int] = []
    attempt.tenure.blame = lambda phase: None
    monkeypatch.setattr(managed, "_save", lambda attempt: saved.append(attempt.progress.step))

    def fails(updates: int) -> None:
        with managed._saving(attempt):
            attempt.policy.updates += updates
            raise MemoryError

    with pytest.raises(MemoryError):
        fails(updates=1)
    assert saved == []
    with pytest.raises(MemoryError):
        fails(updates=0)
    assert saved == [3]


def test_a_best_that_is_saved_on_schedule_is_remembered(specs: Any) -> None:
    """Or a later evaluation that is worse would pass for a new best."""
    spec = parse(SupervisedSpec, specs.supervised(checkpoints={"every_steps": 4, "keep_best": {}}, data=specs.rl()["data"]))
    attempt: Any = SimpleNamespace(progress=Progress(), spec=spec)
    saved = []
    for step, reward in ((2, 0.1), (4, 0.9), (6, 0.5), (7, None), (8, 0.2), (10, 0.95)):
        attempt.progress.step = step
        attempt.progress.last = {} if reward is None else {"eval/reward/mean": reward}
        if managed._is_to_be_saved(attempt, evaluated=reward is not None):
            saved.append(step)
    assert saved == [2, 4, 8, 10]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_an_evaluation_that_is_no_number_is_no_best_and_hides_no_later_one(mode: str) -> None:
    rule = EarlyStopping(metric="eval/loss", mode="max" if mode == "max" else "min", patience=2)
    progress, nan, inf = Progress(), float("nan"), float("inf")
    for step, value in enumerate((nan, 2.0, inf, -inf), 1):
        progress.step = step
        progress.evaluated(step, {"eval/loss": value}, rule)
        assert progress.reason_to_stop(rule) == (None if step < 4 else "no_improvement")
    assert (progress.best, progress.best_step) == (2.0, 2)


def test_a_new_best_is_saved_when_it_is_found_and_early_stopping_keeps_it(shared: Any, specs: Any) -> None:
    """No save falls on an evaluation but the last one's; what learns too fast gets worse again."""
    stop = {"metric": "eval/loss", "mode": "min", "patience": 3}
    data = {**specs.supervised()["data"], "eval": {"source": "split", "rows": 40}}
    spec = specs.supervised(
        data=data,
        early_stopping=stop,
        eval={"every_steps": 5},
        checkpoints={"every_steps": 7, "keep_last": 1},
        optimizer={"learning_rate": 0.05},
        limits={"max_steps": 400},
    )
    job = shared.succeeded(shared.submit(spec).id)
    assert job.status_reason == "no_improvement" and job.result is not None
    losses = rows(shared, select(Metric).where(Metric.job_id == job.id, Metric.name == "eval/loss"))
    least = min(losses, key=lambda point: point.value)
    best = job.result["best"]
    assert (best["metric"], best["value"], best["step"]) == ("eval/loss", least.value, least.step)
    there = rows(shared, select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None)))
    kept = {row.id: row.step for row in there}
    assert kept == {best["checkpoint_id"]: least.step, job.checkpoint_id: job.step} and least.step < job.step


@contextmanager
def reward_service(port: int, until: int | None = None, *, then: str = "down") -> Iterator[None]:
    """Rewards even lengths; after `until` samples it answers 500, or (refuses) an error for each sample."""
    graded = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal graded
            samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
            up = until is None or graded + len(samples) <= until
            graded += len(samples)
            body = json.dumps({"rewards": [float(len(one["completion"]) % 2 == 0) for one in samples]}).encode()
            if not up and then == "refuses":
                up, body = True, json.dumps({"rewards": [{"error": "no"} for _ in samples]}).encode()
            self.send_response(200 if up else 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield
        server.shutdown()


async def loss_of_one_token(stack: Any, log_prob: float, timeout_s: float) -> float:
    """As the API asks for it: an order in the queue, a ring, an answer."""
    queue, deadline = RequestQueue(stack.settings, losses(stack.settings)), time.time() + timeout_s
    item = {"index": 0, "objective": ObjectiveSpec(preset="cross_entropy").resolve(), "dtype": "float64", "layout": "padded"}
    item |= {"return": [], "on_nonfinite": "refuse", "on_singleton": "refuse", "seed": 0, "warnings": []}
    tensors = {"0/log_probs": bytes_of(torch.tensor([[log_prob]], dtype=torch.float64))}
    order = Order(f"loss_{deadline}", "default", deadline, False, [item], tensors)
    try:
        if await queue.push("default", order.id, order.encode(), deadline):
            stack.doorbell.ring_losses()
        while (raw := (await queue.standing("default", order.id)).answer) is None:
            assert time.time() < deadline, stack.logs()
            await asyncio.sleep(0.02)
        return Answer.decode(raw).data[0]["loss"]
    finally:
        await queue.close()


def test_a_worker_for_everything_answers_losses_between_its_jobs(shared: Any, specs: Any) -> None:
    job_id = shared.submit(specs.rl(limits={"max_steps": 8})).id
    shared.until(job_id, lambda job: job.step >= 1)
    assert asyncio.run(loss_of_one_token(shared, -1.5, timeout_s=60)) == 1.5
    assert shared.job(job_id).status == "succeeded"  # its turn came when the job was over
    assert asyncio.run(loss_of_one_token(shared, -2.5, timeout_s=10)) == 2.5
    shared.succeeded(shared.submit(specs.rl(limits={"max_steps": 1})).id)
