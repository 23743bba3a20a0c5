"""Optimizer steps that are skipped because their loss or gradient is not finite: count them and name their rows."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.errors import JobFailed
from workers.loops.progress import Progress
from workers.tenure.tenure import EventRow

NAMED = 64  # rows in one event
MAX_SKIPPED_IN_A_ROW = 10  # optimizer steps with a non-finite gradient before the job fails


@dataclass
class Suspects:
    """Watches the micro-batches of one optimizer step. Nothing is read back from the device unless the step is skipped."""

    _seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def watch(self, share: Tensor, log_probs: Tensor, index: Tensor) -> Tensor:
        """Note `share`, the loss (a scalar) of the rows `index` [b] with these log_probs [b, T], and return it unchanged."""
        self._seen.append((share.detach(), torch.isfinite(log_probs.detach()).all(1), index))
        return share

    def name(self) -> tuple[str, list[int]]:
        """The cause, `loss` or `gradient`, and the suspected rows. These are the rows whose log_probs are not finite; if there
        are none, all rows of a micro-batch whose loss is not finite; if only the gradient is not finite, all rows."""
        poisoned = [(finite, index) for share, finite, index in self._seen if not torch.isfinite(share)]
        rows = [row for finite, index in poisoned for row in index[~finite].tolist()]
        rows = rows or [row for _, index in poisoned for row in index.tolist()]
        if rows:
            return "loss", sorted(rows)
        return "gradient", sorted(row for _, _, index in self._seen for row in index.tolist())


def step_skipped(step: int, minibatch: int, cause: str, rows: list[dict[str, Any]]) -> EventRow:
    """The event about a skipped optimizer step. `rows` name its suspected rows by their place in the data."""
    return "step_skipped", {"step": step, "minibatch": minibatch, "cause": cause, "rows": rows[:NAMED], "count": len(rows)}


def count_skipped(progress: Progress, skipped: bool, step: int) -> None:
    """Count skipped optimizer steps. Too many in a row raise JobFailed."""
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise JobFailed(
            "non_finite_loss",
            f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} optimizer steps in a row, up to step {step}",
        )
