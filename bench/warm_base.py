"""What a base that is still in memory saves a job, against one that loads it anew: from its start to the first answer.

    python bench/warm_base.py [--turns 5] [--model FOLDER]

Both open the same LoRA policy and sample one token with it, in alternation; the files are in the system's page cache. Without a
folder: the tiny preset, and a random model of SmolLM2-135M's shape in float32 and bfloat16.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo_rollout import quiet_libraries
from loopback import machine
from transformers import AutoConfig, AutoModelForCausalLM

from service.spec.model import Lora, ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.learner import Start
from workers.policy.tiny import tiny_tokenizer
from workers.policy.warm import WarmBase
from workers.ranks.opening import Opening

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def cases(folder: Path, model: str | None) -> Iterator[tuple[str, ModelSpec]]:
    yield "the tiny preset", ModelSpec(source="tiny", adapter=Lora())
    if model is None:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2)).save_pretrained(folder)
        tiny_tokenizer(2048).save_pretrained(str(folder))
    for dtype in ("float32", "bfloat16"):
        named = ModelSpec(source=model or str(folder), dtype=dtype, adapter=Lora())
        yield f"{model or 'SmolLM2-135M by shape'}, {dtype}", named


def start(spec: ModelSpec, load: Callable[..., Base]) -> tuple[float, float, Base]:
    """Seconds, CPU seconds, and the base, whose adapters are gone."""
    began = time.perf_counter(), time.process_time()
    policy, _ = Opening(spec, "mine", OptimizerSpec(), 8, 0, Start(), 1).policies("cpu", load=load)
    policy.sample([[3, 4]], group_size=1, max_tokens=1, temperature=1.0, seed=0)
    return time.perf_counter() - began[0], time.process_time() - began[1], policy.base


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--model", help="a folder")
    options = parser.parse_args()
    quiet_libraries()
    print(f"{machine()}\n{'':40}{'cold, s':>9}{'CPU':>7}{'warm, s':>9}{'CPU':>7}{'CPU saved':>11}")
    with TemporaryDirectory() as folder:
        for name, spec in cases(Path(folder), options.model):
            warm, found = WarmBase(600.0), dict[str, list[tuple[float, float]]](cold=[], warm=[])
            warm.keep(start(spec, warm.load)[2])
            for _ in range(options.turns):
                for kind, load in (("cold", Base.load), ("warm", warm.load)):
                    wall, cpu, base = start(spec, load)
                    found[kind].append((wall, cpu))
                    warm.keep(base)  # of a base that it does not know: nothing
                    del base
            (cold, cold_cpu), (kept, kept_cpu) = (
                [median(each) for each in zip(*times, strict=True)] for times in found.values()
            )
            print(f"{name:40}{cold:9.2f}{cold_cpu:7.2f}{kept:9.2f}{kept_cpu:7.2f}{cold_cpu - kept_cpu:9.2f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
