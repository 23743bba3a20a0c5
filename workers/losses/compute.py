"""One item: from checked tensors to loss, gradient and whatever else was requested.

`prepare` computes what depends on the item's whole batch: advantages, selection, aggregation and correction weights. `merge`
computes the loss of the rows, alone or together with rows of other items. `returned` picks the requested tensors from the
result. An item counts as a whole optimizer step, unless it contains the step's `weights`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from service.errors import FieldError, Portable
from service.spec.objective import ObjectiveSpec
from service.spec.tensors import MEASURED, Uses, uses
from service.validation.words import counted
from workers.losses.batch import Item
from workers.losses.checks import Findings, check
from workers.objectives import LossOutputs, Objective, Rows
from workers.objectives.metrics import Metrics
from workers.objectives.surrogate import PICKS


class ItemRefused(Portable):
    """The item cannot be computed as it was sent."""

    def __init__(self, errors: list[FieldError]) -> None:
        super().__init__(errors[0].detail)
        self.errors = errors


@dataclass(frozen=True)
class ItemAnswer:
    """An item of the answer: JSON, and its tensors in the layout of the request."""

    body: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.body["status"] == "ok"


@dataclass(frozen=True)
class Prepared:
    """An item for which only the loss is left to compute, which depends on each row alone."""

    item: Item
    objective: Objective
    log_probs: Tensor
    rows: Rows
    metrics: Metrics
    warnings: list[str]
    nonfinite: list[int]  # rows left out because an input is not finite

    @property
    def wants_gradient(self) -> bool:
        return "gradients" in self.item.wanted

    @property
    def kind(self) -> str:
        """Items of one kind can be computed as one batch: the same axes, dtype, tensors and metrics."""
        shapes = {name: tensor.dim() for name, tensor in self.rows.known().items()}
        measured = [part[:2] for part in self.metrics.parts]
        return json.dumps([self.item.objective, str(self.item.dtype), shapes, measured, self.wants_gradient], sort_keys=True)


def prepare(item: Item) -> Prepared:
    """Raises ItemRefused if a tensor is missing or its content is invalid."""
    objective, used = _known(item.objective, frozenset(item.tensors))
    findings = check(item, used=used.reads, in_groups=used.in_groups, in_segments=used.in_segments)
    if findings.errors:
        raise ItemRefused(findings.errors)
    try:
        return _prepared(item, objective, used, findings)
    except ValueError as error:  # names the tensor that an axis needs and did not get
        raise ItemRefused([FieldError(f"/items/{item.index}/batch", str(error), "missing_tensor")]) from None


@lru_cache(maxsize=256)  # few different ones occur, even over many requests
def _known(axes: str, given: frozenset[str]) -> tuple[Objective, Uses]:
    """The objective of these axes, and how it uses a batch that has the tensors `given`."""
    return Objective(json.loads(axes)), uses(ObjectiveSpec.model_validate_json(axes), given)


@torch.no_grad()
def _prepared(item: Item, objective: Objective, used: Uses, findings: Findings) -> Prepared:
    layout, sent, warnings = item.layout, item.tensors, [*item.warnings, *findings.warnings]
    valid_B = None if findings.nonfinite_B is None else ~findings.nonfinite_B
    mask = _mask(item, findings.mask, valid_B)
    known: dict[str, Any] = {name: layout.pad(sent[name]) if name in sent else None for name in MEASURED}
    rewards, group_ids, weights = sent.get("rewards"), sent.get("group_ids"), sent.get("weights")

    advantages = _advantages(item, objective, used, mask, valid_B, known)
    if weights is None:
        kept, selected = _selected(item, objective, used, mask, valid_B, known["entropy"])
    else:  # weights of the whole step: they already contain its selection
        weights = torch.where(mask, layout.pad(weights), 0.0)
        kept, selected = mask, weights != 0
        warnings += _sees_less(item.axes)
    step = objective.prepare(
        response_mask=kept,
        selected=selected,
        advantages=advantages,
        segment_ids=layout.pad(sent["segment_ids"]) if used.in_segments and "segment_ids" in sent else None,
        group_ids=_one_group(layout.rows) if group_ids is None and weights is not None else group_ids,
        dtype=item.dtype,
        seed=item.seed,
        **known,
    )
    rows, metrics, log_probs = step.rows(), step.metrics, layout.pad(sent["log_probs"])
    if weights is not None:
        rows = replace(rows, weights=weights, row_weights=weights.sum(dim=1))
    if rewards is not None and group_ids is not None:
        metrics = metrics + objective.group_metrics(rewards, group_ids, valid_B)
    if objective.surrogate_kind in PICKS:
        rows = replace(rows, picked=_picked(objective, log_probs, rows, item.seed))
    left_out = [] if findings.nonfinite_B is None else findings.nonfinite_B.nonzero().flatten().tolist()
    if left_out:
        warnings.append(f"left out: {len(left_out)} of {counted(layout.rows, 'row')}, with NaN or infinite numbers")
    return Prepared(item, objective, log_probs, rows, metrics, warnings, left_out)


def _mask(item: Item, sent: Tensor | None, valid_B: Tensor | None) -> Tensor:
    """Tokens that count, [B, T]."""
    mask = item.layout.inside_B_T if sent is None else item.layout.pad(sent)
    if mask is None:
        mask = torch.ones(item.layout.rows, item.layout.longest, dtype=torch.bool)
    return mask if valid_B is None else mask & valid_B.unsqueeze(1)


def _one_group(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.long)


def _selected(
    item: Item, objective: Objective, used: Uses, mask: Tensor, valid_B: Tensor | None, entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The mask after `select`, twice: without the answers left out, which count nowhere; and also without the single tokens
    left out, which still take part in their sequence's ratio (None: no single tokens are left out)."""
    looks = "rewards" in used.reads
    selected = objective.select(
        mask,
        rewards=item.tensors.get("rewards") if looks else None,
        group_ids=item.tensors.get("group_ids") if looks else None,
        truncated=item.tensors.get("truncated"),
        valid=valid_B,
        entropy=entropy,
    )
    return (mask, None) if selected is mask else (mask & selected.any(dim=1, keepdim=True), selected)


