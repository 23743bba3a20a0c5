"""The update of SmolLM2-135M, against TRL's loss: tokens a second and extra memory; and the head alone, against log_softmax.

    TRL_PYTHON=trl/bin/python python bench/update.py [--model models/smollm2] [--turns 3] [--cases ...] [--group]
    python bench/update.py --head

A turn is one loss with its metrics and gradients, of 8 ragged answers of 8 to 64 tokens after 64 prompt tokens each (--group:
after the same prompt). Each side has a process of its own with one thread, and they take turns. Extra memory is the peak of the
resident set in a turn beyond what was there before, gradients included.

--head: log-probs of 512 positions from hidden states of width 576, and the gradients, at two vocabularies; the head frozen or
trained. Naive is `log_softmax` of all logits and a gather.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from loopback import machine
from peer import WITH_TRL, Peer, ours, trl
from torch import Tensor, nn
from turns import quiet, spent, take_turns

from service.spec.job import ObjectiveSpec
from service.spec.model import Full, Lora, ModelSpec
from service.spec.training import OptimizerSpec
from service.validation import parse
from workers.loops.nonfinite import Suspects
from workers.loops.update import Experience, How, accumulate, prepare
from workers.objectives.objective import Objective
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.score.layout import Sequence, response_mask
from workers.policy.score.log_probs import LogProbsAlone, Scorer

LORA = Lora(rank=16, alpha=32, target_modules=["q_proj", "v_proj"])
CASES = [(dtype, adapter) for dtype in ("float32", "bfloat16") for adapter in ("full", "lora")]


def case(*, group: bool) -> str:
    """8 answers of 8, 16, ... 64 tokens: 288 in all."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1000, 40_000) for _ in range(count)]

    prompts = [tokens(64)] * 8 if group else [tokens(64) for _ in range(8)]
    answers = [tokens(8 * (place + 1)) for place in range(8)]
    lora = {"r": LORA.rank, "lora_alpha": LORA.alpha, "target_modules": LORA.target_modules}
    return json.dumps(
        {"prompts": prompts, "answers": answers, "advantages": [draw.gauss(0, 1) for _ in range(8)], "lora": lora}
    )


def our_side(source: str, dtype: Any, adapter: str, asked: dict[str, Any]) -> None:
    kind = Full() if adapter == "full" else LORA
    base = Base.load(ModelSpec(source=source, dtype=dtype, adapter=kind), device="cpu", threads=1)
    learner = Learner(base, kind, name="bench", optimizer=OptimizerSpec(), steps=1, seed=0)
    sequences = [Sequence(*pair) for pair in zip(asked["prompts"], asked["answers"], strict=True)]
    objective = Objective(parse(ObjectiveSpec, {"preset": "gspo", "surrogate": {"clip_low": 0.1, "clip_high": 0.1}}).resolve())
    mask, advantages = response_mask(sequences, base.device), torch.tensor(asked["advantages"])
    old, rows = learner.score(sequences).log_probs, list(range(len(sequences)))
    experience = Experience(sequences, mask, old, None, None, advantages, torch.zeros(len(rows), dtype=torch.long))
    how = How(1.0, "auto", 64, 0, 0)

    def run() -> object:
        prepared = prepare(objective, experience, rows, how)
        return accumulate(learner, objective, experience, rows, prepared, how, Suspects())

    masters = SimpleNamespace(zero_grad=lambda **_: learner._optimizer.zero_grad())  # pyright: ignore[reportPrivateUsage]
    take_turns(run, masters)


