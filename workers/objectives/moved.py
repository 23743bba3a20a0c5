"""How far the trained policy's log-probs are from others of the same tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.objectives.tensors import less, ones_of


class Moved:
    """log p less something, by name. [B, T] in float32 or better; 0 where masked, and so is the gradient of log p there."""

    def __init__(self, log_probs: Tensor, others: Mapping[str, Tensor | None], mask: Tensor, ones: Tensor) -> None:
        """`ones`: the mask in integers (see `tensors.ones_of`)."""
        self.log_probs = log_probs
        self.others = others
        self.mask = mask
        self.dtype = torch.promote_types(log_probs.dtype, torch.float32)
        self.ones = ones_of(ones, self.dtype)
        self._found: dict[str | None, Tensor] = {}

    def knows(self, name: str) -> bool:
        return self.others[name] is not None

    def less(self, name: str | None) -> Tensor:
        """log_probs - others[name]; None: log_probs as they are. With a graph, computed once.

        Raises ValueError when those are not known.
        """
        if name not in self._found:
            other = None if name is None else needed(self.others, name)
            self._found[name] = less(self.log_probs, other, self.ones, self.dtype)
        return self._found[name]

    def value(self, name: str) -> Tensor:
        """`less` without a graph; not kept."""
        if name in self._found:
            return self._found[name].detach()
        return less(self.log_probs.detach(), needed(self.others, name), self.ones, self.dtype)

    def other(self, name: str) -> Tensor:
        """others[name], 0 where masked."""
        return less(needed(self.others, name).detach(), None, self.ones, self.dtype)


def needed(tensors: Mapping[str, Tensor | None], name: str) -> Tensor:
    values = tensors.get(name)
    if values is None:
        raise ValueError(f"this objective needs {name} [B, T]")
    return values
