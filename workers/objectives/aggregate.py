"""The aggregate axis: weights w [B, T] such that the loss of an optimizer step is sum(w * L).

They are computed once, from the mask of the whole step. Splitting the step into micro-batches or over ranks therefore changes
neither loss nor gradient. A fully masked row counts nowhere; without any token every weight is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.objectives import kernels
from workers.objectives.tensors import group_indices, group_sum


@dataclass(frozen=True)
class Counts:
    """Counts of a whole optimizer step, in the weights' dtype."""

    tokens_B: Tensor  # n_i
    group_ids_B: Tensor | None
    longest: float  # the longest possible answer

    @property
    def tokens(self) -> Tensor:
        """N"""
        return self.tokens_B.sum()

    @property
    def rows(self) -> Tensor:
        """Rows that have tokens."""
        return (self.tokens_B > 0).sum().double()


def token(c: Counts) -> Tensor:
    """1 / N."""
    return (1 / c.tokens.clamp(min=1)).expand_as(c.tokens_B)


def seq(c: Counts) -> Tensor:
    """1 / (rows n_i): the mean over sequences of their token means."""
    return 1 / (c.rows.clamp(min=1) * c.tokens_B.clamp(min=1))


def prompt(c: Counts) -> Tensor:
    """1 / (groups N_g): the token mean of a group, then the mean over groups (DAPO as printed, arXiv 2503.14476, eq. 8)."""
    if c.group_ids_B is None:
        raise ValueError("aggregate prompt needs group_ids [B]")
    index, groups = group_indices(c.group_ids_B)
    tokens = group_sum(c.tokens_B, index, groups)
    return 1 / ((tokens > 0).sum().clamp(min=1) * tokens.clamp(min=1))[index]


def seq_sum(c: Counts) -> Tensor:
    """1 / rows: the mean over sequences of their token sums."""
    return (1 / c.rows.clamp(min=1)).expand_as(c.tokens_B)


def constant(c: Counts, *, constant: float | None = None) -> Tensor:
    """1 / (rows C) with C the longest possible answer, or the given number (Dr. GRPO, arXiv 2503.20783)."""
    return seq_sum(c) / (c.longest if constant is None else constant)


def total(c: Counts) -> Tensor:
    """1: the plain sum."""
    return torch.ones_like(c.tokens_B)


AGGREGATES: dict[str, Callable[..., Tensor]] = {
    "token": token,
    "seq": seq,
    "prompt": prompt,
    "seq_sum": seq_sum,
    "constant": constant,
    "sum": total,
}


def weights(
    mask_B_T: Tensor,
    *,
    kind: str,
    length_power: float = 0.0,
    group_ids_B: Tensor | None = None,
    longest: float | None = None,
    tokens_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **parameters: float | None,
) -> Tensor:
    """The weights [B, T] of a whole optimizer step, 0 where masked. Computed in float64. The mask is boolean or from `kernels`.

    `length_power`: each row's weight is multiplied by n_i to this power (LUSPO, arXiv 2602.05261: 1). `longest` is the longest
    possible answer, by default T. `tokens_B`: each row's unmasked tokens, if already known.
    """
    tokens_B = (kernels.tokens_of(mask_B_T) if tokens_B is None else tokens_B).double()
    counts = Counts(
        tokens_B=tokens_B,
        group_ids_B=group_ids_B,
        longest=float(max(1, mask_B_T.shape[1]) if longest is None else longest),
    )
    weights_B = AGGREGATES[kind](counts, **parameters)
    if length_power:
        weights_B = weights_B * tokens_B.clamp(min=1).pow(length_power)
    return kernels.cleared(weights_B.to(dtype).unsqueeze(1).expand(mask_B_T.shape), mask_B_T)


def rows(token_loss: Tensor, weights_B_T: Tensor, row_weights_B: Tensor) -> Tensor:
    """sum_t w L of each row, [B]. A loss [B, 1] is constant over the row: it is multiplied by `row_weights_B`, sum_t w."""
    if token_loss.shape != weights_B_T.shape:
        return token_loss.squeeze(1) * row_weights_B
    return (token_loss * weights_B_T).sum(dim=1)
