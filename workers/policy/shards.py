"""Weights of which each rank holds a part, with their gradients and moments: torch's FSDP2.

The numbers of a layer are gathered when the layer computes, forward or backward, and dropped afterwards; those of embedding,
last norm and head for a pass. Gradients are added up as they come, each rank's part on that rank. In all of this the
ranks take part in step: so they all make as many passes as any of them needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from workers.policy.errors import PolicyFailed, Subject

Found = TypeVar("Found")


class Shards(nn.Module):
    """A model that is sharded. Its passes go through here, whatever part of the model they call."""

    def __init__(self, model: PreTrainedModel, *, trained: bool) -> None:
        """All ranks of the process group must come here, each with the same whole model.

        trained  the parts are float32, of which the passes get copies in the model's dtype; else they are as they were

        Raises PolicyFailed model_unsupported.
        """
        super().__init__()
        dtypes = {weight.dtype for weight in model.parameters()}
        layers = set(model._no_split_modules or ())  # pyright: ignore[reportPrivateUsage] - as transformers' own trainer
        inner = [module for module in model.modules() if type(module).__name__ in layers]
        if not inner or len(dtypes) > 1 or any(weight.ndim == 0 for weight in model.parameters()):
            kinds = ", ".join(sorted(map(str, dtypes)))
            raise PolicyFailed(
                "model_unsupported",
                "the weights of this model cannot be sharded: its class does not name its layers (_no_split_modules), they are "
                f"not of one dtype ({kinds}), or some are single numbers",
                hint="use resources.sharding: optimizer",
                subject=Subject.SOURCE,
            )
        self.model = model
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if trained and dtypes != {torch.float32}:
            policy = MixedPrecisionPolicy(dtypes.pop(), torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        for module in [*reversed(inner), self]:  # from the inside out, should one hold another
            if trained:
                for weight in module.parameters():
                    if not isinstance(weight, DTensor):
                        weight.data = weight.data.float()
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)  # a sum, and no mean
            sharded.set_force_sum_reduction_for_comms(True)  # which gloo can do, too
        self._fsdp.set_reduce_scatter_unused_params(True)  # some rows reach experts that those of another rank do not
        self._inner: list[FSDPModule] = [module for module in inner if isinstance(module, FSDPModule)]

    @property
    def _fsdp(self) -> FSDPModule:
        assert isinstance(self, FSDPModule)
        return self

    def forward(self, run: Callable[[], Found]) -> Found:
        return run()

    def run(self, forward: Callable[[], Found]) -> Found:
        """One forward pass of the model, wholly inside of `forward`. With gradients a backward pass must follow."""
        found: Found = self(forward)
        if not torch.is_grad_enabled():
            self._fsdp.reset_iter_state()  # as a backward pass would
        return found

    def passes(self, own: int) -> int:
        """The most that any rank wants to make; each rank says how many."""
        most = torch.tensor(own, device=self.model.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    @contextmanager
    @torch.no_grad()
    def whole(self) -> Iterator[None]:
        """Inside, each rank holds all weights in the model's dtype and may compute on its own, without gradients."""
        try:
            self(lambda: None)  # gathers what no layer holds
            for layer in self._inner:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
            yield
        finally:
            for layer in self._inner:
                layer.set_reshard_after_forward(True, recurse=False)
            self._fsdp.reset_iter_state()

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's state_dict, as `gathered` gives it."""
        found: dict[int, Tensor] = {}  # tied weights once
        state: dict[str, Any] = self.model.state_dict(keep_vars=True)
        for tensor in state.values():
            if id(tensor) not in found:
                found[id(tensor)] = gathered(tensor).to(dtype) if isinstance(tensor, DTensor) else tensor
        return {name: found[id(tensor)] for name, tensor in state.items()}


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank holds a part, on rank 0's CPU; nothing on the others, which must come here, too.
    A tensor that every rank holds stays as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0, device="cpu")


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that is placed as `like` is: all of it, unless that is sharded."""
    if not isinstance(like, DTensor) or whole.ndim == 0:
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
