"""Where we compute something else on purpose: why, and their figure derived from ours."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from library_losses.figures import mapped
from library_losses.options import Case, Entry, Figures, rows
from workers.objectives import kernels


def counting_masked_rows(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = mapped(library, entry, case)[0]
    share = rows(case) / len(case["response_mask"])
    return loss * share, gradient * share


def masked_rows_have_a_loss(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = counting_masked_rows(library, entry, case)
    masked = case["response_mask"].sum(1) == 0
    return loss - case["advantages"][masked, 0].sum() / len(masked), gradient


def unbounded(library: str, entry: Entry, case: Case) -> Figures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MAX_LOG_RATIO", 500.0)
        return mapped(library, entry, case)[0]


def padding_in_the_mean(library: str, entry: Entry, case: Case) -> Figures:
    """mean over B x T of n_i L_it, with the padding's L."""
    o = entry.get("options", {"epsilon": entry.get("epsilon")})
    low, high = (o["epsilon"], o["epsilon_high"]) if "epsilon_high" in o else o["epsilon"]
    mask, advantages = case["response_mask"], case["advantages"]
    log_probs = case["log_probs"].clone().requires_grad_()
    delta, lengths = log_probs - case["old_log_probs"], mask.sum(1, keepdim=True)
    level = o.get("importance_sampling_level", entry.get("importance_sampling_level"))
    log_ratio = {"token": delta, "sequence": (delta * mask).sum(1, keepdim=True) / lengths.clamp(min=1)}[level]
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    away = case["ref_log_probs"] - log_probs
    loss = ((loss + o.get("beta", 0) * (away.exp() - away - 1)) * lengths).mean()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def dividing_by_all_tokens(library: str, entry: Entry, case: Case) -> Figures:
    (loss, gradient), outputs = mapped(library, entry, case)
    share = (outputs.weights != 0).sum() / case["response_mask"].sum()
    return loss * share, gradient * share


def with_entropy_bonus(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = mapped(library, entry, case)[0]
    mask = case["response_mask"]
    return loss - entry["options"]["entropy_coef"] * (case["entropy"] * mask).sum() / mask.sum(), gradient


def gradient_through_the_weight(library: str, entry: Entry, case: Case) -> Figures:
    mask, advantages = case["response_mask"], case["advantages"]
    log_probs = case["log_probs"].clone().requires_grad_()
    ratio = (
        ((log_probs - case["old_log_probs"]).clamp(-20, 20) * mask).sum(1, keepdim=True).clamp(-18.420680743952367, 20).exp()
    )
    k, lam = torch.where(advantages < 0, 3.0, 2.0), torch.where(advantages < 0, 2.0, 3.0)
    loss = (-(ratio**k * torch.exp(lam * (1 - ratio))) * advantages * log_probs * mask).sum() / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def mean_of_pairs(library: str, entry: Entry, case: Case) -> Figures:
    parts = [
        mapped(library, entry, {k: v[i : i + 2] for k, v in case.items()})[0] for i in range(0, len(case["advantages"]), 2)
    ]
    return sum((loss for loss, _ in parts), torch.zeros(())) / len(parts), torch.cat([g for _, g in parts]) / len(parts)


@dataclass(frozen=True)
class Difference:
    reason: str
    applies: Callable[[str, Entry, Case], bool]
    derive: Callable[[str, Entry, Case], Figures]


DIFFERENCES = (
    Difference(
        "they divide by all rows; a fully masked row counts nowhere here, so that padding a batch changes nothing",
        lambda library, entry, case: rows(case) < len(case["response_mask"]),
        counting_masked_rows,
    ),
    Difference(
        "their gmpo gives a fully masked row the ratio 1 and the loss -A / B",
        lambda library, entry, case: rows(case) < len(case["response_mask"]) and entry.get("trainer") == "experimental.gmpo",
        masked_rows_have_a_loss,
    ),
    Difference(
        "they do not bound the log ratio: exp(25) and more reaches loss and gradient, in float32 it overflows",
        lambda library, entry, case: entry["case"] == "extreme_4x6",
        unbounded,
    ),
    Difference(
        "luspo there is a mean over B x T that takes the padding in and ignores the mask",
        lambda library, entry, case: luspo(entry),
        padding_in_the_mean,
    ),
    Difference(
        "top-entropy selection there keeps the divisor of all tokens; ours selects before the weights are computed",
        lambda library, entry, case: "top_entropy_quantile" in entry.get("options", {}),
        dividing_by_all_tokens,
    ),
    Difference(
        "an entropy bonus is no part of these axes: it needs the logits",
        lambda library, entry, case: "entropy_coef" in entry.get("options", {}),
        with_entropy_bonus,
    ),
    Difference(
        "Liger differentiates VESPO's weight; the paper (and TRL) stop the gradient there",
        lambda library, entry, case: library == "liger" and entry["loss_type"] == "vespo",
        gradient_through_the_weight,
    ),
    Difference(
        "token_mean_legacy averages micro-batch means, so the result depends on the cut; our weights know the whole step",
        lambda library, entry, case: entry.get("loss_reduction") == "token_mean_legacy",
        mean_of_pairs,
    ),
)


def luspo(entry: Entry) -> bool:
    return entry.get("loss_type", entry.get("options", {}).get("loss_type")) == "luspo"


def not_offered(entry: Entry) -> bool:
    """rollout_is is added in test_extension.py; dropping sequences by their worst token is left out of the axes."""
    return entry.get("policy_loss_type") == "rollout_is" or "outlier_token_is_threshold_low" in entry.get(
        "off_policy_correction", {}
    )
