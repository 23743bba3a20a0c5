"""A worker's next job of the same base loads no model, and comes out as if it had."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from job_specs import TINY
from service.store.tables import Job, Metric

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def curves(stack: Any, job: Job) -> list[tuple[str, int, float]]:
    """All but times and what they decide."""
    with stack.store.begin(readonly=True) as session:
        points = session.execute(select(Metric.name, Metric.step, Metric.value).where(Metric.job_id == job.id)).all()
    return sorted((name, step, value) for name, step, value in points if not name.startswith(("perf/", "time/")))


@SQLITE
def test_a_job_on_a_warm_base_is_the_same_job_to_the_bit_and_one_that_trains_all_weights_leaves_none(
    stack: Any, specs: Any, tmp_path: Path
) -> None:
    def run(**adapter: Any) -> Job:
        kl = {"preset": "gspo", "kl": {"place": "loss", "coef": 0.01}}  # a reference
        return stack.succeeded(stack.submit(specs.rl(model=TINY | {"adapter": adapter}, objective=kl)).id)

    stack.start_worker()
    lora = {"kind": "lora", "rank": 4, "dropout": 0.3}
    cold, warm = run(**lora), run(**lora)
    run(kind="full")
    again = run(**lora)
    log = (tmp_path / "worker-0.log").read_text()
    assert log.count("is still in memory") == 1
    ours, theirs = stack.weights(cold), curves(stack, cold)
    assert len(ours) > 10 and len(theirs) > 50
    for other in (warm, again):
        weights = stack.weights(other)
        assert [name for name in ours if not torch.equal(ours[name], weights[name])] == []
        assert curves(stack, other) == theirs
