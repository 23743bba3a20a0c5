"""Sampling, against transformers' generate, its continuous batching, and a short loop by hand over its own cache.

    python bench/sampling.py [--model models/smollm2] [--turns 5] [--cases ragged,equal,tiny,long]

The model is SmolLM2-135M (examples/smollm2/prepare.py makes its folder), without which only the demo's tiny model runs. All
sample at temperature 1 from the whole distribution, float32, with one thread. Every contender has its turn in every round;
medians are compared. generate gives no log-probs, ours and the loop by hand do.

Ragged: 8 prompts x 8 answers of mean length 11, at most 32. All get the same lengths: which row ends where is drawn
beforehand, and in each contender's loop that is where the row ends (for transformers' continuous batching by max_new_tokens,
for generate by a stopping criterion a row). Nothing else ends an answer.
Equal: 8 x 8 answers of 32 tokens. Tiny: 32 x 8 answers of at most 8 by the demo's model. Long: 64 answers of 128 tokens by a
model of 2 layers.
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
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from service.spec.model import Full, ModelSpec, TinyConfig
from workers.policy.base import Base
from workers.rollout.engine import Request, SamplingParams

Case = tuple[list[list[int]], int, list[int]]  # prompts, answers to each, the length of every answer
Contender = Callable[[], int]  # samples, and says how many tokens


def ragged(prompts: int, group: int, longest: int, mean: int) -> list[int]:
    """Lengths of answers that end at each token with the same chance."""
    draw = random.Random(0)
    return [min(longest, 1 + int(draw.expovariate(1 / (mean - 0.5)))) for _ in range(prompts * group)]


def ours(base: Base, case: Case) -> Contender:
    prompts, group, lengths = case

    def sample() -> int:
        asked = [Request(prompts[row // group], SamplingParams(length, ends=False), row) for row, length in enumerate(lengths)]
        return sum(len(one.tokens) for one in base.engine.run(asked))

    return sample


def by_hand(model: PreTrainedModel, case: Case, *, drop: bool = True) -> Contender:
    """What one writes without a library: each prompt read once for its group, log-probs kept, ended rows dropped."""
    prompts, group, lengths = case

    @torch.no_grad()
    def sample() -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        cache.batch_repeat_interleave(group)
        logits, mask = logits.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
        at = positions[:, -1:].repeat_interleave(group, 0)
        left, count, kept = torch.tensor(lengths), 0, []
        while True:
            log_probs = logits.log_softmax(-1)
            tokens = torch.multinomial(log_probs.exp(), 1)
            kept.append(log_probs.gather(-1, tokens))
            count += len(tokens) if drop else int((left > 0).sum())
            left -= 1
            if not (left > 0).any():
                return count
            if drop and (left <= 0).any():
                alive = (left > 0).nonzero().squeeze(-1)
                cache.batch_select_indices(alive)
                tokens, mask, at, left = tokens[alive], mask[alive], at[alive], left[alive]
            at = at + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]

    return sample


class EndsAt(StoppingCriteria):
    """Ends each row where its length is reached."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.ends <= input_ids.shape[1]


def generate(model: PreTrainedModel, case: Case) -> Contender:
    prompts, group, lengths = case
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max(lengths), do_sample=True, top_k=0, top_p=1.0, num_return_sequences=group, pad_token_id=0
    )

    def sample() -> int:
        ends = StoppingCriteriaList([EndsAt(width, lengths)])
        calls: Any = model
        calls.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=ends)
        return sum(lengths)

    return sample


