"""Small things that the axes share. Shapes: B sequences, T tokens."""

import torch
from torch import Tensor


def either(condition: Tensor, then: float, otherwise: float, like: Tensor) -> Tensor:
    """torch.where of two numbers in the dtype of `like`; torch.where itself would give float32."""
    return like.new_full(condition.shape, otherwise).masked_fill_(condition, then)


def by_column(values: Tensor) -> Tensor:
    """[B] as [B, 1], so that it broadcasts over tokens and not over rows; [B, ...] unchanged."""
    return values.unsqueeze(1) if values.dim() == 1 else values


def group_indices(group_ids_B: Tensor) -> tuple[Tensor, int]:
    """Renumber arbitrary ids to 0..groups-1. Returns the indices and the number of groups."""
    ids, index_B = torch.unique(group_ids_B, return_inverse=True)
    return index_B, ids.numel()


def group_sum(values_B: Tensor, index_B: Tensor, groups: int) -> Tensor:
    """Sum of each group's values. [groups]"""
    return torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add(0, index_B, values_B)
