"""Jobs that learn nothing, through real workers: told, paused or failed, with what they had saved first."""

from typing import Any

import pytest

from service.jobs import lifecycle
from service.store import events
from service.store.tables import Job

HOPELESS = {"graders": [{"kind": "exact", "reference": "none of these"}]}  # pays nothing, whatever is answered


def told(stack: Any, job: Job) -> list[tuple[int, str]]:
    """Step and metric of each warning."""
    with stack.store.begin(readonly=True) as session:
        log = events.after(session, job.id, 0, limit=1000)
    return [(event.data["step"], event.data["metric"]) for event in log if event.type == "warning" and "step" in event.data]


def limits(what: str) -> dict[str, Any]:
    return {"max_steps": 8, "on_no_signal": what, "no_signal_steps": 3}


def test_job_without_a_signal_says_so_once_and_goes_on(shared: Any, specs: Any) -> None:
    job = shared.succeeded(shared.submit(specs.rl(reward=HOPELESS, limits=limits("warn"))).id)
    assert job.step == 8
    assert told(shared, job) == [
        (3, "reward/zero_variance_fraction"),
        (3, "optimizer/grad_norm"),
        (3, "reward/std"),
        (3, "policy/ratio_max"),
        (3, "policy/clip_fraction_high"),
    ]


def test_job_without_a_signal_pauses_and_has_as_many_steps_again(shared: Any, specs: Any) -> None:
    spec = specs.rl(reward=HOPELESS, limits=limits("pause"), checkpoints={"every_steps": 100})
    job_id = shared.submit(spec).id
    paused = shared.until(job_id, lambda job: job.status == "paused")
    assert (paused.step, paused.status_reason, paused.error["code"]) == (3, "no_signal_paused", "no_signal_paused")
    assert "warm it up" in paused.error["hint"]
    assert paused.checkpoint_id is not None
    lifecycle.resume(shared.store, shared.doorbell, "default", job_id)
    again = shared.until(job_id, lambda job: job.status == "paused" and job.attempt == 2)
    assert again.step == 6


def test_job_without_a_signal_fails_when_that_is_wanted(shared: Any, specs: Any) -> None:
    job_id = shared.submit(specs.rl(reward=HOPELESS, limits=limits("fail"))).id
    failed = shared.until(job_id, lambda job: job.status == "failed")
    assert (failed.step, failed.error["code"], failed.error["retryable"]) == (3, "no_signal", False)
    assert failed.checkpoint_id is not None


@pytest.mark.parametrize("what", ["pause", "fail"])
def test_job_that_learns_is_left_alone(shared: Any, specs: Any, what: str) -> None:
    half = {"graders": [{"kind": "regex", "pattern": "[0-9]"}]}  # about every second answer has a digit
    job = shared.succeeded(shared.submit(specs.rl(reward=half, limits=limits(what))).id)
    assert job.step == 8
