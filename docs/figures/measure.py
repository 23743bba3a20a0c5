"""The numbers under the figures, from a real run: writes docs/figures/measured.json.

python docs/figures/measure.py          # trains for some minutes on a CPU
"""

import json
import platform
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rollouts import SUM_TOKENS, Run, Seen, record

from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Metrics, Objective

MEASURED = Path(__file__).with_name("measured.json")
# How the token log ratios are pooled: the ratio axis of an objective. A segment is one sum.
RATIOS: dict[str, Any] = {
    "token": "token",
    "segment": {"kind": "segment", "chunk": SUM_TOKENS},
    "sequence": "sequence",
    "product": "product",
}
LENGTHS = (1, 15, 30, 60, 120, 240, 1000)  # bounds of the groups by length, in answer tokens
WIDTHS = [round(10 ** (k / 6 - 4), 6) for k in range(24)]  # of the clip, on both sides: 1e-4 to 0.68
NAMED_WIDTHS = (3e-4, 0.2)  # GSPO's lower bound and GRPO's


def measure(run: Run) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        seen, rewards = record(run, Path(folder))
    return {
        "run": asdict(run),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "answers": sum(len(part.advantages) for part in seen),
        "tokens": sum(int(part.response_mask.sum()) for part in seen),
        "reward": [round(reward, 4) for reward in rewards],
        "spread": spread(seen),
        "ratio": {name: extremes(seen, ratio) for name, ratio in RATIOS.items()},
        "widths": WIDTHS,
        "clipped": {
            name: [rounded(clipped(seen, RATIOS[name], width)) for width in WIDTHS] for name in ("token", "segment", "sequence")
        },
        "clipped_at": {
            name: {f"{width:g}": rounded(clipped(seen, RATIOS[name], width)) for width in NAMED_WIDTHS}
            for name in ("token", "segment", "sequence")
        },
    }


def loss(part: Seen, ratio: Any, clip: float = 0.2) -> LossOutputs:
    """Our objective on what the run saw, under another ratio and another clip."""
    surrogate = {"kind": "ppo", "clip_low": clip, "clip_high": clip}
    objective = Objective(ObjectiveSpec.model_validate({"ratio": ratio, "surrogate": surrogate}).resolve())
    step = objective.prepare(
        response_mask=part.response_mask, advantages=part.advantages, old_log_probs=part.old_log_probs.double()
    )
    return objective.loss(part.log_probs.double(), step.rows())[1]


def spread(seen: list[Seen]) -> list[dict[str, float]]:
    """The standard deviation of the log ratio, for answers of about the same length."""
    rows = []
    for low, high in pairwise(LENGTHS):
        chosen = [(part, part.response_mask.sum(1)) for part in seen]
        lengths = torch.cat([n[(low <= n) & (n < high)] for _, n in chosen]).double()
        row = {"answers": len(lengths), "tokens": float(lengths.median())}
        for name, ratio in RATIOS.items():
            values = []
            for part, n in chosen:
                log_ratio, mask = loss(part, ratio).log_importance_ratio, part.response_mask & (low <= n.unsqueeze(1))
                values.append(log_ratio[mask & (n.unsqueeze(1) < high)])
            row[name] = rounded(float(torch.cat(values).std()))
        rows.append(row)
    return rows


def extremes(seen: list[Seen], ratio: Any) -> dict[str, float]:
    """Least and greatest ratio, and the bounds that hold nine tenths of the tokens."""
    values = torch.cat([loss(part, ratio).ratio[part.response_mask] for part in seen])
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=values.dtype))
    return {name: rounded(float(x)) for name, x in (("min", values.min()), ("p5", low), ("p95", high), ("max", values.max()))}


def clipped(seen: list[Seen], ratio: Any, width: float) -> float:
    """The share of answer tokens that the clip leaves without a gradient, as the metrics say it."""
    metrics = Metrics()
    for part in seen:
        metrics += loss(part, ratio, width).metrics
    finished = metrics.finish()
    return finished["policy/clip_fraction_low"] + finished["policy/clip_fraction_high"]


def rounded(value: float) -> float:
    """To four digits: more than the figures show."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    MEASURED.write_text(json.dumps(measure(Run()), indent=1) + "\n")
