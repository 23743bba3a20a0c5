"""What is left out before the aggregation weights are computed: whole answers, or tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """The inputs of the selectors; None if the caller does not have them."""

    truncated_B: Tensor | None = None
    without_spread_B: Tensor | None = None
    entropy_B_T: Tensor | None = None


def truncated(mask_B_T: Tensor, facts: Facts, wanted: float) -> Tensor:
    """Leave out answers that the token limit cut off (DAPO's overlong filter, arXiv 2503.14476)."""
    if facts.truncated_B is None:
        raise ValueError("select.truncated needs `truncated` [B]")
    return mask_B_T & ~facts.truncated_B.bool().unsqueeze(1)


def zero_variance(mask_B_T: Tensor, facts: Facts, wanted: float) -> Tensor:
    """Leave out groups whose rewards are all equal (DAPO's dynamic sampling, without the resampling)."""
    if facts.without_spread_B is None:
        raise ValueError("select.zero_variance needs `rewards` and `group_ids` [B]")
    return mask_B_T & ~facts.without_spread_B.unsqueeze(1)


def top_entropy(mask_B_T: Tensor, facts: Facts, share: float) -> Tensor:
    """Keep the share of the batch's tokens with the highest entropy (arXiv 2506.01939)."""
    if facts.entropy_B_T is None:
        raise ValueError("select.top_entropy needs `entropy` [B, T]")
    tokens = facts.entropy_B_T[mask_B_T].double()
    if tokens.numel() == 0:
        return mask_B_T
    return mask_B_T & (facts.entropy_B_T >= torch.quantile(tokens, 1 - share))


SELECTORS: dict[str, Callable[[Tensor, Facts, float], Tensor]] = {
    "truncated": truncated,
    "zero_variance": zero_variance,
    "top_entropy": top_entropy,
}


@torch.no_grad()
def select(mask_B_T: Tensor, facts: Facts, **wanted: float | bool | None) -> Tensor:
    """The mask after all enabled selectors. Each selector sees the original mask."""
    selected_B_T = mask_B_T
    for name, value in wanted.items():
        if value:
            selected_B_T = selected_B_T & SELECTORS[name](mask_B_T, facts, value)
    return selected_B_T
