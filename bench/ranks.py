"""What a second rank brings to a job (resources.gpus: 2, on a CPU two processes with a thread each), by the way it is sharded.

    python bench/ranks.py [--turns 2] [--steps 8]

One worker (SQLite) whose jobs of each way take turns: the same spec and seed, so the same tokens are sampled and learnt from.
Rates are the job's own metrics, medians over its steps but the first. On two cores two ranks have at most twice the machine;
gloo, which carries gradients and weights between them, needs some of it.
"""

import argparse
from statistics import median
from typing import Any

from ahead import ROWS, curves
from loopback import machine, started
from own_cost import ended

from service.metric_names import STEP_S

MODEL = {"source": "tiny", "tiny": {"hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 1024}}
WAYS: dict[str, dict[str, Any]] = {
    "one rank": {"gpus": 1},
    "two": {"gpus": 2},
    "two, sharding: optimizer": {"gpus": 2, "sharding": "optimizer"},
    "two, sharding: full": {"gpus": 2, "sharding": "full"},
}
RATES = {"sampled/s": "perf/sample_tokens_per_s", "trained/s": "perf/update_tokens_per_s"}


def spec(resources: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "kind": "rl",
        "model": MODEL,
        "data": {"train": {"source": "inline", "rows": ROWS}, "prompt": "rev {q}>", "answer": "{a}"},
        "objective": "gspo",
        "rollout": {"prompts_per_step": 16, "group_size": 16, "max_completion_tokens": 32},
        "update": {"minibatches": 1},
        "reward": {"graders": [{"kind": "similarity", "metric": "position", "reference": "{a}"}]},
        "checkpoints": {"every_steps": steps},
        "limits": {"max_steps": steps},
        "resources": resources,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    print(f"{machine()}\n{'':28}{'s a step':>10}" + "".join(f"{name:>12}{'':8}" for name in RATES))
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    with started(workers=1, RATCHET_SERVES="training", RATCHET_TORCH_THREADS="1", RATCHET_GPUS_PER_JOB="2") as stack:
        for _ in range(options.turns):
            for way, resources in WAYS.items():
                job = ended(stack, stack.ratchet.create_job(spec(resources, options.steps))["id"])
                for name, values in curves(stack, job["id"]).items():
                    found[way].setdefault(name, []).extend(values)
    for way, of in found.items():
        rates = [(median(of[name]), median(of[name]) / median(found["one rank"][name])) for name in RATES.values()]
        print(f"{way:28}{median(of[STEP_S]):10.2f}" + "".join(f"{rate:12.0f}{times:7.2f}x" for rate, times in rates))


if __name__ == "__main__":
    main()
