"""What sampling a step ahead brings (rollout.max_staleness: 1), where a server samples, against taking turns with it.

    python bench/ahead.py [--turns 3] [--steps 12] [--minibatches 4] [--epochs 8]

The server is the tests' stand-in for vLLM (tests/vllm_stand_in.py), a process of its own with one thread, which samples one
answer at a time; the worker has one thread, too. Jobs of both ways in alternation on one stack (SQLite), from the same seed.
Taking turns, a step is sampling and then learning; a step ahead it is at best the longer of the two, printed beside it.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo_rollout import quiet_libraries
from loopback import Stack, machine, started
from own_cost import ended

from service.metric_names import STEP_S, WAITED_S
from service.spec.model import ModelSpec
from workers.policy.base import Base

TESTS = Path(__file__).parents[1] / "tests"
WAYS = {"taking turns": 0, "a step ahead": 1}
MODEL = {"source": "tiny", "tiny": {"hidden_size": 128, "layers": 2, "heads": 4, "intermediate_size": 256}}
ROWS = [{"q": f"{n:03d}", "a": f"{n:03d}"[::-1]} for n in range(0, 1000, 7)]


def serve() -> None:
    """The server's process: prints its address, and ends when its input does."""
    sys.path.insert(0, str(TESTS))
    from vllm_stand_in import Vllm

    quiet_libraries()
    torch.set_num_threads(1)
    print(Vllm(Base.load(ModelSpec.model_validate(MODEL), device="cpu", threads=1)).url, flush=True)
    sys.stdin.read()


@contextmanager
def server() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def spec(url: str, staleness: int, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": "rl",
        "model": {**MODEL, "adapter": {"kind": "lora", "rank": 8}},
        "data": {"train": {"source": "inline", "rows": ROWS}, "prompt": "rev {q}>", "answer": "{a}"},
        "objective": {"preset": "gspo", "anchor": "rollout"},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_completion_tokens": 8,
            "max_staleness": staleness,
            "engine": {"kind": "vllm", "url": url, "served_model": "base"},
        },
        "update": {"minibatches": options.minibatches, "epochs": options.epochs},
        "reward": {"graders": [{"kind": "similarity", "metric": "position", "reference": "{a}"}]},
        "checkpoints": {"every_steps": options.steps},
        "limits": {"max_steps": options.steps},
    }


def curves(stack: Stack, job_id: str) -> dict[str, list[float]]:
    """Without the first step, which nobody could sample ahead."""
    found: Any = stack.ratchet.metrics(job_id)
    return {name: series["value"][1:] for name, series in found["series"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    print(machine())
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    sampled, learnt, waited = list[float](), list[float](), list[float]()
    with (
        TemporaryDirectory() as adapters,
        server() as url,
        started(
            workers=1,
            RATCHET_SERVES="training",
            RATCHET_TORCH_THREADS="1",
            RATCHET_ROLLOUT_NETWORKS="127.0.0.0/8",
            RATCHET_ROLLOUT_ADAPTERS_DIR=adapters,
        ) as stack,
    ):
        ended(stack, stack.ratchet.create_job(spec(url, 0, options))["id"])  # warms up
        for _ in range(options.turns):
            for way, staleness in WAYS.items():
                job = ended(stack, stack.ratchet.create_job(spec(url, staleness, options))["id"])
                of = curves(stack, job["id"])
                took[way] += of[STEP_S]
                if staleness:
                    waited += of[WAITED_S]
                else:
                    tokens = zip(of["tokens/sampled"], of["perf/sample_tokens_per_s"], of[STEP_S], strict=True)
                    each = [(count / rate, step - count / rate) for count, rate, step in tokens]
                    sampled += [sampling for sampling, _ in each]
                    learnt += [learning for _, learning in each]
    alone, ahead = (median(times) for times in took.values())
    print(f"{'':16}{'ms a step':>11}{'':>8}")
    print(
        f"{'taking turns':16}{1000 * alone:11.0f}   sampling {1000 * median(sampled):.0f}, learning {1000 * median(learnt):.0f}"
    )
    print(f"{'a step ahead':16}{1000 * ahead:11.0f}   waiting {1000 * median(waited):.0f}")
    best = median(map(max, sampled, learnt))
    print(f"{'the longer one':16}{1000 * best:11.0f}")
    print(f"a step ahead is {alone / ahead:.2f}x as fast; at best {alone / best:.2f}x")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
