"""A rollout of the demo (32 prompts x 8 answers, 4 updates), with and without what saves work in it.

    python bench/demo_rollout.py [--steps 80] [--seed 0]

Each way trains a policy of its own from the same warmed-up weights, without store and service, one thread; the ways take turns
step by step. `plain` scores all answers again, sends all of them through the updates, and pads them. Printed: the median CPU
time of a rollout in the first and in the last quarter of the steps, its parts over all of them, and the share of held-out
prompts answered exactly in the end.
"""

import argparse
import logging
import os
import platform
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import orjson
import torch

from service.cli.demo import gspo_spec, make_rows, warm_up_spec
from service.jobs.data import open_data
from service.metric_names import REWARD_MEAN
from service.rewards.rewards import Rewards
from service.spec.job import JobSpec
from service.spec.model import Full, ModelSpec
from service.states import Phase
from service.validation import parse
from workers.loops import rl, supervised, update
from workers.loops.attempt import Attempt
from workers.loops.progress import Progress
from workers.loops.sampling import draw_of, reward_metrics, sample_and_grade
from workers.objectives.objective import Objective
from workers.policy.base import Base
from workers.policy.learner import Learner

WAYS = {
    "as it is": (),
    "all scored": ("rescore",),
    "all rows": ("rows",),
    "padded": ("packs",),
    "plain": ("rescore", "rows", "packs"),
}


@dataclass(frozen=True)
class WarmedUp:
    folder: Path
    ids: dict[str, str]  # the files of the rows, by what they are for
    state: dict[str, torch.Tensor]

    def attempt(self, spec: Any, steps: int) -> Attempt:
        """One that has done nothing yet, for so many optimizer steps."""
        return attempt_at(spec, self.folder, self.state, steps)


class Clock:
    """In place of a tenure: CPU seconds by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._phase, self._since = "", time.process_time()
        self.meter: Any = SimpleNamespace(sampled=lambda _: None, trained=lambda _: None)

    def check(self, phase: Phase | None = None) -> None:
        now = time.process_time()
        self.spent[self._phase] += now - self._since
        self._since, self._phase = now, self._phase if phase is None else phase.value


def attempt_at(spec: Any, folder: Path, state: dict[str, torch.Tensor] | None, steps: int) -> Attempt:
    data = open_data(spec.data, spec.seed, lambda dataset_id: folder / dataset_id)
    base = Base.load(ModelSpec(source="tiny", adapter=Full()), device="cpu", threads=1)
    if state is not None:
        base.model.load_state_dict(state)
    learner = Learner(base, Full(), name="bench", optimizer=spec.optimizer, steps=steps, seed=spec.seed)
    clock: Any = Clock()
    return Attempt(clock, spec, data, Rewards(spec.reward, job_id="bench", secrets={}), learner, Progress())


def exact(attempt: Attempt) -> float:
    rows = attempt.data.eval
    assert rows is not None
    some = list(range(min(256, len(rows))))
    draw = draw_of(attempt, purpose="bench", temperature=1.0)
    return reward_metrics(sample_and_grade(attempt, [rows[i] for i in some], some, draw))[REWARD_MEAN]


@contextmanager
def warmed_up(seed: int) -> Iterator[WarmedUp]:
    """The demo's rows in a folder, and the weights that its reinforcement learning starts from."""
    with TemporaryDirectory() as name:
        folder, rows = Path(name), make_rows(seed)
        ids = {part: f"ds_{part.replace('_', '')}" for part in rows}
        for part, some in rows.items():
            (folder / ids[part]).write_bytes(b"\n".join(map(orjson.dumps, some)))
        yield WarmedUp(folder, ids, _warm_up(folder, ids, seed))


def _warm_up(folder: Path, ids: dict[str, str], seed: int) -> dict[str, torch.Tensor]:
    attempt = attempt_at(parse(JobSpec, warm_up_spec(ids, seed)), folder, None, 300)
    for step in range(1, 301):
        supervised.step(attempt, step)
        attempt.progress.step = step
        if step % 5 == 0 and exact(attempt) >= 0.2:
            break
    return {name: weight.detach().clone() for name, weight in attempt.policy.base.model.state_dict().items()}


def stepped(attempt: Attempt, off: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """CPU seconds of one rollout, and of its parts."""
    attempt.policy.base.scorer.packs = "packs" not in off
    clock: Any = attempt.tenure
    clock.check()
    clock.spent.clear()
    parts: dict[str, float] = defaultdict(float)
    gather = update.gather

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        found = gather(*args, **kwargs)
        parts["scoring"] += time.process_time() - began
        return found

    everything: Callable[..., Any] = (lambda self, rows: rows.counts >= 0) if "rows" in off else Objective.teaching
    with patch.object(Objective, "teaching", everything), patch.object(update, "gather", timed):
        began = time.process_time()
        rl.step(attempt, attempt.progress.step + 1)
        whole = time.process_time() - began
    attempt.progress.step += 1
    clock.check()
    parts |= clock.spent
    return whole, parts


def quiet_libraries() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    quiet_libraries()
    with warmed_up(asked.seed) as demo:
        attempts: dict[str, Attempt] = {}
        for way, off in WAYS.items():
            spec = gspo_spec(demo.ids, "ckpt_none", asked.seed) | {"model": {"source": "tiny"}}
            spec["rollout"]["rescore"] = "always" if "rescore" in off else "auto"
            attempts[way] = demo.attempt(parse(JobSpec, spec), 80 * 4)
        spent: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in WAYS}
        for _ in range(asked.steps):
            for way in random.sample(list(WAYS), len(WAYS)):
                spent[way].append(stepped(attempts[way], WAYS[way]))
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {asked.steps} rollouts, CPU ms")
        print(f"{'':12}{'early':>8}{'late':>8}{'all':>8}{'sample':>8}{'score':>8}{'update':>8}{'plain is':>10}{'exact':>8}")
        quarter = max(1, asked.steps // 4)
        plain = median(whole for whole, _ in spent["plain"])
        for way in WAYS:
            whole = [1000 * each for each, _ in spent[way]]
            mean = {
                part: fmean(1000 * parts.get(part, 0) for _, parts in spent[way])
                for part in ("sampling", "scoring", "updating")
            }
            numbers = median(whole[:quarter]), median(whole[-quarter:]), median(whole)
            numbers += mean["sampling"], mean["scoring"], mean["updating"] - mean["scoring"]
            row = "".join(f"{number:8.0f}" for number in numbers)
            print(f"{way:12}{row}{1000 * plain / median(whole):9.2f}x{exact(attempts[way]):8.3f}", flush=True)


if __name__ == "__main__":
    main()
