"""torch.compile takes every objective as one graph, and computes the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from service.spec.presets import PRESETS
from workers.objectives import Rows, kernels

SEGMENTS: Any = {"ratio": {"kind": "segment", "chunk": 2}}


@pytest.mark.parametrize("spec", [*PRESETS, SEGMENTS], ids=str)
def test_every_presets_loss_is_one_graph(spec, make_objective):
    """aot_eager traces forward and backward as every backend gets them, and then calls torch: what inductor makes of the same
    graphs takes a C++ compiler and minutes, and is not ours."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(4, 6, generator=generator, dtype=torch.float64)

    log_probs = -normal().abs() - 0.1
    mask = torch.rand(4, 6, generator=generator) < 0.7
    objective = make_objective(spec)
    step = objective.prepare(
        response_mask=mask,
        advantages=torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64),
        group_ids=torch.tensor([0, 0, 1, 1]),
        **{f"{name}_log_probs": log_probs + 0.3 * normal() for name in ("old", "rollout", "ref")},
    )

    def loss(log_probs: Tensor, rows: Rows) -> Tensor:
        return objective.loss(log_probs, rows)[0]

    def found(loss) -> tuple[Tensor, Tensor]:
        leaf = torch.where(mask, log_probs, torch.nan).requires_grad_()
        value = loss(leaf, step.rows())
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    torch.compiler.reset()  # of the presets before it nothing is kept, or torch stops compiling after a few
    compiled = found(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert_close(compiled, found(loss), rtol=1e-12, atol=1e-14)
    with kernels.plain():
        assert_close(compiled, found(loss), rtol=1e-12, atol=1e-14)
