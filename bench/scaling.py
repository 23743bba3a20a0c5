"""How sampling and updating grow: tokens a CPU second and memory at 1, 2, 4 and 8 times the prompts, the length, the group.

    python bench/scaling.py [--turns 3]

A model of 2 layers of 128, float32, one thread. From 4 prompts of 16 tokens with 4 answers of 32 tokens, one of the three
grows at a time; an update is one loss with its gradients. The slope is that of the logarithm of CPU time over that of the
tokens: 1 is linear, less is better. Sizes take turns.
"""

import argparse
import random
from collections.abc import Callable
from math import log
from statistics import median

import torch
from demo_rollout import quiet_libraries
from loopback import machine
from turns import spent

from service.spec.model import Full, ModelSpec, TinyConfig
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.score.layout import Sequence
from workers.rollout.engine import Request, SamplingParams

PROMPTS, GROUP, LENGTH, PROMPT = 4, 4, 32, 16
FACTORS = (1, 2, 4, 8)


def works(learner: Learner, prompts: int, group: int, length: int) -> dict[str, Callable[[], object]]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 40) for _ in range(count)]

    asked = [prompt for prompt in [tokens(PROMPT) for _ in range(prompts)] for _ in range(group)]
    requests = [Request(prompt, SamplingParams(length, ends=False), row) for row, prompt in enumerate(asked)]
    sequences = [Sequence(prompt, tokens(length)) for prompt in asked]
    count = len(sequences) * length
    return {
        "sampling": lambda: learner.base.engine.run(requests),
        "update": lambda: learner.accumulate(sequences, lambda log_probs, rows: -log_probs.sum() / count),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    quiet_libraries()
    shape = TinyConfig(hidden_size=128, layers=2, heads=4, intermediate_size=512, context=512)
    base = Base.load(ModelSpec(source="tiny", tiny=shape, adapter=Full()), device="cpu", threads=1)
    learner = Learner(base, Full(), name="bench", optimizer=OptimizerSpec(), steps=1, seed=0)
    print(f"{machine()}, torch {torch.__version__}, one thread, medians of {turns} turns")
    print(f"{'':22}" + "".join(f"{factor:>9}x" for factor in FACTORS) + f"{'slope':>9}{'MB at 1x and 8x':>18}")
    for axis in ("prompts", "length", "group"):
        sizes = {f: {"prompts": PROMPTS, "group": GROUP, "length": LENGTH} for f in FACTORS}
        for factor in FACTORS:
            sizes[factor][axis] *= factor
        ready = {factor: works(learner, **size) for factor, size in sizes.items()}
        for kind in ("sampling", "update"):
            found: dict[int, list[dict[str, float]]] = {factor: [] for factor in FACTORS}
            for turn in range(turns + 1):
                for factor in random.sample(FACTORS, len(FACTORS)):
                    learner.base.model.zero_grad()
                    told = spent(ready[factor][kind])
                    if turn:
                        found[factor].append(told)
            took, extra = ({f: median(turn[key] for turn in found[f]) for f in FACTORS} for key in ("cpu_s", "extra_mb"))
            rates = [PROMPTS * GROUP * LENGTH * factor / took[factor] for factor in FACTORS]
            slope = log(took[8] / took[1]) / log(8)
            row = "".join(f"{rate:10.0f}" for rate in rates)
            print(f"{kind + ', ' + axis:22}{row}{slope:9.2f}{extra[1]:9.0f}{extra[8]:9.0f}", flush=True)


if __name__ == "__main__":
    main()
