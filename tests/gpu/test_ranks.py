"""Two ranks over NCCL do what one GPU does. Skipped without two GPUs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from service.spec.training import OptimizerSpec
from workers.policy.learner import Learner, Start
from workers.policy.score.layout import Sequence
from workers.ranks.opening import Opening
from workers.ranks.policies import open_spread
from workers.ranks.ranks import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def learn(policy: Learner, step: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(3, 20, (8, 24), generator=generator).tolist()
    batch = [Sequence(row[:8], row[8 : 10 + place]) for place, row in enumerate(rows)]
    loss = policy.accumulate(batch, lambda log_probs, _: -log_probs.sum() / 100, microbatch_tokens=64)
    return loss, float(policy.step()["grad_norm"])


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("adapter", [Full(), Lora(rank=4, alpha=8, dropout=0.0)], ids=["full", "lora"])
def test_two_gpus_learn_what_one_learns(adapter: Any, sharding: Any, tmp_path: Any) -> None:
    tiny = TinyConfig(hidden_size=64, layers=2, heads=4, intermediate_size=128, context=64)
    model = ModelSpec(source="tiny", tiny=tiny, adapter=adapter, dtype="float32")
    opening = Opening(model, "mine", OptimizerSpec(learning_rate=1e-3), 8, 0, Start(), 1)
    one, _ = opening.policies("cuda")
    with Ranks(2, "cuda") as ranks:
        two, _ = open_spread(replace(opening, sharding=sharding), "cuda", ranks)
        for step in range(4):
            assert learn(two, step) == pytest.approx(learn(one, step), abs=1e-4)
        two.save(tmp_path)  # compares the ranks' weights
