"""How long a checkpoint stops a job's loop: saved behind it, and in front of it, as before a pause.

    python bench/saving.py [--turns 5]

A random model of SmolLM2-135M's shape, float32, in a real store (SQLite). In alternation a step alone, one after a checkpoint
that is written behind the loop, and one after a checkpoint that the loop waits for. Gap is the time of the call that saves; the
step that follows shares the machine with the thread that hashes and writes.
"""

import argparse
import time
from collections import defaultdict
from statistics import median
from tempfile import TemporaryDirectory

import torch
from demo_rollout import quiet_libraries
from loopback import machine, started
from reads import SPEC
from transformers import AutoConfig, AutoModelForCausalLM
from warm_base import SMOLLM2

from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.spec.job import CheckpointsSpec
from service.spec.model import Full, Lora, ModelSpec
from service.spec.training import OptimizerSpec
from service.store.session import open_store
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.score.layout import Sequence
from workers.policy.tiny import tiny_tokenizer
from workers.tenure.keeper import Keeper
from workers.tenure.tenure import Contents, Tenure

SEQUENCES, PROMPT, ANSWER = 4, 32, 64


def stepped(learner: Learner) -> float:
    """Seconds of a step of `SEQUENCES` answers."""
    draw = torch.Generator().manual_seed(learner.updates)
    tokens = torch.randint(3, 2000, (SEQUENCES, PROMPT + ANSWER), generator=draw).tolist()
    began = time.perf_counter()
    learner.accumulate([Sequence(row[:PROMPT], row[PROMPT:]) for row in tokens], lambda log_probs, _: -log_probs.mean())
    learner.step()
    return time.perf_counter() - began


def measure(tenure: Tenure, learner: Learner, turns: int) -> dict[str, list[tuple[float, float]]]:
    """Gaps and the steps behind them."""
    found = defaultdict[str, list[tuple[float, float]]](list)
    stepped(learner)
    for turn in range(2 * turns):
        tenure.finish_saving()
        found["no checkpoint"].append((0.0, stepped(learner)))
        behind = bool(turn % 2)
        contents = Contents(turn + 1, learner.kind, learner.save, {})
        began = time.perf_counter()
        tenure.save(contents, CheckpointsSpec(keep_last=1), behind=behind)
        gap = time.perf_counter() - began
        found["behind the loop" if behind else "waited for"].append((gap, stepped(learner)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    print(f"{machine()}\n{'':44}{'gap ms':>9}{'longest':>9}{'step s':>9}{'both s':>9}")
    with TemporaryDirectory() as name, started() as stack:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2)).save_pretrained(name)
        tiny_tokenizer(2048).save_pretrained(name)
        store = open_store(stack.settings)
        with Keeper(store, stack.settings, Doorbell(stack.settings)) as keeper:
            for adapter in (Full(), Lora(rank=16)):
                base = Base.load(ModelSpec(source=name, dtype="float32", adapter=adapter), device="cpu", threads=1)
                learner = Learner(base, adapter, name="bench", optimizer=OptimizerSpec(), steps=1000, seed=0)
                stack.ratchet.create_job(SPEC)
                claimed = leases.claim(store, stack.settings, "wrk_bench", ["any"])
                assert claimed is not None
                with Tenure(keeper, *claimed, stall_timeout_s=600) as tenure:
                    stepped(learner)
                    found = measure(tenure, learner, options.turns)
                    tenure.finish_saving()
                    folder = store.blobs.path(f"checkpoints/{claimed[0].job_id}")
                    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                kind = f"{'all weights' if adapter.kind == 'full' else 'LoRA of rank 16'}, {size / 1e6:.0f} MB"
                for way, times in found.items():
                    gaps, steps = zip(*times, strict=True)
                    both = median(gap + step for gap, step in times)
                    row = f"{1000 * median(gaps):9.0f}{1000 * max(gaps):9.0f}{median(steps):9.2f}{both:9.2f}"
                    print(f"{f'{kind}, {way}':44}{row}", flush=True)
                leases.worker_lost(store, Doorbell(stack.settings), "wrk_bench")
                leases.claim(store, stack.settings, "wrk_other", ["any"])
                del learner, base
        store.close()


if __name__ == "__main__":
    main()
