"""Orders as the API would have written them, and what the loss worker answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from service.relay.orders import Answer, Order
from service.relay.queue import Taken
from service.spec.objective import ObjectiveSpec
from workers.losses.batch import bytes_of, viewed
from workers.losses.compute import RETURNED
from workers.losses.serve import Round
from workers.objectives import Objective

torch.set_num_threads(1)

F64 = torch.float64
ALL = ["gradients", *RETURNED]
LOG_PROBS = ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs")
PER_TOKEN = (*LOG_PROBS, "entropy", "segment_ids", "response_mask", "weights")
WORKED: dict[str, Any] = {
    "log_probs": [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]],
    "old_log_probs": [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]],
    "advantages": torch.tensor([1.0, -1.0], dtype=F64),
}


def ragged(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Rows in lists as flat tensors with cu_seqlens."""
    lengths = [len(row) for row in batch["log_probs"]]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = {name: _flat(rows) if isinstance(rows, list) else rows for name, rows in batch.items()}
    return {"cu_seqlens": offsets, **flat}


def _flat(rows: list[Any]) -> Tensor:
    if not isinstance(rows[0], list):
        return torch.tensor(rows)
    kind = torch.int64 if any(type(value) is int for row in rows for value in row) else F64
    return torch.tensor([value for row in rows for value in row], dtype=kind)


def item(batch: dict[str, Any], objective: Any = "gspo", **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An entry of an order and its tensors; rows in lists go ragged."""
    is_ragged = isinstance(batch["log_probs"], list)
    entry = {
        "objective": ObjectiveSpec.model_validate(objective).resolve(),
        "dtype": "float64",
        "layout": "ragged" if is_ragged or "cu_seqlens" in batch else "padded",
        "return": ALL,
        "on_nonfinite": "refuse",
        "on_singleton": "refuse",
        "seed": 0,
        "warnings": [],
        **options,
    }
    return entry, ragged(batch) if is_ragged else batch


def order(*items: tuple[dict[str, Any], dict[str, Tensor]], name: str = "loss_1", all_or_nothing: bool = False) -> Taken:
    entries = [{"index": index, **entry} for index, (entry, _) in enumerate(items)]
    tensors = {f"{index}/{name}": bytes_of(values) for index, (_, sent) in enumerate(items) for name, values in sent.items()}
    parcel = Order(name, "default", 2e9, all_or_nothing, entries, tensors).encode()
    return Taken(name, "default", parcel, name.encode())


def answers(*orders: Taken) -> list[Answer]:
    found: dict[str, bytes] = {}

    def answer(done: Sequence[tuple[Taken, bytes]]) -> None:
        for taken, raw in done:
            assert taken.id not in found, "answered twice"
            found[taken.id] = raw

    Round(orders, answer).run()
    return [Answer.decode(found[taken.id]) for taken in orders]


def results(*items: tuple[dict[str, Any], dict[str, Tensor]]) -> list[dict[str, Any]]:
    """The items of the answer to one order, with their tensors beside the numbers."""
    (answer,) = answers(order(*items))
    tensors = {name: viewed(raw) for name, raw in answer.tensors.items()}
    of = [{name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{i}/")} for i in range(len(items))]
    return [entry | sent for entry, sent in zip(answer.data, of, strict=True)]


def result(batch: dict[str, Any], objective: Any = "gspo", **options: Any) -> dict[str, Any]:
    (found,) = results(item(batch, objective, **options))
    return found


def drawn(lengths: Sequence[int] = (5, 3, 5, 1, 2, 4), seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with everything in it that any objective may ask for, and NaN behind the mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, longest, dtype=F64, generator=generator)

    old = -noise(1.0).abs() - 0.2
    batch = {"log_probs": old + noise(0.1), "old_log_probs": old, "rollout_log_probs": old + noise(0.05)}
    batch |= {"ref_log_probs": old + noise(0.2), "entropy": noise(1.0).abs()}
    batch = {name: torch.where(mask, values, torch.nan) for name, values in batch.items()}
    return batch | {
        "response_mask": mask.double(),
        "segment_ids": (torch.arange(longest) // 2).expand(rows, longest).contiguous(),
        "rewards": torch.randn(rows, dtype=F64, generator=generator),
        "group_ids": torch.arange(rows) // 2,
        "truncated": (torch.arange(rows) == 2).double(),
    }


def flattened(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch, ragged: what stands behind the mask is left out."""
    mask = batch["response_mask"].bool()
    flat = {name: values[mask] if values.shape == mask.shape else values for name, values in batch.items()}
    del flat["response_mask"]
    return flat | {"cu_seqlens": torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)}


def directly(objective: Any, batch: dict[str, Tensor], advantages: Tensor | None = None) -> dict[str, Any]:
    """The same by `Objective` itself."""
    made = Objective(ObjectiveSpec.model_validate(objective).resolve())
    mask, rewards, ids = batch["response_mask"].bool(), batch["rewards"], batch["group_ids"]
    known: dict[str, Any] = {name: batch[name] for name in LOG_PROBS[1:]}
    if advantages is None:
        score = made.with_kl(rewards, response_mask=mask, **known)
        advantages = made.advantages(score, ids, lengths=mask.sum(1))
    selected = made.select(mask, rewards=rewards, group_ids=ids, truncated=batch["truncated"], entropy=batch["entropy"])
    step = made.prepare(
        response_mask=mask & selected.any(1, keepdim=True),
        selected=selected,
        advantages=advantages,
        segment_ids=batch["segment_ids"],
        group_ids=ids,
        entropy=batch["entropy"],
        **known,
    )
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, outputs = made.loss(log_probs, replace(step.rows(), picked=None))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    metrics = (step.metrics + made.group_metrics(rewards, ids) + outputs.metrics).finish()
    returned = {name: tensor_of(outputs).detach() for name, tensor_of in RETURNED.items()}
    return {"loss": float(loss.detach()), "metrics": metrics, "gradients/log_probs": gradient, **returned}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert found["status"] == "ok", found
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=tolerance)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
    for name in ("gradients/log_probs", *RETURNED):
        assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
