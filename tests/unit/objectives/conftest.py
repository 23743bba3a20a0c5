"""The worked example, and a way from a spec to a loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Objective

torch.set_num_threads(1)

Batch = dict[str, Any]


def objective_of(spec: Any) -> Objective:
    """From a spec as a caller writes it."""
    return Objective(ObjectiveSpec.model_validate(spec).resolve())


def loss_of(spec: Any, batch: Batch) -> tuple[Tensor, Tensor, LossOutputs]:
    """Loss, gradient and outputs of a whole step; `batch` holds log_probs and the arguments of prepare."""
    objective = objective_of(spec)
    log_probs = batch["log_probs"].detach().clone().requires_grad_()
    step = objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})
    loss, outputs = objective.loss(log_probs, step.rows())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, outputs


@pytest.fixture(scope="session")
def make_objective() -> Callable[[Any], Objective]:
    return objective_of


@pytest.fixture(scope="session")
def compute() -> Callable[[Any, Batch], tuple[Tensor, Tensor, LossOutputs]]:
    return loss_of


@pytest.fixture
def example() -> Batch:
    """Two answers of four and three tokens, the first one better."""
    return {
        "log_probs": torch.tensor([[-2.0, -1.8, -1.5, -1.2, 0], [-1.9, -1.6, -1.3, 0, 0]], dtype=torch.float64),
        "old_log_probs": torch.tensor([[-2.2, -2.0, -1.6, -1.3, 0], [-2.1, -1.8, -1.5, 0, 0]], dtype=torch.float64),
        "response_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
    }
