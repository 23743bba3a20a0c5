"""A loss that the service computes. `backward()` works on it, because the answer contains the gradient.

    from ratchet_client.torch import ratchet_loss

    loss = ratchet_loss(log_probs, objective="gspo", old_log_probs=old, advantages=advantages, response_mask=mask)
    loss.backward()

Tensors may be on any device. They are sent as safetensors in their own dtype, padded [B, T] with a response_mask or flat [N]
with cu_seqlens [B + 1]. The loss is computed in the dtype of log_probs, at least in float32.

Micro-batches. If an objective computes something from several rows, it sees only the rows of the request. So first request the
aggregation weights of the whole step (and its advantages, if they come from rewards). Then send each micro-batch with its rows
of these. The losses and gradients of the micro-batches add up to those of the step:

    _, step = ratchet_loss(old, objective=objective, old_log_probs=old, rewards=rewards, group_ids=group_ids,
                           response_mask=mask, outputs=["weights", "advantages"])
    for rows in torch.arange(len(mask)).split(8):
        loss = ratchet_loss(score(rows), objective=objective, old_log_probs=old[rows], response_mask=mask[rows],
                            advantages=step.tensors["advantages"][rows], weights=step.tensors["weights"][rows])
        loss.backward()
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Required, TypedDict, Unpack, overload

try:
    import torch
    from safetensors.torch import load, save
except ImportError as missing:
    raise ImportError(f"{missing}; ratchet_client.torch needs: pip install torch safetensors numpy") from missing

from torch import Tensor

from ratchet_client import discovery
from ratchet_client.client import Ratchet

WAIT_S = 120.0
OPTIONS = ("on_nonfinite", "on_singleton", "seed")


class Batch(TypedDict, total=False):
    """The inputs of an objective besides log_probs: B sequences, T tokens, R rewards. Per token: [B, T], or flat [N].

    The objective decides which are needed; if one is missing, the service's error names it. None means not given. All inputs
    are constants: no gradient flows to them, even if they have a graph.
    """

    old_log_probs: Tensor | None  # per token, like all down to entropy
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    response_mask: Tensor | None  # 0 or 1; masked values may be anything
    segment_ids: Tensor | None  # integers
    weights: Tensor | None  # the aggregation weights of the whole step, instead of this batch's own
    entropy: Tensor | None
    advantages: Tensor | None  # [B], or per token
    rewards: Tensor | None  # [B] or [B, R]; the service computes advantages from them
    group_ids: Tensor | None  # [B], integers
    truncated: Tensor | None  # [B], 0 or 1
    reward_weights: Tensor | None  # [R]
    cu_seqlens: Tensor | None  # [B + 1], integers: the start of each sequence of a flat batch, and the end of the last one
    on_nonfinite: str | None  # "refuse", or "mask": rows that are not finite count nowhere and are reported
    on_singleton: str | None  # "refuse", or "zero": an answer alone in its group has the advantage 0
    seed: int | None  # for clip_cov and kl_cov, which draw tokens


class Item(Batch, total=False):
    """One loss of several."""

    log_probs: Required[Tensor]  # per token; the gradient is with respect to this
    objective: Required[str | Mapping[str, Any]]  # a preset's name, or an object as in a job's spec
    outputs: Sequence[str] | None  # further outputs: ratio, log_importance_ratio, token_loss, clipped, advantages, weights


NAMES = frozenset(Item.__annotations__)


@dataclass(frozen=True)
class LossAnswer:
    """`loss` is a scalar with a graph to log_probs; `tensors` are the requested outputs, in the layout of the request."""

    loss: Tensor
    metrics: dict[str, float]
    warnings: list[str]
    nonfinite_rows: list[int]
    tensors: dict[str, Tensor]


@overload
def ratchet_loss(
    log_probs: Tensor,
    *,
    objective: str | Mapping[str, Any],
    outputs: None = None,
    dtype: torch.dtype | None = None,
    client: Ratchet | None = None,
    wait_s: float = WAIT_S,
    **batch: Unpack[Batch],
) -> Tensor: ...


@overload
def ratchet_loss(
    log_probs: Tensor,
    *,
    objective: str | Mapping[str, Any],
    outputs: Sequence[str],
    dtype: torch.dtype | None = None,
    client: Ratchet | None = None,
    wait_s: float = WAIT_S,
    **batch: Unpack[Batch],
) -> tuple[Tensor, LossAnswer]: ...


def ratchet_loss(
    log_probs: Tensor,
    *,
    objective: str | Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    client: Ratchet | None = None,
    wait_s: float = WAIT_S,
    **batch: Unpack[Batch],
) -> Tensor | tuple[Tensor, LossAnswer]:
    """The loss of a batch (see `Batch`), to be minimised: a scalar with a graph to log_probs.

    With `outputs`, which may be empty, also returns the LossAnswer: metrics, warnings, and the tensors that `outputs` names.
    Without it, warnings are issued as Python warnings. `dtype`: the dtype of the computation; default: that of log_probs.
    `client`: default: the Ratchet that `Ratchet()` finds. The gradient is not requested under torch.no_grad, or if log_probs
    does not require it.

    Raises RatchetApiError, with pointers to the faults, if the service refuses the request; RatchetConnectionError if it cannot
    be reached; and RatchetLossPending if there is no answer within `wait_s`.
    """
    item: Item = {"log_probs": log_probs, "objective": objective, "outputs": outputs, **batch}
    (answer,) = ratchet_losses([item], dtype=dtype, client=client, wait_s=wait_s)
    if outputs is not None:
        return answer.loss, answer
    for text in answer.warnings:
        warnings.warn(text, stacklevel=2)
    return answer.loss


def ratchet_losses(
    items: Sequence[Item], *, dtype: torch.dtype | None = None, client: Ratchet | None = None, wait_s: float = WAIT_S
) -> list[LossAnswer]:
    """Several losses in one request. Arguments and errors as in `ratchet_loss`. If one item is refused, all are."""
    tensors = _packed(items)
    differentiated = [torch.is_grad_enabled() and item["log_probs"].requires_grad for item in items]
    request: dict[str, Any] = {
        "items": [_asked(item, gradient) for item, gradient in zip(items, differentiated, strict=True)],
        "all_or_nothing": True,
    }
    if dtype is not None:
        request["dtype"] = str(dtype).removeprefix("torch.")
    body = save(tensors, {"request": json.dumps(request)})
    answer = (client or _found(*discovery.find())).losses_safetensors(body, wait_s=wait_s)
    received = load(answer)
    header = json.loads(answer[8 : 8 + int.from_bytes(answer[:8], "little")])
    data = json.loads(header["__metadata__"]["response"])["data"]
    return [
        _answer(item["log_probs"], data[index], _of(received, index), gradient, dtype)
        for index, (item, gradient) in enumerate(zip(items, differentiated, strict=True))
    ]


@lru_cache(maxsize=4)
def _found(base_url: str, api_key: str) -> Ratchet:
    return Ratchet(base_url, api_key)


# ---------------------------------------------------------------- to the wire, and from it


def _asked(item: Item, gradient: bool) -> dict[str, Any]:
    """The parts of an item that are not tensors."""
    wanted = {*(item.get("outputs") or ()), *(["gradients"] if gradient else [])}
    options = {name: value for name in OPTIONS if (value := item.get(name)) is not None}
    return {"objective": item["objective"], "return": sorted(wanted), **options}


def _packed(items: Sequence[Item]) -> dict[str, Tensor]:
    """Tensors by their names in the request. Each has its own memory, because safetensors refuses shared memory."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for index, item in enumerate(items):
        if unknown := item.keys() - NAMES:
            raise TypeError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(sorted(NAMES))}")
        for name in sorted(item.keys() - {"objective", "outputs", *OPTIONS}):
            value = item[name]
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}")
            value = value.detach().to("cpu", torch.float32 if value.dtype == torch.float16 else value.dtype).contiguous()
            storage = value.untyped_storage().data_ptr()
            tensors[f"{index}/{name}"] = value.clone() if storage in taken else value
            taken.add(storage)
    return tensors


