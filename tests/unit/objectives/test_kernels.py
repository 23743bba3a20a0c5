"""The fast twins against the plain ones, in value and gradient; and which of them runs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from workers.objectives import kernels

BOUNDS = (-0.5, 0.7)


@dataclass(frozen=True)
class Inputs:
    """B rows of T tokens. Behind the mask stand NaN, infinities or numbers."""

    values: Tensor  # [B, T]
    other: Tensor
    free: Tensor  # finite; up to 100, and some on the very bounds
    mask: Tensor
    lower: Tensor  # [B, 1], one of them open in each row
    upper: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def weights(self) -> Tensor:
        """The mask as weights."""
        return torch.where(self.mask, 0.25, 0.0).to(self.dtype)

    @property
    def ones(self) -> Tensor:
        """The mask as the twin that runs has it."""
        return kernels.as_mask(self.mask, self.dtype)


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-4, 1.0, 40.0]))

    def normal() -> Tensor:
        return torch.randn(rows, tokens, generator=generator, dtype=torch.float64)

    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)))
    behind = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0], dtype=torch.float64)
    poison = behind[torch.randint(4, (2, rows, tokens), generator=generator)]
    at = torch.randint(9, (rows, tokens), generator=generator)
    free = torch.where(at == 0, BOUNDS[0], torch.where(at == 1, BOUNDS[1], scale * normal())).clamp(-100, 100)
    good = torch.randint(2, (rows, 1), generator=generator).bool()
    ends = torch.full((rows, 1), torch.inf, dtype=torch.float64)
    return Inputs(
        values=torch.where(mask, scale * normal(), poison[0]),
        other=torch.where(mask, scale * normal(), poison[1]),
        free=free,
        mask=mask,
        lower=torch.where(good, -ends, BOUNDS[0]),
        upper=torch.where(good, BOUNDS[1], ends),
    )


def single(i: Inputs) -> Inputs:
    return Inputs(i.values.float(), i.other.float(), i.free.float(), i.mask, i.lower.float(), i.upper.float())


# What is computed with each, of every shape and kind of mask that it takes.
KERNELS: dict[str, Callable[[Inputs], tuple[Tensor, ...]]] = {
    "as_mask": lambda i: (i.ones != 0, kernels.as_mask(i.weights, i.dtype) != 0),
    "cleared": lambda i: (
        *(kernels.cleared(i.values, mask) for mask in (i.mask, i.ones, i.weights)),
        kernels.cleared(i.free[:, :1], i.ones),
        kernels.cleared(i.values.bfloat16(), i.ones),
    ),
    "difference": lambda i: (
        kernels.difference(i.values, i.other, i.ones, i.dtype),
        kernels.difference(i.values, None, i.mask, i.dtype),
        kernels.difference(i.values, i.other.bfloat16(), i.ones, torch.float64),
    ),
    "tokens_of": lambda i: (kernels.tokens_of(i.mask), kernels.tokens_of(i.ones)),
    "bounded_exp": lambda i: (kernels.bounded_exp(i.free), kernels.bounded_exp(i.free[:, :1])),
    "k3": lambda i: (kernels.k3(i.free),),
    "clamp": lambda i: (
        *kernels.clamp(i.free, i.lower, i.upper),
        *kernels.clamp(i.free[:, :1], i.lower, i.upper),
        *kernels.clamp(i.free[:, :1], i.lower.expand_as(i.free), i.upper.expand_as(i.free)),
    ),
    "row_sums": lambda i: (kernels.row_sums(i.values.detach(), i.ones), kernels.row_sums(i.values.detach(), i.weights)),
    "row_extremes": lambda i: kernels.row_extremes(i.values.detach(), i.ones),
    "row_kl": lambda i: (
        *kernels.row_kl(i.values.detach(), i.ones),
        *kernels.row_kl(i.values.detach(), i.ones, -1),
        *kernels.row_kl(kernels.cleared(i.values, i.ones), None),
    ),
}


def found(kernel: Callable[[Inputs], tuple[Tensor, ...]], i: Inputs) -> list[Tensor]:
    """Its values, and the gradient of their sum, each weighed by a number of its own."""
    leaves = [i.values.clone().requires_grad_(), i.free.clone().requires_grad_()]
    results = kernel(Inputs(leaves[0], i.other, leaves[1], i.mask, i.lower, i.upper))
    through = [result for result in results if result.requires_grad]
    weights = [torch.arange(1, result.numel() + 1, dtype=result.dtype).view_as(result).cos() for result in through]
    gradients = torch.autograd.grad(through, leaves, weights, allow_unused=True) if through else ()
    return [result.detach().to(i.dtype) for result in (*results, *gradients) if result is not None]


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(i=inputs())
def test_both_twins_agree(name: str, i: Inputs) -> None:
    for each, rtol, atol in ((i, 1e-12, 1e-14), (single(i), 1e-5, 1e-6)):
        fast = found(KERNELS[name], each)
        with kernels.plain():
            plain = found(KERNELS[name], each)
        assert len(fast) == len(plain)
        for a, b in zip(fast, plain, strict=True):
            assert_close(a, b, rtol=rtol, atol=atol)


def test_every_kernel_is_compared():
    functions = {name for name, function in vars(kernels).items() if inspect.isfunction(function) and name[0] != "_"}
    own = {name for name in functions if vars(kernels)[name].__module__ == kernels.__name__}
    assert own - {"plain", "surely_equal", "distinct"} == set(KERNELS)


def test_where_both_twins_must_not_look_the_fast_one_may():
    """Equal is known without waiting on a CPU only."""
    some = torch.tensor([1.0, 2.0])
    assert kernels.surely_equal(some, some.clone())
    assert not kernels.surely_equal(some, some + 1)
    with kernels.plain():
        assert not kernels.surely_equal(some, some)


def test_the_same_tensor_is_told_from_an_equal_one():
    a, b = torch.ones(2), torch.ones(2)
    once, places = kernels.distinct([a, b, a])
    assert places == [0, 1, 0]
    assert once[0] is a and once[1] is b and len(once) == 2
    with kernels.plain():
        once, places = kernels.distinct([a, b, a])
    assert [id(once[place]) for place in places] == [id(a), id(b), id(a)]


def test_which_twin_runs():
    """The fast one on a CPU, unless it is told not to, or torch compiles."""
    mask = torch.tensor([[True, False]])

    def of(mask: Tensor) -> Tensor:
        return kernels.as_mask(mask, torch.float32)

    assert of(mask).dtype == torch.int32
    with kernels.plain():
        assert of(mask).dtype == torch.bool
    assert of(mask).dtype == torch.int32
    assert torch.compile(of, fullgraph=True, backend="eager")(mask).dtype == torch.bool
    assert of(mask.to("meta")).dtype == torch.bool
