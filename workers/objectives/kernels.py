"""Functions written for speed on a CPU. Each has a plain twin, which defines what it computes.

On a CPU, comparisons that give booleans, and torch.where, take 4 to 20 times as long as arithmetic. Three tricks avoid them. A
mask is integers as wide as the floats that it clears: the float's bits times 1 are unchanged, times 0 they are 0, even for NaN.
Flags are 1 and 0 in the dtype of the compared values. Gradients for which torch would use comparisons are written by hand.

The fast twin runs on a CPU. The plain twin runs on every other device, under torch.compile (which makes fast code of plain
operations by itself) and inside `plain()`. Both accept masks and flags of either kind. Shapes: B sequences, T tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: far beyond every clip, and its square is still finite in float32
BLOCK = 2**17  # cells: temporaries take half a megabyte, and the overhead of a call into torch is small in comparison
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # of the same width
LOG2_E = math.log2(math.e)

_plain_only = False


@contextmanager
def plain() -> Iterator[None]:
    """Use only plain twins, on any device. Affects the whole process; for tests."""
    global _plain_only
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


def _fast(like: Tensor) -> bool:
    return not torch.compiler.is_compiling() and like.is_cpu and not _plain_only


# ---------------------------------------------------------------- masks


def as_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a mask of any type is set, or a weight is not 0. Plain: booleans; fast: integers 1 and 0, as wide as `dtype`
    (float32 or float64)."""
    if not _fast(mask):
        return mask.bool()
    if mask.is_floating_point():
        mask = _flags(torch.ne, mask, 0.0)
    elif mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    wanted = INTEGERS[dtype]
    return mask if mask.dtype == wanted else mask.to(wanted)