def _of(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One item's tensors, by their names without the item's number."""
    start = f"{index}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _answer(
    log_probs: Tensor, item: Mapping[str, Any], tensors: dict[str, Tensor], gradient: bool, dtype: torch.dtype | None
) -> LossAnswer:
    tensors = {name: tensor.to(log_probs.device) for name, tensor in tensors.items() if name != "cu_seqlens"}
    value = float(item["loss"])  # also converts "NaN" and "Infinity"
    if gradient:
        loss = _Loss.apply(log_probs, tensors["gradients/log_probs"], value)
    else:
        loss = torch.tensor(value, dtype=torch.promote_types(dtype or log_probs.dtype, torch.float32), device=log_probs.device)
    metrics = {name: float(measured) for name, measured in item["metrics"].items()}
    return LossAnswer(loss, metrics, item.get("warnings", []), item.get("nonfinite_rows", []), tensors)


# ---------------------------------------------------------------- autograd


class _Loss(torch.autograd.Function):
    """A value with its gradient with respect to log_probs. The gradient is scaled first and then cast to log_probs' dtype."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, gradient: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(log_probs, gradient)
        return gradient.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        log_probs, gradient = ctx.saved_tensors
        return (grads[0] * _OnlyOnce.apply(gradient, log_probs)).to(log_probs.dtype), None, None


class _OnlyOnce(torch.autograd.Function):
    """The gradient, with a graph to log_probs that raises on a second derivative. Otherwise it would count as a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, log_probs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise RuntimeError("ratchet_loss has a first derivative only: the second does not come over the wire")
