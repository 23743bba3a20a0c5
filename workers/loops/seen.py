"""What the loss saw of the answers that are kept: each token's log-probs, its ratio, and whether a clip held."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.loops.update import Experience
from workers.objectives.outputs import LossOutputs
from workers.policy.text import Text
from workers.rollout.engine import Completion

MOST_TOKENS = 512  # of one answer that are kept
MOST_IN_ALL = 8192  # of all kept answers of a step together; each then gets the same share
DIGITS = 4


@dataclass
class Seen:
    """The first `rows` answers of a rollout. Each optimizer step replaces what the one before has left, so that the last one
    on an answer is kept: its ratio has moved the furthest."""

    rows: int

    def __post_init__(self) -> None:
        self.most = max(1, min(MOST_TOKENS, MOST_IN_ALL // max(1, self.rows)))
        self._of: dict[int, dict[str, Any]] = {}

    def look(self, rows: Sequence[int], log_probs: Tensor, outputs: LossOutputs) -> None:
        """`rows` are the places in the rollout of the B rows of `log_probs` [B, T] and of the outputs."""
        here = [place for place, row in enumerate(rows) if row < self.rows]
        if not here:
            return
        tensors = {
            "log_probs": log_probs.detach(),
            "ratio": outputs.ratio.expand_as(log_probs),
            "low": outputs.clipped_low.expand_as(log_probs),
            "high": outputs.clipped_high.expand_as(log_probs),
            "dual": outputs.clipped_dual.expand_as(log_probs),
            "counts": (outputs.weights != 0).expand_as(log_probs),
        }
        columns = {name: tensor[here, : self.most].float().tolist() for name, tensor in tensors.items()}
        for number, place in enumerate(here):
            self._of[rows[place]] = {name: column[number] for name, column in columns.items()}

    def told(self, experience: Experience, completions: Sequence[Completion], text: Text) -> list[dict[str, Any]]:
        """For each of the answers what is kept of it, beside its text and its rewards."""
        kept = [completion.tokens[: self.most] for completion in completions[: self.rows]]
        pieces = text.pieces(token for tokens in kept for token in tokens)
        advantages = experience.advantages[: self.rows].float()
        if advantages.dim() == 2:
            mask = experience.response_mask[: self.rows]
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        old = experience.old_log_probs[: self.rows, : self.most].float().tolist()
        return [
            {
                "advantage": _rounded(advantage),
                "by_token": {
                    "text": [pieces[token] for token in tokens],
                    "old_log_probs": [_rounded(value) for value in old_row[: len(tokens)]],
                    **_columns(self._of.get(row), len(tokens)),
                },
            }
            for row, (advantage, tokens, old_row) in enumerate(zip(advantages.tolist(), kept, old, strict=True))
        ]


def _columns(seen: dict[str, Any] | None, tokens: int) -> dict[str, list[Any]]:
    """null stands for a token that the loss did not count."""
    if seen is None:
        return {"log_probs": [None] * tokens, "ratio": [None] * tokens, "clipped": [None] * tokens}
    counts = seen["counts"][:tokens]

    def counted(values: list[float]) -> list[float | None]:
        return [_rounded(value) if counts_here else None for value, counts_here in zip(values, counts, strict=False)]

    clipped = [
        next((name for name in ("dual", "low", "high") if seen[name][place]), None) for place in range(min(tokens, len(counts)))
    ]
    return {"log_probs": counted(seen["log_probs"]), "ratio": counted(seen["ratio"]), "clipped": clipped}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
