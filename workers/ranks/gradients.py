"""The ranks' gradients become their sum, the same to the bit on each of them."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from service.errors import JobFailed

BUCKET = 2**24  # float32 numbers that travel at a time
WITHIN = timedelta(seconds=45)  # the ranks meet within milliseconds; one that does not come by then is lost


def join(folder: Path, rank: int, ranks: int, device: torch.device) -> None:
    """Join the process group of this attempt, which meets in a folder of its own. Blocks until all ranks are there."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=ranks,
        timeout=WITHIN,
        device_id=device if on_gpu else None,
    )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(weights: Sequence[nn.Parameter]) -> None:
    """Replace the gradient of each weight by the sum over all ranks. A weight without a gradient on any rank keeps none: to an
    optimizer that is not the same as a gradient of 0.

    Raises JobFailed rank_lost."""
    try:
        held = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        wanted = [weight for weight, any_has in zip(weights, held.tolist(), strict=True) if any_has]
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in wanted]
        for bucket in _buckets(gradients):
            _add_up(bucket)
        for weight, gradient in zip(wanted, gradients, strict=True):
            weight.grad = gradient
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's
        raise JobFailed("rank_lost", f"the ranks could not add up their gradients: {str(error)[:300]}") from error


def _add_up(gradients: list[Tensor]) -> None:
    if len(gradients) == 1 and gradients[0].is_contiguous():
        dist.all_reduce(gradients[0])
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """In order, each of at most BUCKET numbers, but of at least one tensor."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets
