"""Our loss and gradient for an entry, theirs, and whether they agree."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library_losses.options import LIBRARIES, Case, Entry, Figures
from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Objective


def entries_of(library: str, golden: Callable[[str], dict[str, Any]]) -> list[Entry]:
    return [entry for entry in golden(LIBRARIES[library].file)["entries"] if "error" not in entry and "function" not in entry]


def settings(entry: Entry) -> str:
    figures = ("case", "loss", "loss_sum", "grad_log_probs", "metrics", "log_importance_ratio", "advantages")
    return str({key: value for key, value in entry.items() if key not in figures and key != "rollout_is_weights"})


def ours(axes: Mapping[str, Any], case: Case, **changed: Any) -> tuple[Figures, LossOutputs]:
    """Loss, gradient and outputs; `changed` replaces tensors of the step."""
    objective = Objective(ObjectiveSpec.model_validate(axes).resolve())
    given = {
        "response_mask": case["response_mask"],
        "advantages": case["advantages"],
        "old_log_probs": case["old_log_probs"],
        "ref_log_probs": case["ref_log_probs"],
        "rollout_log_probs": case["rollout_log_probs"],
        "group_ids": case["group_index"],
        "dtype": torch.float64,
        "entropy": case["entropy"],
        "selected": objective.select(case["response_mask"], entropy=case["entropy"]),
        **changed,
    }
    log_probs = case["log_probs"].clone().requires_grad_()
    step = objective.prepare(**given)
    # picked tokens are left to the loss: with one batch it can use the current log-probs, as the libraries do
    loss, outputs = objective.loss(log_probs, replace(step.rows(), picked=None))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return (loss.detach(), gradient), outputs


def mapped(library: str, entry: Entry, case: Case) -> tuple[Figures, LossOutputs]:
    """Ours for a library's entry."""
    changed = dict[str, Any]()
    if entry.get("policy_loss_type") == "cross_entropy":
        changed["advantages"] = torch.ones_like(case["advantages"])
    if entry.get("policy_loss_type") in ("clip_cov", "kl_cov"):
        mask = case["response_mask"]
        count = {"token_mean": mask.sum(), "sequence_mean": len(mask) * mask.sum(1, keepdim=True).clamp(min=1)}
        changed["advantages"] = case["advantages"] / count[entry["loss_reduction"]]
    return ours(LIBRARIES[library].axes(entry, case), case, **changed)


def theirs(entry: Entry, as_tensor: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor | None]:
    loss = as_tensor(entry.get("loss", entry.get("loss_sum")))
    return loss, as_tensor(entry["grad_log_probs"]) if "grad_log_probs" in entry else None


def agree(a: Figures, b: tuple[Tensor, Tensor | None], scale: float, tolerance: float) -> bool:
    loss_agrees = bool(abs(a[0] - b[0]) <= tolerance * max(scale, float(abs(b[0]))) + 1e-15)
    if b[1] is None:
        return loss_agrees
    return loss_agrees and bool((a[1] - b[1]).abs().max() <= tolerance * float(b[1].abs().max()) + 1e-15)