def cleared(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set, 0 elsewhere, even for NaN. Without a graph."""
    values = values.detach()
    if not _fast(values) or values.shape != mask.shape or values.dtype not in INTEGERS:
        return torch.where(mask.bool(), values, 0.0)
    return (values.view(INTEGERS[values.dtype]) * as_mask(mask, values.dtype)).view(values.dtype)


def difference(values: Tensor, other: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """values - other (other None: values) in `dtype` where the mask is set, 0 elsewhere. The gradient of `values` is masked
    in the same way; `other` gets none."""
    if _fast(values):
        return _Difference.apply(values, other, as_mask(mask, dtype), dtype)  # pyright: ignore[reportReturnType]
    moved = values.to(dtype) if other is None else values.to(dtype) - other.detach().to(dtype)
    return torch.where(mask.bool(), moved, 0.0)


class _Difference(torch.autograd.Function):
    """Saves only the mask for the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, other: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = values.dtype
        result = values.to(dtype, copy=True) if other is None else torch.sub(values.to(dtype), other.to(dtype))
        result.view(INTEGERS[dtype]).mul_(mask)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return cleared(grads[0], mask).to(ctx.dtype), None, None, None


def tokens_of(mask_B_T: Tensor) -> Tensor:
    """How many tokens are set in each row of a mask. [B], integers"""
    if _fast(mask_B_T) and mask_B_T.dtype == torch.bool:
        mask_B_T = mask_B_T.view(torch.uint8)
    return mask_B_T.sum(dim=1, dtype=torch.int32)


# ---------------------------------------------------------------- formulas


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the log ratio clamped to +-MAX_LOG_RATIO, so that it is finite. The gradient is 0 beyond the bounds (in the fast
    twin also at a bound)."""
    if _fast(log_ratio):
        return torch.nn.functional.hardtanh(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # clamp with a faster gradient
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k3(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x, with a bounded exponential. For tiny x expm1 keeps the digits of the tiny result."""
    if _fast(x):
        return _K3.apply(x)  # pyright: ignore[reportReturnType]
    return torch.expm1((-x).clamp(max=MAX_LOG_RATIO)) + x


class _K3(torch.autograd.Function):
    """k3 and its derivative 1 - exp(-x), in three passes. Where the exponential is bounded, the derivative is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        grown = torch.neg(x).clamp_(max=MAX_LOG_RATIO).expm1_()
        ctx.save_for_backward(x, grown)
        return grown + x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, grown = ctx.saved_tensors
        through_exp = torch.addcmul(grads[0], grads[0], grown)
        torch.ops.aten.hardtanh_backward.grad_input(through_exp, x, -MAX_LOG_RATIO, torch.inf, grad_input=through_exp)
        return through_exp.neg_().add_(grads[0])


def clamp(values: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.clamp with bounds that broadcast against `values`; and flags (1 or True) for values below and above the bounds.

    The gradient of a value outside the bounds is 0, at a bound it is 1.
    """
    one_a_row = values.shape[1] == 1 and values.shape == lower.shape  # so few values that torch.clamp is faster
    if not one_a_row and _fast(values):
        return _Clamp.apply(values, lower, upper)  # pyright: ignore[reportReturnType]
    seen = values.detach()
    return torch.clamp(values, lower, upper), seen < lower, seen > upper


class _Clamp(torch.autograd.Function):
    """Compares once; torch.clamp would compare again for the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below, above = _flags(torch.lt, values, lower), _flags(torch.gt, values, upper)
        ctx.save_for_backward(below, above)
        ctx.mark_non_differentiable(below, above)
        ctx.set_materialize_grads(False)  # no tensors of zeros as gradients of the flags
        return torch.maximum(torch.minimum(values, upper), lower), below, above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[0] is None:
            return None, None, None
        below, above = ctx.saved_tensors
        grad = torch.addcmul(grads[0], grads[0], below, value=-1)
        return grad.addcmul_(grads[0], above, value=-1), None, None


def _flags(compare: Callable[..., Tensor], a: Tensor, b: Tensor | float) -> Tensor:
    """A comparison (torch.lt, ...) whose result is 1 and 0 in the dtype of `a`."""
    # torch.broadcast_shapes takes longer than the comparison
    shape = a.shape if not isinstance(b, Tensor) else [m if n == 1 else n for n, m in zip(a.shape, b.shape, strict=True)]
    return compare(a.detach(), b, out=torch.empty(shape, dtype=a.dtype, device=a.device))


# ---------------------------------------------------------------- reductions over the tokens of each row, for metrics


def row_sums(values_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """[B]"""
    return _by_block(lambda values, mask: cleared(values, mask).sum(dim=1), values_B_T, mask_B_T)


def row_extremes(values_B_T: Tensor, mask_B_T: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest unmasked value of each row, each [B]; inf and -inf if a row has none. T is at least 1."""
    if not _fast(values_B_T):
        inside = mask_B_T.bool()
        least_B_T, greatest_B_T = (torch.where(inside, values_B_T, end) for end in (torch.inf, -torch.inf))
        return least_B_T.amin(dim=1), greatest_B_T.amax(dim=1)
    least_B, greatest_B = _by_block(_extremes, values_B_T, mask_B_T).unbind(1)
    return least_B, greatest_B


def _extremes(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 2]"""
    values = cleared(values, mask)
    beyond = (as_mask(mask, values.dtype) - 1).bitwise_and_(_INFINITE[values.dtype]).view(values.dtype)  # inf where not counted
    least_B = (values + beyond).amin(dim=1)
    return torch.stack([least_B, values.sub_(beyond).amax(dim=1)], dim=1)


_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # the bits of infinity


def row_kl(x_B_T: Tensor, mask_B_T: Tensor | None, sign: int = 1) -> tuple[Tensor, Tensor]:
    """The sums of k1 and of k3 of sign * x, each [B]. Without a mask, x must be 0 where a token does not count.

    The fast k3 uses exp2, which takes a quarter of the time of expm1. It may be off by 6e-8 per token in float32, which
    averages out. (exp is faster still, but its errors have one sign.)
    """
    if not _fast(x_B_T):
        x_B_T = sign * (x_B_T if mask_B_T is None else cleared(x_B_T, mask_B_T))
        return x_B_T.sum(dim=1), k3(x_B_T).sum(dim=1)
    masks = () if mask_B_T is None else (mask_B_T,)
    k1_B, k3_B = _by_block(partial(_kl, sign=sign), x_B_T, *masks, size=2).unbind(1)  # 2: it makes few temporaries
    return k1_B, k3_B


def _kl(x: Tensor, mask: Tensor | None = None, *, sign: int) -> Tensor:
    """[B, 2]"""
    if mask is not None:
        x = cleared(x, mask)
    k1_B = x.sum(dim=1).mul_(sign)
    growth_B = x.mul(-sign * LOG2_E).clamp_(max=MAX_LOG_RATIO * LOG2_E).exp2_().sub_(1).sum(dim=1)
    return torch.stack([k1_B, growth_B.add_(k1_B).clamp_(min=0)], dim=1)


def _by_block(reduce: Callable[..., Tensor], *tensors_B_T: Tensor, size: int = 1) -> Tensor:
    """On a CPU, reduce `size` BLOCKs of rows at a time, so that temporaries stay small; elsewhere all rows at once."""
    rows, tokens = tensors_B_T[0].shape
    at_once = max(1, size * BLOCK // max(1, tokens))
    if rows <= at_once or not _fast(tensors_B_T[0]):
        return reduce(*tensors_B_T)
    return torch.cat([reduce(*parts) for parts in zip(*(tensor.split(at_once) for tensor in tensors_B_T), strict=True)])


def surely_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, if this is known without waiting for the device; else False. Plain: False."""
    return _fast(a) and torch.equal(a, b)


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors without repetitions, and each one's place in that list. Plain: no repetitions are detected."""
    if _plain_only:
        return list(tensors), list(range(len(tensors)))
    place_of: dict[int, int] = {}  # by `id`, which is unique while the tensor is held here
    once: list[Tensor] = []
    for tensor in tensors:
        if id(tensor) not in place_of:
            place_of[id(tensor)] = len(once)
            once.append(tensor)
    return once, [place_of[id(tensor)] for tensor in tensors]
