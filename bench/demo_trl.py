"""The demo's reinforcement learning (32 prompts x 8 answers, 4 updates a rollout), against TRL's GRPOTrainer.

    python -m venv trl && trl/bin/pip install 'trl==1.16.*' peft       (an environment of its own)
    TRL_PYTHON=trl/bin/python python bench/demo_trl.py [--steps 80] [--seed 0]

Both train from the same warmed-up weights on the same rows with the same loss, optimizer and schedule, float32, one thread,
each in a process of its own; they take turns rollout by rollout. Neither has a store or a service. Printed: medians of a
rollout's CPU time, and the share of held-out prompts that the trained weights answer exactly, sampled at temperature 1.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from demo_rollout import attempt_at, exact, quiet_libraries, warmed_up
from loopback import machine
from peer import takes_python, trl
from transformers import AutoModelForCausalLM

from service.cli.demo import gspo_spec
from service.spec.job import JobSpec, RLSpec
from service.validation import parse
from workers.loops import rl
from workers.policy.optimizer import learning_rate_ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    takes_python(parser)
    asked = parser.parse_args()
    quiet_libraries()
    with warmed_up(asked.seed) as demo:
        folder = demo.folder
        spec: Any = parse(JobSpec, gspo_spec(demo.ids, "ckpt_none", asked.seed) | {"model": {"source": "tiny"}})
        attempt, before = (demo.attempt(spec, 4 * asked.steps) for _ in range(2))
        before.policy.base.model.save_pretrained(folder / "model")
        before.policy.text.save(folder / "model")
        write_settings(folder, spec, 4 * asked.steps)
        spent: dict[str, list[tuple[float, float]]] = {"Ratchet": [], "TRL": []}
        with trl(asked.trl, "demo", str(folder), log=folder / "trl.log") as peer:
            for step in range(1, asked.steps + 1):
                for way in random.sample(list(spent), 2):
                    began = time.perf_counter(), time.process_time()
                    if way == "TRL":
                        cpu = peer.turn()
                    else:
                        rl.step(attempt, step)
                        attempt.progress.step = step
                        cpu = time.process_time() - began[1]
                    spent[way].append((time.perf_counter() - began[0], cpu))
            peer.leave()
        theirs = attempt_at(spec, folder, AutoModelForCausalLM.from_pretrained(folder / "trl").state_dict(), 4 * asked.steps)
        finals = {"Ratchet": exact(attempt), "TRL": exact(theirs)}
        print(f"{machine()}; {asked.steps} rollouts, seed {asked.seed}, exact before: {exact(before):.3f}")
        quarter = max(1, asked.steps // 4)
        columns = ("wall ms", "CPU ms", "early", "late", "exact")
        print(f"{'':10}" + "".join(f"{column:>10}" for column in columns))
        for way, turns in spent.items():
            wall, cpu = ([1000 * turn[i] for turn in turns] for i in (0, 1))
            numbers = (median(wall), median(cpu), median(cpu[:quarter]), median(cpu[-quarter:]))
            print(f"{way:10}" + "".join(f"{number:10.0f}" for number in numbers) + f"{finals[way]:10.3f}")
        ours, trls = (median(cpu for _, cpu in spent[way]) for way in spent)
        print(f"TRL over Ratchet: {trls / ours:.2f} of the CPU time")


def write_settings(folder: Path, spec: RLSpec, steps: int) -> None:
    """For TRL's side: the same rows, optimizer and schedule."""
    (folder / "rows.jsonl").write_bytes((folder / spec.data.train.id).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    how = spec.optimizer
    settings = {
        "adamw": {
            "lr": how.learning_rate, "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay, "fused": True
        },
        "max_grad_norm": how.max_grad_norm,
        "schedule": [learning_rate_ratio(how.schedule, step, steps) for step in range(steps)],
        "seed": spec.seed,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
