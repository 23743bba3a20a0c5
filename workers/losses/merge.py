"""Computes items with the same objective, dtype and tensors as one batch. This is faster because a small item costs a hundred
calls into torch whose cost does not depend on its size.

`compute.prepare` has done, for each item, what depends on a whole batch. The loss depends on each row alone. The rows of many
items can therefore share one batch, and every item gets the losses, gradients and metrics of its own rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from service.validation.words import counted
from workers.losses.compute import ItemAnswer, Prepared, returned
from workers.objectives import LossOutputs, Rows
from workers.objectives.metrics import Metrics

SMALL_CELLS = 2**16  # a larger item gains nothing from merging
MERGED_CELLS = 2**20
PADDING = 2  # a merged batch has at most this many times the cells of its items


def groups(prepared: Sequence[Prepared]) -> list[list[int]]:
    """Which items to compute together, as indices into `prepared`; each item is in one group."""
    kinds: dict[str, list[int]] = {}
    alone: list[list[int]] = []
    for place, work in enumerate(prepared):
        if work.item.layout.cells > SMALL_CELLS:
            alone.append([place])
        else:
            kinds.setdefault(work.kind, []).append(place)
    return alone + [group for places in kinds.values() for group in _of_like_length(prepared, places)]


def _of_like_length(prepared: Sequence[Prepared], places: list[int]) -> Iterable[list[int]]:
    """Split into groups so that padding stays within bounds."""
    group, rows, cells = list[int](), 0, 0
    for place in sorted(places, key=lambda place: prepared[place].item.layout.longest):
        layout = prepared[place].item.layout
        padded = (rows + layout.rows) * layout.longest
        if group and (padded > MERGED_CELLS or padded > PADDING * (cells + layout.cells)):
            yield group
            group, rows, cells = [], 0, 0
        group, rows, cells = [*group, place], rows + layout.rows, cells + layout.cells
    if group:
        yield group


@dataclass(frozen=True)
class MergedBatch:
    """The rows of one or many items, padded to one length."""

    log_probs: Tensor
    rows: Rows
    metrics: Metrics


def batch_of(prepared: Sequence[Prepared]) -> MergedBatch:
    if len(prepared) == 1:
        (work,) = prepared
        return MergedBatch(work.log_probs, work.rows, work.metrics)
    longest = max(work.item.layout.longest for work in prepared)

    known = [work.rows.known() for work in prepared]
    parts = zip(*(work.metrics.parts for work in prepared), strict=True)
    return MergedBatch(
        log_probs=_stacked([work.log_probs for work in prepared], longest),
        rows=Rows(**{name: _stacked([part[name] for part in known], longest) for name in known[0]}),
        metrics=Metrics([(*same[0][:2], tuple(map(torch.cat, zip(*(p[2] for p in same), strict=True)))) for same in parts]),
    )


def _stacked(parts: Sequence[Tensor], longest: int) -> Tensor:
    """[b, ...] of many items as [B, ...], tokens padded to `longest`."""
    if parts[0].dim() == 1:
        return torch.cat(tuple(parts))
    stacked = parts[0].new_zeros(sum(len(part) for part in parts), longest)
    for part, rows in zip(parts, stacked.split([len(part) for part in parts]), strict=True):
        rows[:, : part.shape[1]] = part
    return stacked


def compute(prepared: Sequence[Prepared]) -> list[ItemAnswer]:
    """The answers of items of one kind. If torch raises, so does this, and no item has an answer."""
    batch, objective = batch_of(prepared), prepared[0].objective
    with torch.set_grad_enabled(prepared[0].wants_gradient):
        log_probs = batch.log_probs.detach().requires_grad_(prepared[0].wants_gradient)
        loss, outputs = objective.loss(log_probs, batch.rows)
        gradient = torch.autograd.grad(loss, log_probs)[0] if prepared[0].wants_gradient else None
    return _shared_out(prepared, outputs, gradient, batch.metrics)


@torch.no_grad()
def _shared_out(
    prepared: Sequence[Prepared], outputs: LossOutputs, gradient: Tensor | None, metrics: Metrics
) -> list[ItemAnswer]:
    sizes = [work.item.layout.rows for work in prepared]
    item_of_row_B = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    losses = torch.zeros(len(sizes), dtype=outputs.loss_B.dtype).index_add_(0, item_of_row_B, outputs.loss_B).tolist()
    measured = (metrics + outputs.metrics).split(item_of_row_B, len(sizes))
    wrong_B = outputs.nonfinite_rows.split(sizes) if bool(outputs.nonfinite_rows.any()) else None
    wanted = frozenset().union(*(work.item.wanted for work in prepared))
    tensors = {name: values.split(sizes) for name, values in returned(wanted, outputs).items()}
    if gradient is not None:
        tensors["gradients"] = gradient.split(sizes)
    return [
        _answer(
            work,
            losses[i],
            measured[i],
            [] if wrong_B is None else wrong_B[i].nonzero().flatten().tolist(),
            {name: parts[i] for name, parts in tensors.items() if name in work.item.wanted},
        )
        for i, work in enumerate(prepared)
    ]


def _answer(
    work: Prepared, loss: float, metrics: Mapping[str, float], wrong: list[int], tensors: Mapping[str, Tensor]
) -> ItemAnswer:
    layout, warnings = work.item.layout, list(work.warnings)
    if wrong:
        warnings.append(f"the loss of {len(wrong)} of {counted(layout.rows, 'row')} is not finite, though what came in was")
    elif not isfinite(loss):
        warnings.append("the loss is not finite, though that of every row is")
    sent = {name: layout.as_sent(values[:, : layout.longest]) for name, values in tensors.items()}
    if "gradients" in sent:
        sent["gradients/log_probs"] = sent.pop("gradients")
        if not wrong and not _finite(sent["gradients/log_probs"]):
            warnings.append("the gradient is not finite, though the loss is")
    if layout.offsets is not None and sent:
        sent["cu_seqlens"] = layout.offsets
    body = {"index": work.item.index, "status": "ok", "loss": loss, "metrics": dict(metrics)}
    if warnings:
        body["warnings"] = warnings
    if rows := sorted({*work.nonfinite, *wrong}):
        body["nonfinite_rows"] = rows
    return ItemAnswer(body, sent)


def _finite(values: Tensor) -> bool:
    """Whether all values are finite. Their sum is tried first: if it is finite, all are, at a twentieth of the cost."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
