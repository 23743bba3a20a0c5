"""A group of answers on one prompt: what an update costs packed, padded, and packed by hand into one row with a mask.

    python bench/shared_prompt.py [--model models/smollm2] [--prompts 256,512] [--turns 3]

The model is SmolLM2-135M (examples/smollm2/prepare.py makes its folder) in float32, all weights trained, one thread. Each turn
is one loss with its gradients, of 8 answers of 64 tokens. All take turns; medians of CPU seconds are compared. By hand: the
prompt and all answers in one row, position_ids and a 4-D mask through the model's own attention, the head on the answers'
positions.
"""

import argparse
import logging
import os
import platform
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from service.spec.model import Full, ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.score.layout import Sequence

ANSWERS, LENGTH = 8, 64


def ours(learner: Learner, sequences: list[Sequence], *, packs: bool) -> Callable[[], object]:
    def run() -> object:
        learner.base.scorer.packs = packs
        return learner.accumulate(sequences, lambda log_probs, rows: -log_probs.sum() / (ANSWERS * LENGTH))

    return run


def by_hand(model: Any, sequences: list[Sequence]) -> Callable[[], object]:
    prompt, read = sequences[0].prompt, LENGTH - 1
    ids = torch.tensor([prompt + [token for _, answer in sequences for token in answer[:-1]]])
    length = ids.shape[1]
    places = torch.arange(len(prompt), len(prompt) + read).repeat(ANSWERS)
    position_ids = torch.cat([torch.arange(len(prompt)), places]).unsqueeze(0)
    owner = torch.cat([torch.full((len(prompt),), -1), torch.arange(ANSWERS).repeat_interleave(read)])
    order = torch.arange(length)
    seen = (order.unsqueeze(1) >= order) & ((owner == -1) | (owner.unsqueeze(1) == owner))
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    starts = [len(prompt) + answer * read for answer in range(ANSWERS)]
    chosen = torch.tensor([place for start in starts for place in (len(prompt) - 1, *range(start, start + read))])
    targets = torch.tensor([token for _, answer in sequences for token in answer])

    def run() -> object:
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        log_probs = model.get_output_embeddings()(hidden[0, chosen]).log_softmax(-1)
        loss = -log_probs.gather(-1, targets.unsqueeze(-1)).sum() / len(targets)
        loss.backward()
        return float(loss)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--prompts", default="256,512")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    base = Base.load(ModelSpec(source=str(asked.model.resolve()), dtype="float32", adapter=Full()), device="cpu", threads=1)
    learner = Learner(base, Full(), name="bench", optimizer=OptimizerSpec(), steps=1, seed=0)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread, medians of {asked.turns} turns"
    )
    print(f"{'prompt':>6} {'way':10}{'wall s':>9}{'CPU s':>9}{'padded is':>11}{'of tokens':>11}")
    draw = random.Random(0)
    for length in map(int, asked.prompts.split(",")):
        prompt, *answers = ([draw.randrange(1000, 40_000) for _ in range(n)] for n in (length, *[LENGTH] * ANSWERS))
        sequences = [Sequence(prompt, answer) for answer in answers]
        ways = {
            "padded": ours(learner, sequences, packs=False),
            "packed": ours(learner, sequences, packs=True),
            "by hand": by_hand(base.model, sequences),
        }
        wall, cpu = ({way: list[float]() for way in ways} for _ in range(2))
        for _ in range(asked.turns):
            for way in random.sample(list(ways), len(ways)):
                base.model.zero_grad()
                began = time.perf_counter(), time.process_time()
                ways[way]()
                wall[way].append(time.perf_counter() - began[0])
                cpu[way].append(time.process_time() - began[1])
        tokens = ANSWERS * (length + LENGTH - 1) / (length + ANSWERS * (LENGTH - 1))
        for way in ways:
            ratio = median(cpu["padded"]) / median(cpu[way])
            print(
                f"{length:6} {way:10}{median(wall[way]):9.2f}{median(cpu[way]):9.2f}{ratio:10.2f}x{ratio / tokens:11.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
