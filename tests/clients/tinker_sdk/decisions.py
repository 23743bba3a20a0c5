"""A program on top of the cookbook's `decisions`, as its README says: labels by cross-entropy and by a custom loss.

python decisions.py MODEL LOG writes a line of probabilities before training, after hard labels, and after soft ones.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook import renderers
from tinker_cookbook.recipes.decisions import (
    Decision,
    DecisionRenderer,
    decision_choice_datums,
    decision_dist_datums,
    probability_loss,
    sample_decision,
)
from tinker_cookbook.tokenizer_utils import get_tokenizer

COIN = Decision("How does the coin fall?", [("heads", "up"), ("tails", "down"), ("edge", "neither")])
SOFT = {"heads": 0.5, "tails": 0.25, "edge": 0.25}
STEPS = 4


async def main(model: str, log: Path) -> None:
    service = tinker.ServiceClient()
    training = await service.create_lora_training_client(base_model=model, rank=8, seed=1)
    renderer = DecisionRenderer(renderers.get_renderer("role_colon", get_tokenizer(model)))
    drawn = []

    async def draw() -> None:
        client = await training.save_weights_and_get_sampling_client()
        drawn.append(await sample_decision(client, renderer.render(COIN)))

    async def step(gradient: Any) -> None:
        await training.optim_step(tinker.AdamParams(learning_rate=1e-3))
        await gradient

    await draw()
    for _ in range(STEPS):
        await step(training.forward_backward(decision_choice_datums(renderer, [(COIN, "tails")]), "cross_entropy"))
    await draw()
    brier = probability_loss(lambda probabilities, target: ((probabilities - target) ** 2).sum())
    for _ in range(STEPS):
        await step(training.forward_backward_custom(decision_dist_datums(renderer, [(COIN, SOFT)]), brier))
    await draw()
    log.mkdir(parents=True)
    (log / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in drawn))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