def _advantages(
    item: Item,
    objective: Objective,
    used: Uses,
    mask: Tensor,
    valid_B: Tensor | None,
    known: Mapping[str, Tensor | None],
) -> Tensor:
    """The given advantages, [B] or [B, T]; else computed from the rewards, [B]; else 1 (the loss is then -log p)."""
    sent, layout = item.tensors, item.layout
    if "advantages" in sent:
        given = sent["advantages"]
        return layout.pad(given) if layout.is_per_token(given) else given
    if not used.makes_advantages:
        return torch.ones(layout.rows, dtype=item.dtype)
    rewards, weights_R = sent["rewards"], sent.get("reward_weights")
    if item.axes["kl"]["place"] == "reward":
        if rewards.dim() == 2:  # there is only one KL, so sum the rewards first
            rewards, weights_R = rewards @ (rewards.new_ones(rewards.shape[1]) if weights_R is None else weights_R), None
        if known["old_log_probs"] is None:
            raise ValueError("a KL in the reward needs old_log_probs [B, T]")
        rewards = objective.with_kl(
            rewards,
            old_log_probs=known["old_log_probs"],
            response_mask=mask,
            ref_log_probs=known["ref_log_probs"],
            rollout_log_probs=known["rollout_log_probs"],
        )
    group_ids = sent.get("group_ids")
    if group_ids is None:
        group_ids = _one_group(layout.rows)
    return objective.advantages(rewards, group_ids, lengths=mask.sum(1), valid=valid_B, reward_weights=weights_R)


def _sees_less(axes: Mapping[str, Any]) -> list[str]:
    """Warnings for an item with the step's weights, which is part of a step: other statistics see this part only."""
    seen = []
    if axes["correct"]["action"] != "none" and axes["correct"]["normalize"]:
        seen.append("correct.normalize")
    if axes["surrogate"]["kind"] in PICKS:
        seen.append(f"surrogate {axes['surrogate']['kind']}")
    return [f"{name} looks at this item alone, not at the step that its weights belong to" for name in seen]


def _picked(objective: Objective, log_probs: Tensor, rows: Rows, seed: int) -> Tensor:
    """The tokens that clip_cov or kl_cov picks, by the log-probs of the policy being trained, which are known here."""
    counted = rows.weights != 0
    _, outputs = objective.loss(log_probs, replace(rows, picked=torch.zeros_like(counted)))
    bounded, policy = outputs.clipped_low | outputs.clipped_high, torch.where(counted, log_probs, 0.0)
    pick = PICKS[objective.surrogate_kind]
    return pick(policy, outputs.advantages, counted, seed, clipped_B_T=bounded, **objective.surrogate_parameters)


# ---------------------------------------------------------------- after the loss


# What `return` may name, apart from the gradients.
RETURNED = {
    "token_loss": lambda outputs: outputs.token_loss,
    "log_importance_ratio": lambda outputs: outputs.log_importance_ratio,
    "ratio": lambda outputs: outputs.ratio,
    "clipped": lambda outputs: outputs.clipped_low | outputs.clipped_high | outputs.clipped_dual,
    "clipped_low": lambda outputs: outputs.clipped_low,
    "clipped_high": lambda outputs: outputs.clipped_high,
    "clipped_dual": lambda outputs: outputs.clipped_dual,
    "advantages": lambda outputs: outputs.advantages,
    "weights": lambda outputs: outputs.weights,
}


@torch.no_grad()
def returned(wanted: frozenset[str], outputs: LossOutputs) -> dict[str, Tensor]:
    """The requested tensors except the gradients, [B, T], for all rows of `outputs`."""
    return {name: tensor_of(outputs).detach() for name, tensor_of in RETURNED.items() if name in wanted}
