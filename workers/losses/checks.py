"""Checks the numbers in an item's tensors. The API has already checked the structure and the shapes.

A pass over a tensor costs as much as a term of the loss. Each tensor is therefore read once (`aminmax` finds NaN, infinities
and positive log-probs together), and only a tensor with a fault is searched for its place. Masked values may be anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.errors import FieldError
from service.spec.tensors import TENSORS
from workers.losses.batch import Item

NAMED = 4  # at most so many places are named in a message


@dataclass
class Findings:
    """What `check` found. `nonfinite_B` is set only if the item wants such rows masked."""

    errors: list[FieldError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    nonfinite_B: Tensor | None = None  # rows with numbers that are not finite
    mask: Tensor | None = None  # the response mask in the layout of the request, bool; None: every token counts


def check(item: Item, *, used: frozenset[str], in_groups: bool, in_segments: bool) -> Findings:
    """Find all faults of the item.

    `used`: the tensors that affect the result; `in_groups`: advantages are computed from rewards with statistics of the
    group; `in_segments`: segment_ids affect the result."""
    findings = Findings()
    findings.mask = _binary(item, "response_mask", findings)
    _binary(item, "truncated", findings)
    _numbers(item, used, findings)
    if in_groups:
        _singletons(item, findings)
    if in_segments:
        _segments(item, findings)
    return findings


def _binary(item: Item, name: str, findings: Findings) -> Tensor | None:
    values = item.tensors.get(name)
    if values is None or values.dtype == torch.bool:
        return values
    flags = values.bool()
    if not values.numel():
        return flags
    least, greatest = (float(end) for end in values.aminmax())
    # For values in [0, 1], all nonzero ones are 1 exactly if their sum equals their count. A sum of 0s and 1s is exact.
    if least >= 0 and greatest <= 1 and float(values.sum(dtype=torch.float64)) == int(flags.count_nonzero()):
        return flags
    wrong = values != flags.to(values.dtype)
    if name == "truncated":
        where, got = f"rows {_some(wrong.nonzero().flatten().tolist())}", _shown(values[wrong][0])
    else:
        where, got = _places(item, wrong), _shown(values.flatten()[wrong.flatten()][0])
    findings.errors.append(
        FieldError(item.pointer(name), f"must be 0 or 1, got {got} at {where}", "mask_not_binary", got, [0, 1])
    )
    return flags


# ---------------------------------------------------------------- NaN, infinities, positive log-probs


def _numbers(item: Item, used: frozenset[str], findings: Findings) -> None:
    for name, values in item.tensors.items():
        if name not in used or not values.numel():
            continue
        per = TENSORS[name].per
        if "token" in per and ("row" not in per or item.layout.is_per_token(values)):
            _tokens(item, name, values, findings)
        elif "row" in per:
            _rows(item, name, values, findings)
        elif not bool(values.isfinite().all()):
            detail = f"must be finite, got {_shown(values[~values.isfinite()][0])}"
            findings.errors.append(FieldError(item.pointer(name), detail, "nonfinite"))


def _tokens(item: Item, name: str, values: Tensor, findings: Findings) -> None:
    least, greatest = (float(end) for end in values.aminmax())
    if not -torch.inf < least <= greatest < torch.inf:
        wrong = _counted(~values.isfinite(), findings.mask)
        if bool(wrong.any()):
            behind = "" if findings.mask is None else ", where response_mask is 1"
            _refuse_or_mask(item, name, wrong, lambda: _places(item, wrong) + behind, findings)
    if TENSORS[name].holds == "log_prob" and not greatest <= 0:
        positive = _counted((values > 0) & values.isfinite(), findings.mask)
        if count := int(positive.count_nonzero()):
            what = "a log-probability" if count == 1 else f"{count} log-probabilities"
            findings.warnings.append(f"{name}: {what} above 0, at {_places(item, positive)}: computed as given")


def _rows(item: Item, name: str, values: Tensor, findings: Findings) -> None:
    """Check one value per row, or one per row and reward. A row without tokens may hold anything."""
    wrong_B = ~values.isfinite().view(item.layout.rows, -1).all(dim=1)
    if not bool(wrong_B.any()):
        return
    wrong_B = wrong_B & _with_tokens(item, findings.mask)
    if bool(wrong_B.any()):
        _refuse_or_mask(item, name, wrong_B, lambda: f"rows {_some(wrong_B.nonzero().flatten().tolist())}", findings, rows=True)


def _refuse_or_mask(
    item: Item, name: str, wrong: Tensor, where: Callable[[], str], findings: Findings, *, rows: bool = False
) -> None:
    if not item.mask_nonfinite:
        detail = f'NaN or infinite at {where()}; send finite numbers, or on_nonfinite: "mask" to leave such rows out'
        findings.errors.append(FieldError(item.pointer(name), detail, "nonfinite"))
        return
    if not rows:
        wrong_B = torch.zeros(item.layout.rows, dtype=torch.bool)
        wrong_B[_row_of(item, wrong)] = True
    else:
        wrong_B = wrong
    findings.nonfinite_B = wrong_B if findings.nonfinite_B is None else findings.nonfinite_B | wrong_B


def _row_of(item: Item, flags: Tensor) -> Tensor:
    if item.layout.offsets is None:
        return flags.any(dim=1)
    return torch.searchsorted(item.layout.offsets[1:].contiguous(), flags.nonzero().flatten(), right=True)


def _counted(flags: Tensor, mask: Tensor | None) -> Tensor:
    return flags if mask is None else flags & mask


def _with_tokens(item: Item, mask: Tensor | None) -> Tensor:
    """Rows with at least one unmasked token. [B]"""
    if mask is not None:
        return item.layout.pad(mask).any(dim=1)
    if item.layout.offsets is not None:
        return item.layout.offsets.diff() > 0
    return torch.full((item.layout.rows,), item.layout.longest > 0)


# ---------------------------------------------------------------- ids


def _singletons(item: Item, findings: Findings) -> None:
    """Find groups of one. They have no baseline: the advantage is 0, and the row teaches nothing."""
    ids_B = item.tensors.get("group_ids")
    if ids_B is None or not ids_B.numel():
        return
    _, index_B, counts = torch.unique(ids_B, return_inverse=True, return_counts=True)
    alone = (counts[index_B] == 1).nonzero().flatten().tolist()
    if not alone:
        return
    which = f"row {alone[0]} is alone in its group" if len(alone) == 1 else f"rows {_some(alone)} are each alone in a group"
    if item.zero_singletons:
        findings.warnings.append(f"{which}: advantage 0")
        return
    detail = f'{which}, which leaves no one to compare with; send whole groups, or on_singleton: "zero" for an advantage of 0'
    findings.errors.append(FieldError(item.pointer("group_ids"), detail, "singleton_group"))


def _segments(item: Item, findings: Findings) -> None:
    ids = item.tensors.get("segment_ids")
    if ids is None or not ids.numel() or int(ids.min()) >= 0:
        return
    negative = _counted(ids < 0, findings.mask)
    if bool(negative.any()):
        got = int(ids[negative][0])
        detail = f"must be at least 0, got {got} at {_places(item, negative)}"
        findings.errors.append(FieldError(item.pointer("segment_ids"), detail, "invalid", got, "at least 0"))


# ---------------------------------------------------------------- where


def _places(item: Item, flags: Tensor) -> str:
    """`row 3, token 5`, or a few such places and the number of the others."""
    cells = item.layout.cells_of(flags, NAMED)
    return _list([f"row {row}, token {token}" for row, token in cells], int(flags.count_nonzero()), "; ")


def _some(numbers: list[int]) -> str:
    return _list([str(number) for number in numbers[:NAMED]], len(numbers), ", ")


def _list(named: list[str], count: int, between: str) -> str:
    more = count - len(named)
    return between.join(named) + (f" and {more} more" if more else "")


def _shown(value: Tensor) -> str:
    return f"{value.item():g}"
