"""The correct axis: detached weights for tokens from a sampler whose probabilities differ slightly from the trainer's.

The raw weight is exp(log p_old - log p_rollout), pooled over a token, a segment or the sequence. It is constant during an
optimizer step: it is computed once from the whole step, and multiplies the surrogate, never the KL. The aggregation weights
still count every selected token, including those that the correction masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.objectives import ratio
from workers.objectives.kernels import bounded_exp, cleared, tokens_of


def over_tokens(weights: Tensor, mask_B_T: Tensor) -> Tensor:
    return cleared(weights, mask_B_T).sum() / mask_B_T.sum().clamp(min=1)


def over_sequences(weights: Tensor, mask_B_T: Tensor) -> Tensor:
    lengths_B = tokens_of(mask_B_T)
    means_B = cleared(weights, mask_B_T).sum(dim=1) / lengths_B.clamp(min=1)
    return means_B.sum() / (lengths_B > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class Level:
    """How token log ratios are pooled, and the units over which weights are averaged for `normalize`."""

    pool: ratio.Pool
    mean: Callable[[Tensor, Tensor], Tensor]


LEVELS: dict[str, Level] = {
    "token": Level(ratio.token, over_tokens),
    "geometric": Level(ratio.sequence, over_sequences),
    "product": Level(ratio.product, over_sequences),
    "segment": Level(ratio.segment, over_tokens),
}


@dataclass(frozen=True)
class Correction:
    """All [B, T]: the weights, the raw weights before any bound, and where they were bounded or masked."""

    weights: Tensor
    raw: Tensor
    truncated: Tensor
    masked: Tensor


def truncate(raw: Tensor, *, floor: float, cap: float, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(min(w, cap), floor)."""
    return raw.clamp(floor, cap), (raw > cap) | (raw < floor), torch.zeros_like(raw, dtype=torch.bool)


def mask(raw: Tensor, *, floor: float, cap: float, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """w inside [low, high], 0 outside."""
    masked = outside(raw, low, high)
    return raw.masked_fill(masked, 0.0), torch.zeros_like(masked), masked


def outside(raw: Tensor, low: float, high: float) -> Tensor:
    return (raw < low) | (raw > high)


# The action none has no function: without a correction there is nothing to compute.
ACTIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {"truncate": truncate, "mask": mask}


@torch.no_grad()
def correction(
    difference_B_T: Tensor,
    mask_B_T: Tensor,
    segments_B_T: Tensor | None = None,
    *,
    level: str,
    action: str,
    cap: float,
    low: float,
    high: float,
    weigh: bool,
    normalize: bool,
    floor: float = 0.0,
    mask_level: str | None = None,
) -> Correction:
    """The correction of a whole optimizer step from log p_old - log p_rollout (0 where masked).

    `weigh` false keeps the mask and sets the remaining weights to 1. `normalize` divides by the step's mean weight, over tokens
    or sequences according to the level. With `mask_level`, tokens are dropped by the raw weight at that level; the weights at
    `level` are computed (and normalised) as if none were dropped.
    """
    answers = ratio.AnswerTokens.of(mask_B_T, segments_B_T)

    def raw_at(level: str) -> Tensor:
        return bounded_exp(LEVELS[level].pool(difference_B_T, answers)).expand_as(mask_B_T)

    raw = raw_at(level)
    low_here, high_here = (low, high) if mask_level is None else (0.0, torch.inf)
    weights, truncated, masked = ACTIONS[action](raw, floor=floor, cap=cap, low=low_here, high=high_here)
    if not weigh:
        weights = (~masked).to(raw.dtype)
    if normalize:
        mean = LEVELS[level].mean(weights, mask_B_T)
        weights = weights / mean if mean > 0 else weights
    if mask_level is not None:
        masked = outside(raw_at(mask_level), low, high)
        weights = weights.masked_fill(masked, 0.0)
    return Correction(cleared(weights, mask_B_T), cleared(raw, mask_B_T), truncated & mask_B_T, masked & mask_B_T)


@torch.no_grad()
def fresh(delta_B_T: Tensor, advantages_B_T: Tensor, answers: ratio.AnswerTokens, *, sequence_delta: float) -> Tensor:
    """Tokens to keep: all except those with A < 0 in sequences whose mean of log p_old - log p exceeds the bound. [B, T]

    The policy has already moved away from those sequences (DeepSeek-V3.2, arXiv 2512.02556). `delta_B_T` is log p - log p_old.
    """
    return ~((advantages_B_T < 0) & (-ratio.sequence(delta_B_T, answers) > sequence_delta))
