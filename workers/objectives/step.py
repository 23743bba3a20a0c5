"""The tensors of an optimizer step that do not depend on the policy being trained."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from workers.objectives import kernels
from workers.objectives.metrics import Metrics


@dataclass(frozen=True)
class Rows:
    """Rows of a step, as `Objective.prepare` makes them and `Objective.loss` takes them: B sequences of T tokens.

    Log-probs that the axes do not need may be None. If given, they are used for metrics.
    """

    mask: Tensor  # [B, T] the answers' tokens, as `kernels.as_mask` gives them
    lengths: Tensor  # [B] tokens under the mask, at least 1
    weights: Tensor  # [B, T] of the aggregate axis; a token whose weight is 0 only takes part in its sequence's ratio
    row_weights: Tensor  # [B] sums of the weights
    counts: Tensor  # [B] tokens whose weight is not 0
    advantages: Tensor  # [B] or [B, T], 0 where nothing counts
    old_log_probs: Tensor | None = None  # [B, T] of the trainer at the rollout
    rollout_log_probs: Tensor | None = None  # [B, T] of the sampler
    ref_log_probs: Tensor | None = None  # [B, T] of the reference
    segments: Tensor | None = None  # [B, T] segments of each row, numbered from 0 (see `ratio.segments`)
    correction: Tensor | None = None  # [B, T] weights of the correct axis
    picked: Tensor | None = None  # [B, T] tokens picked by covariance over the whole step
    entropy: Tensor | None = None  # [B, T]

    def known(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(**{name: change(tensor) for name, tensor in self.known().items()})


@dataclass(frozen=True)
class OptimizerStep:
    """All rows of an optimizer step, and its metrics."""

    tensors: Rows
    metrics: Metrics

    def rows(self, rows_b: Tensor | slice | None = None) -> Rows:
        """Some rows, or all of them."""
        return self.tensors if rows_b is None else self.tensors.each(lambda tensor: tensor[rows_b])


class Moved:
    """Differences between log p and other log-probs of the same tokens, each computed once. [B, T] in float32 or better.

    Values and gradients are 0 where masked. Raises ValueError if the other log-probs are not known."""

    def __init__(self, log_probs: Tensor, rows: Rows) -> None:
        self.dtype = torch.promote_types(log_probs.dtype, torch.float32)
        self._log_probs, self._rows = log_probs, rows
        self._found: dict[str | None, Tensor] = {}

    def knows(self, name: str) -> bool:
        return getattr(self._rows, name) is not None

    def less(self, name: str | None) -> Tensor:
        """log p - the log-probs of that name (None: nothing), with a graph."""
        if name not in self._found:
            other = None if name is None else self._other(name)
            self._found[name] = kernels.difference(self._log_probs, other, self._rows.mask, self.dtype)
        return self._found[name]

    def value(self, name: str) -> Tensor:
        """The same without a graph; it is not cached."""
        if name in self._found:
            return self._found[name].detach()
        return kernels.difference(self._log_probs.detach(), self._other(name), self._rows.mask, self.dtype)

    def other(self, name: str) -> Tensor:
        """The log-probs of that name, 0 where masked."""
        return kernels.difference(self._other(name).detach(), None, self._rows.mask, self.dtype)

    def _other(self, name: str) -> Tensor:
        return needed(getattr(self._rows, name), name)


def needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"this objective needs {name} [B, T]")
    return tensor