def generate_batch(model: PreTrainedModel, case: Case) -> Contender:
    """transformers' continuous batching. A request of its own for each answer: it shares pages of equal prompts itself."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts, group, lengths = case
    batching = ContinuousBatchingConfig(num_blocks=640, block_size=8, max_batch_tokens=512)
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max(lengths), eos_token_id=-1)
    calls: Any = model

    def sample() -> int:
        with calls.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            for row, length in enumerate(lengths):
                manager.add_request(prompts[row // group], max_new_tokens=length)
            done = 0
            count = 0
            while done < len(lengths):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done += 1
                    count += len(result.generated_tokens)
        return count

    return sample


def measure(name: str, contenders: dict[str, Contender], turns: int) -> None:
    """A table of tokens a second, by the wall and by the process's CPU time."""
    wall, cpu, tokens = ({one: [] for one in contenders} for _ in range(3))
    for turn in range(turns + 1):
        for one in random.sample(list(contenders), len(contenders)):
            began = time.perf_counter(), time.process_time()
            count = contenders[one]()
            if turn:  # the first warms up
                wall[one].append(time.perf_counter() - began[0])
                cpu[one].append(time.process_time() - began[1])
                tokens[one].append(count)
    print(f"\n{name}")
    print(f"{'':24}{'tokens':>8}{'wall s':>9}{'CPU s':>9}{'tok/CPU s':>11}{'ours is':>9}")
    ours_s = median(cpu["ours"]) / median(tokens["ours"])
    for one in contenders:
        each = median(cpu[one]) / median(tokens[one])
        row = f"{one:24}{median(tokens[one]):8.0f}{median(wall[one]):9.3f}{median(cpu[one]):9.3f}{1 / each:11.0f}"
        print(row + f"{each / ours_s:8.2f}x", flush=True)


def tiny_base(**shape: Any) -> Base:
    return Base.load(ModelSpec(source="tiny", tiny=TinyConfig(**shape), adapter=Full()), device="cpu", threads=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cases", default="ragged,equal,tiny,long")
    asked = parser.parse_args()
    cases, turns = asked.cases.split(","), asked.turns
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, one thread, medians of {turns}")
    if asked.model.exists() and {"ragged", "equal"} & set(cases):
        base = Base.load(ModelSpec(source=str(asked.model.resolve()), dtype="float32", adapter=Full()), device="cpu", threads=1)
        other: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
        paged: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
        other.generation_config.eos_token_id = None
        texts = [
            f"{word} is something that I have often thought about, because"
            for word in ["Rain", "Sun", "Snow", "Wind", "Fog", "Ice", "Hail", "Heat"]
        ]
        prompts = [base.text.encode(text) for text in texts]
        for name, lengths in (("ragged", ragged(8, 8, 32, 11)), ("equal", [32] * 64)):
            if name in cases:
                case = prompts, 8, lengths
                against = {"ours": ours(base, case), "loop by hand": by_hand(other, case), "generate": generate(other, case)}
                against["continuous batching"] = generate_batch(paged, case)
                if name == "ragged":
                    against["loop, rows stay"] = by_hand(other, case, drop=False)
                measure(f"SmolLM2-135M, {name}: 8 x 8 answers, mean {sum(lengths) / 64:.1f} tokens", against, turns)
    if "tiny" in cases:
        base = tiny_base(hidden_size=96, layers=2, heads=4, intermediate_size=288, context=64)
        draw = random.Random(0)
        prompts = [base.text.encode(f"rev {draw.randrange(10**6):06}>") for _ in range(32)]
        for name, lengths in (("8 tokens each", [8] * 256), ("1 to 8 tokens", [draw.randint(1, 8) for _ in range(256)])):
            case = prompts, 8, lengths
            against = {
                "ours": ours(base, case),
                "loop by hand": by_hand(base.model, case),
                "generate": generate(base.model, case),
            }
            measure(f"the demo's model, 32 x 8 answers of {name}", against, 4 * turns)
    if "long" in cases:
        base = tiny_base(hidden_size=128, layers=2, heads=4, intermediate_size=512, context=256)
        prompts = [base.text.encode(f"question {number}: ") for number in range(64)]
        case = prompts, 1, [128] * 64
        against = {"ours": ours(base, case), "loop by hand": by_hand(base.model, case), "generate": generate(base.model, case)}
        measure("2 layers of 128, 64 answers of 128 tokens", against, turns)


if __name__ == "__main__":
    main()
