"""A change of the model's input that is as small as its dtype allows, to see what rounding alone does to its results.

Half precision keeps 8 bits (bfloat16) of each activation. Whatever changes the first of them (an update of the weights far too
small to matter, another batch) changes how all later ones are rounded, and the log-probs move by an amount that does not
depend on the size of the change. This nudge starts the same cascade, without an effect of its own worth speaking of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Every 61st number of the embedded tokens: few, so that the exact effect is small; another feature in each token, since the
# width of no model is a multiple of it.
STRIDE = 61


@contextmanager
def nudged(model: PreTrainedModel) -> Iterator[None]:
    """Inside, one in STRIDE of the numbers of the embedded tokens is off by one unit in its last place."""

    def nudge(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        flat = output.flatten().clone()
        some = flat[::STRIDE]
        some.copy_(some.double() * (1 + torch.finfo(output.dtype).eps / 2))  # rounds to the next number
        return flat.view_as(output)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()
