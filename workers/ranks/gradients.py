"""The ranks' gradients become their sum, the same to the bit on each of them; and their weights those of each one's owner."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


def device_of(device: str, rank: int) -> torch.device:
    """The rank's own; from now on it is this process's default."""
    if device != "cuda":
        return torch.device(device)
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def lost_touch(error: BaseException) -> bool:
    """Whether another rank did not answer gloo or NCCL, dead or not. Gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(weights: Sequence[nn.Parameter]) -> None:
    """Replace the gradient of each weight by the sum over all ranks. A weight without a gradient on any rank keeps none: to an
    optimizer that is not the same as a gradient of 0. Those of sharded weights are sums already.

    Raises JobFailed rank_lost."""
    weights = [weight for weight in weights if not isinstance(weight, DTensor)]
    if not weights:
        return
    with _or_lost("add up their gradients"):
        held = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        wanted = [weight for weight, any_has in zip(weights, held.tolist(), strict=True) if any_has]
        gradients = [_zeros_like(weight) if weight.grad is None else weight.grad for weight in wanted]
        _together(gradients, dist.all_reduce)
        for weight, gradient in zip(wanted, gradients, strict=True):
            weight.grad = gradient


@torch.no_grad()
def hand_out(weights: Sequence[nn.Parameter], owners: Sequence[int]) -> None:
    """Replace each weight by that of the rank which owns it. Raises JobFailed rank_lost."""
    with _or_lost("hand out their weights"):
        for owner in sorted(set(owners)):
            own = [weight.detach() for weight, of in zip(weights, owners, strict=True) if of == owner]
            _together(own, partial(dist.broadcast, src=owner))


@contextmanager
def _or_lost(what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's
        raise JobFailed("rank_lost", f"the ranks could not {what}: {str(error)[:300]}") from error


def _zeros_like(weight: Tensor) -> Tensor:
    """With memory of their own, though the weight may have none."""
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)


def _together(tensors: Sequence[Tensor], change: Callable[[Tensor], Any]) -> None:
    """Let `change` change the tensors, many at a time."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            change(bucket[0])
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        change(flat)
        for tensor, changed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(changed.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
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