def compare(asked: argparse.Namespace) -> None:
    text = case(group=asked.group)
    told, trained = json.loads(text), 288
    print(f"{machine()}, torch {torch.__version__}, one thread, medians of {asked.turns} turns after one")
    columns = ("wall s", "CPU s", "tokens/CPU s", "extra MB", "tokens", "memory")
    print(f"{'':20}{'':10}" + "".join(f"{column:>14}" for column in columns))
    assert trained == sum(map(len, told["answers"]))
    with TemporaryDirectory() as name:
        for dtype, adapter in (case.split("-") for case in asked.cases.split(",")):
            arguments = (str(asked.model.resolve()), dtype, adapter, text)
            with (
                ours(__file__, *arguments, log=Path(name) / "ours.log") as first,
                trl(asked.trl, "update", *arguments, log=Path(name) / "trl.log") as second,
            ):
                found = turns_of({"Ratchet": first, "TRL": second}, asked.turns)
                first.leave()
                second.leave()
            middle = {
                side: {key: median(turn[key] for turn in found[side]) for key in ("wall_s", "cpu_s", "extra_mb")}
                for side in found
            }
            for side, m in middle.items():
                numbers = f"{m['wall_s']:14.2f}{m['cpu_s']:14.2f}{trained / m['cpu_s']:14.0f}{m['extra_mb']:14.0f}"
                ratios = f"{middle['TRL']['cpu_s'] / m['cpu_s']:13.2f}x{m['extra_mb'] / middle['TRL']['extra_mb']:13.2f}x"
                print(f"{dtype + ' ' + adapter:20}{side:10}{numbers}{ratios}", flush=True)


def turns_of(peers: dict[str, Peer], turns: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in peers}
    for turn in range(turns + 1):
        for side in random.sample(list(peers), len(peers)):
            told = peers[side].turn()
            if turn:
                found[side].append(told)
    return found


# ---------------------------------------------------------------- the head alone


def heads(vocabulary: int, *, trained: bool) -> dict[str, Callable[[], object]]:
    width, count = 576, 512
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(width, vocabulary, bias=False).requires_grad_(trained)
        hidden = torch.randn(count, width, requires_grad=True)
        targets, grad = torch.randint(vocabulary, (count,)), torch.randn(count)
    model: Any = SimpleNamespace(
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary)),
    )
    scorer: Any = Scorer.__new__(Scorer)
    scorer._model, scorer.shards = model, None

    def backward(log_probs: Tensor) -> object:
        log_probs.backward(grad)
        hidden.grad = head.weight.grad = None
        return None

    def naive() -> object:
        return backward(head(hidden).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1))

    def chunked() -> object:
        return backward(scorer._from_hidden(hidden, targets, LogProbsAlone())[0])

    return {"Ratchet": chunked, "naive": naive}


def head_alone(turns: int) -> None:
    print(f"{machine()}, torch {torch.__version__}, one thread, float32, 512 positions, medians of {turns} turns")
    print(f"{'vocabulary':>10} {'head':8}{'':10}{'CPU s':>10}{'extra MB':>10}{'time':>8}{'memory':>8}")
    for vocabulary in (49_152, 151_936):
        for trained in (False, True):
            ways = heads(vocabulary, trained=trained)
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for turn in range(turns + 1):
                for way in random.sample(list(ways), len(ways)):
                    told = spent(ways[way])
                    if turn:
                        found[way].append(told)
            middle = {way: [median(turn[key] for turn in each) for key in ("cpu_s", "extra_mb")] for way, each in found.items()}
            for way, (cpu, extra) in middle.items():
                ratios = f"{cpu / middle['naive'][0]:7.2f}x{extra / middle['naive'][1]:7.2f}x"
                name = "trained" if trained else "frozen"
                print(f"{vocabulary:10} {name:8}{way:10}{cpu:10.2f}{extra:10.0f}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", default=",".join(map("-".join, CASES)))
    parser.add_argument("--group", action="store_true", help="all answers after the same prompt")
    parser.add_argument("--head", action="store_true", help="the head alone, without TRL")
    parser.add_argument("--trl", default=WITH_TRL, metavar="PYTHON", help="an interpreter that has TRL (TRL_PYTHON)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.head:
        head_alone(asked.turns)
    elif asked.trl is None:
        parser.error("name an interpreter that has TRL, by --trl or TRL_PYTHON")
    else:
        compare(asked)


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        quiet()
        our_side(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
    else:
        main()
