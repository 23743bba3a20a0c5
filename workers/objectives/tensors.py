"""Masked arithmetic that the axes share. Shapes: B sequences, T tokens; masks are boolean."""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: far beyond every clip, and its square is still finite in float32


def neutral(values_B_T: Tensor, mask_B_T: Tensor, value: float = 0.0) -> Tensor:
    """`values` where the mask is set, `value` elsewhere: what stands behind the mask reaches neither loss nor gradient."""
    return torch.where(mask_B_T, values_B_T, value)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp that stays finite, as does its gradient."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def lengths_of(mask_B_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens a row, at least 1 so that it can be divided by. [B, 1]"""
    return mask_B_T.to(dtype).sum(dim=1, keepdim=True).clamp(min=1)


def by_column(values: Tensor) -> Tensor:
    """[B] as [B, 1], so that it broadcasts over tokens and never over rows; [B, ...] as it is."""
    return values.unsqueeze(1) if values.dim() == 1 else values


def group_indices(group_ids_B: Tensor) -> tuple[Tensor, int]:
    """Any ids as indices 0..groups-1, and how many groups there are."""
    ids, index_B = torch.unique(group_ids_B, return_inverse=True)
    return index_B, ids.numel()


def group_sum(values_B: Tensor, index_B: Tensor, groups: int) -> Tensor:
    """Sum of each group's values. [groups]"""
    return torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add(0, index_B, values_B)
