"""Jobs on two ranks (processes, for want of GPUs): equal to one rank, and to themselves after a death; nothing is left over."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from service.doorbell import class_of
from service.errors import InvalidRequest
from service.ids import utcnow
from service.jobs.reconciler import reconcile
from service.spec.session import SessionSpec
from service.store.tables import Job, Metric, Worker
from service.validation import parse
from workers.identity import resource_classes

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
LOSSES = ("policy/loss", "optimizer/grad_norm", "eval/loss", "reward/mean")


def followers(stack: Any) -> list[int]:
    """The ranks that the stack's worker has started."""
    found, looked_at = list[int](), [stack.workers[0].pid]
    while looked_at:
        pid = looked_at.pop()
        with suppress(OSError):
            if b"workers.ranks.follower" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
            for thread in Path(f"/proc/{pid}/task").iterdir():
                looked_at += map(int, (thread / "children").read_text().split())
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def ended(pids: list[int], within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(runs, pids))


def curves(stack: Any, job: Job) -> list[tuple[str, int, float]]:
    with stack.store.begin(readonly=True) as session:
        points = session.execute(select(Metric.name, Metric.step, Metric.value).where(Metric.job_id == job.id)).all()
    return sorted((name, step, value) for name, step, value in points if name in LOSSES)


@pytest.mark.timeout(300)
@SQLITE
@pytest.mark.parametrize(("sharding", "dies"), [("optimizer", "the first"), ("full", "the other")])
def test_a_job_on_two_ranks_is_like_one_on_one_rank_and_comes_through_the_death_of_either(
    stack: Any, specs: Any, sharding: str, dies: str
) -> None:
    def submit(gpus: int, **sharding: str) -> Job:
        sections = {
            "objective": {"preset": "gspo", "kl": {"place": "loss", "coef": 0.01}},
            # One that tells answers apart from the first step on: a gradient of rounding alone (all rewards equal, no KL yet)
            # would be a step of full length to Adam, in any direction.
            "reward": {"graders": [{"kind": "regex", "pattern": "[0-9]"}]},
            "limits": {"max_steps": 16},
            "resources": {"gpus": gpus, **sharding},
        }
        return stack.submit(specs.rl(**sections))

    stack.start_worker(RATCHET_GPUS_PER_JOB="2")
    one, two = (stack.succeeded(job.id) for job in (submit(1), submit(2, sharding=sharding)))
    assert (two.resolved["ranks"], two.resolved["sharding"]) == (2, sharding) and two.resource_class == "any:2"
    ours, theirs = curves(stack, one), curves(stack, two)
    assert [point[:2] for point in ours] == [point[:2] for point in theirs] and len(ours) > 50
    assert [point[2] for point in theirs] == pytest.approx([point[2] for point in ours], abs=1e-5)
    weights = stack.weights(two)
    torch.testing.assert_close(weights, stack.weights(one), atol=1e-5, rtol=0)

    # Each rank with all of the optimizer's state gives the same bits as with its share of it. Sharded norms are sums of parts.
    disturbed = submit(2, sharding="none" if sharding == "optimizer" else "full")
    stack.until(disturbed.id, lambda job: job.step >= 8)
    (follower,) = followers(stack)
    os.kill(parent(follower) if dies == "the first" else follower, signal.SIGKILL)
    killed = time.monotonic()
    assert ended([follower])
    stack.until(disturbed.id, lambda job: job.status == "queued" or job.attempt == 2)
    assert time.monotonic() - killed < 10
    again = stack.succeeded(disturbed.id)
    assert again.attempt == 2 and ended(followers(stack))
    assert curves(stack, again) == theirs
    assert [name for name, tensor in stack.weights(again).items() if not torch.equal(tensor, weights[name])] == []


@SQLITE
def test_more_gpus_than_a_worker_has_are_refused_where_workers_are_known_and_wait_where_not(
    stack: Any, specs: Any, settings: Any
) -> None:
    waiting = stack.submit(specs.rl(resources={"gpus": 4}))
    offered = resource_classes(settings.model_copy(update={"device": "cpu", "gpus_per_job": 2}))
    assert offered == ["any", "cpu", "any:2", "cpu:2"]
    with stack.store.begin() as session:
        seen = {"started_at": utcnow(), "last_seen_at": utcnow()}
        session.add(Worker(id="w", host="h", pid=1, device="cpu", resource_classes=offered, draining=False, **seen))
    with pytest.raises(InvalidRequest) as caught:
        stack.submit(specs.rl(resources={"gpus": 3}))
    assert [(error.pointer, error.code, error.allowed) for error in caught.value.errors] == [
        ("/resources/gpus", "too_many_gpus", 2)
    ]
    stack.submit(specs.rl(resources={"class": "gpu", "gpus": 8}))  # no worker of the class is known
    assert waiting.resource_class == class_of("any", 4) == "any:4"
    stack.doorbell._redis.flushdb()  # of the test's own server
    later = utcnow()
    with stack.store.begin() as session:
        for job in session.scalars(select(Job)):
            job.rung_at = None
    assert waiting.id in reconcile(stack.store, stack.settings, stack.doorbell, later).rung
    assert stack.doorbell.waiting("any:4") == 1


def test_a_session_on_several_gpus_is_refused() -> None:
    asked = {"kind": "session", "model": {"source": "tiny"}, "resources": {"gpus": 2}}
    with pytest.raises(InvalidRequest, match="one GPU") as caught:
        parse(SessionSpec, asked)
    assert caught.value.errors[0].pointer == "/resources"
