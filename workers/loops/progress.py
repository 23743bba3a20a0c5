"""A job's progress: the part of a checkpoint that is neither weights nor optimizer, stored as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Self

import orjson

from service.spec.job import EarlyStopping, KeepBest

FILE = "progress.json"


@dataclass
class Progress:
    """Everything a resumed loop needs to go on as if nothing had happened."""

    step: int = 0
    skipped_in_a_row: int = 0  # optimizer steps with a non-finite gradient
    evaluated_at: int | None = None
    initial: dict[str, float] = field(default_factory=dict)  # the first evaluation
    last: dict[str, float] = field(default_factory=dict)  # the newest evaluation
    best: float | None = None  # best value of the early-stopping metric
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    implausible: list[str] = field(default_factory=list)  # metrics that were beyond belief at the last step
    signs: dict[str, int] = field(default_factory=dict)  # that nothing is learnt: how many steps in a row each was shown
    rescores: bool = False  # the sampler's log_probs were once not those of the trainer (rollout.rescore: auto)
    noise_told: bool = False  # the warning that rounding exceeds the objective's clips was given
    leaders: dict[str, list[float]] = field(default_factory=dict)  # by mode and metric: the values that are kept as the best

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(**orjson.loads((folder / FILE).read_bytes()))

    def evaluated(self, step: int, metrics: dict[str, float], rule: EarlyStopping | None) -> None:
        """Record an evaluation. `rule` says which metric counts and how much better is an improvement."""
        self.evaluated_at, self.last = step, metrics
        if not self.initial:
            self.initial = metrics
        if rule is None or rule.metric not in metrics:
            return
        value = metrics[rule.metric]
        if not isfinite(value):  # no best, and none could be better than it
            self.stale += 1
            return
        gain = float("inf") if self.best is None else (value - self.best) * (1 if rule.mode == "max" else -1)
        if gain > rule.min_delta:
            self.best, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1

    def leads(self, rules: Sequence[KeepBest]) -> bool:
        """Whether the newest evaluation is among the best that a rule keeps. To be asked once an evaluation."""
        led = False
        for rule in rules:
            if (value := self.last.get(rule.metric)) is None or not isfinite(value):
                continue
            kept = self.leaders.setdefault(f"{rule.mode} {rule.metric}", [])
            best = sorted([*kept, value], reverse=rule.mode == "max")[: rule.count]
            led = led or best != kept
            kept[:] = best
        return led

    def reason_to_stop(self, rule: EarlyStopping | None) -> str | None:
        """`target_reached` or `no_improvement` right after an evaluation, else None."""
        if rule is None or self.evaluated_at != self.step or rule.metric not in self.last:
            return None
        value: float | None = self.last[rule.metric]  # a stored one that is not finite is null
        if (
            rule.target is not None
            and value is not None
            and (value >= rule.target if rule.mode == "max" else value <= rule.target)
        ):
            return "target_reached"
        if rule.patience is not None and self.stale >= rule.patience:
            return "no_improvement"
        return None

    def result(self, ended: str) -> dict[str, Any]:
        return {
            "ended": ended,
            "steps": self.step,
            "initial": self.initial,
            "final": self.last,
            "best": None if self.best is None else {"value": self.best, "step": self.best_step},
        }
