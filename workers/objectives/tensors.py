"""Masked arithmetic that the axes share. Shapes: B sequences, T tokens; masks are boolean.

On a CPU some obvious operations are slow, and there are others that give the same: comparisons that answer in booleans and
torch.where take 4 to 20 times as long as arithmetic does. Hence flags are numbers, and a mask clears bits: floats taken for
integers, times 1 or 0, are what they were, or 0, were they NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: far beyond every clip, and its square is still finite in float32
BLOCK = 2**17  # cells: temporaries are half a megabyte, and a call into torch costs little beside the work on them


def blocks(like_B_T: Tensor, size: int = 1) -> list[slice]:
    """Rows to take at a time on a CPU, so that temporaries stay small (of so many BLOCKs); all of them on other devices. At
    least one slice."""
    rows, tokens = like_B_T.shape
    at_once = max(1, size * BLOCK // max(1, tokens) if like_B_T.device.type == "cpu" else rows)
    return [slice(first, first + at_once) for first in range(0, max(1, rows), at_once)]


# ---------------------------------------------------------------- masks


def ones_of(mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """1 where a mask is set (or where a weight is not 0), 0 elsewhere, in integers: of the width of `dtype`, which are cleared
    by fastest, or of one that costs nothing here."""
    if mask.is_floating_point():
        mask = flag(torch.ne, mask, 0.0).to(torch.int32)
    elif mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return mask if dtype is None else mask.to(INTEGERS[dtype])


def neutral(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set, 0 elsewhere: what stands behind the mask, NaN too, has no effect. Without a graph."""
    if values.shape != mask.shape or values.dtype not in INTEGERS:
        return torch.where(mask, values.detach(), 0.0)
    return cleared(values, ones_of(mask))


def cleared(values: Tensor, ones: Tensor) -> Tensor:
    """As `neutral`, with the mask as `ones_of` gives it."""
    values = values.detach()
    return (values.view(INTEGERS[values.dtype]) * ones).view(values.dtype)


def less(values_B_T: Tensor, other_B_T: Tensor | None, ones_B_T: Tensor, dtype: torch.dtype) -> Tensor:
    """values - other (None: nothing) where there is a one, 0 elsewhere, in `dtype`; so is the gradient of `values`. [B, T]"""
    return _Less.apply(values_B_T, other_B_T, ones_B_T, dtype)  # pyright: ignore[reportReturnType]


INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # of the same width


class _Less(torch.autograd.Function):
    """A difference of two tensors under a mask; nothing but the mask is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, other: Tensor | None, ones: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ones)
        ctx.dtype = values.dtype
        result = values.to(dtype, copy=True) if other is None else torch.sub(values.to(dtype), other.to(dtype))
        result.view(INTEGERS[dtype]).mul_(ones)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (ones,) = ctx.saved_tensors
        return cleared(grads[0], ones).to(ctx.dtype), None, None, None


def tokens_of(mask_B_T: Tensor) -> Tensor:
    """Tokens a row, of a boolean mask or of its ones. [B]"""
    return ones_of(mask_B_T).sum(dim=1, dtype=torch.int32)


# ---------------------------------------------------------------- bounds


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp that stays finite, as does its gradient."""
    return torch.nn.functional.hardtanh(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # clamp with a faster gradient


def flag(compare: Callable[..., Tensor], a: Tensor, b: Tensor | float) -> Tensor:
    """A comparison (torch.lt, ...) that answers with 1 and 0 in the dtype of `a`."""
    # torch.broadcast_shapes takes longer than the comparison
    shape = a.shape if not isinstance(b, Tensor) else [m if n == 1 else n for n, m in zip(a.shape, b.shape, strict=True)]
    return compare(a.detach(), b, out=torch.empty(shape, dtype=a.dtype, device=a.device))


def clamped(values: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Callable[[], Tensor], Callable[[], Tensor]]:
    """torch.clamp between tensors that broadcast against `values`, and where it was below and above them (flags of any type).

    Of a value outside of the bounds the gradient is 0, at a bound it is 1.
    """
    if values.shape == lower.shape == (len(values), 1):  # torch's own looks again for the gradient: of many values, too long
        seen = values.detach()
        return torch.clamp(values, lower, upper), lambda: seen < lower, lambda: seen > upper
    bounded, below, above = _Clamped.apply(values, lower, upper)  # pyright: ignore[reportGeneralTypeIssues]
    return bounded, lambda: below, lambda: above


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below, above = flag(torch.lt, values, lower), flag(torch.gt, values, upper)
        ctx.save_for_backward(below, above)
        ctx.mark_non_differentiable(below, above)
        ctx.set_materialize_grads(False)  # no zeros as their gradients
        return torch.maximum(torch.minimum(values, upper), lower), below, above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[0] is None:
            return None, None, None
        below, above = ctx.saved_tensors
        grad = torch.addcmul(grads[0], grads[0], below, value=-1)
        return grad.addcmul_(grads[0], above, value=-1), None, None


# ---------------------------------------------------------------- shapes and groups


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
