"""Options of libraries of which we hold no figures: their formulas, written down plainly, against the axes that express them.

As each library has them: the ratio, the bound, the weight. Aggregation is ours (a fully masked row counts nowhere), and the
case of extreme log ratios, which ours bounds and they do not, is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from service.spec.objective import ObjectiveSpec
from workers.objectives import Objective

CASES = (
    "blog_2x5",
    "ragged_4x7",
    "offpolicy_6x9",
    "holes_4x8",
    "masked_row_5x6",
    "gspo_scale_4x16",
    "token_adv_3x6",
    "square_4x4",
)
LOG_PROBS = ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs")


@dataclass
class Batch:
    """One case; behind the mask all is 0."""

    log_probs: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    advantages: Tensor  # [B, T]
    mask: Tensor

    @property
    def behaviour(self) -> Tensor:
        """exp(old - rollout)."""
        return (self.old - self.rollout).exp()

    @property
    def token_ratio(self) -> Tensor:
        return (self.log_probs - self.old).exp()

    def mean_B(self, values: Tensor) -> Tensor:
        """Over each row's tokens. [B, 1]"""
        return (values * self.mask).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)

    def token_mean(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum() / self.mask.sum()

    def ppo(self, ratio: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
        return -torch.min(ratio * self.advantages, ratio.clamp(1 - low, 1 + high) * self.advantages)

    def k3(self) -> Tensor:
        away = self.ref - self.log_probs
        return away.exp() - away - 1


def openrlhf_tis(b: Batch) -> Tensor:
    """vllm_is_correction_type tis: the weight between two thresholds."""
    return b.token_mean(b.ppo(b.token_ratio) * b.behaviour.clamp(0.97, 1.05))


def openrlhf_seq_mask_tis(b: Batch) -> Tensor:
    """seq-mask-tis: whole sequences are dropped by their geometric mean, tokens keep their own weight."""
    geometric = b.mean_B(b.old - b.rollout).exp()
    return b.token_mean(b.ppo(b.token_ratio) * b.behaviour * ((geometric >= 0.98) & (geometric <= 1.02)))


def verl_is_with_rejection(b: Batch) -> Tensor:
    """Truncated token weights, normalised, and beside them rejection by the geometric mean (without its change of the mask)."""
    weights = b.behaviour.clamp(max=1.03)
    weights = weights / b.token_mean(weights)
    geometric = b.mean_B(b.old - b.rollout).exp()
    return b.token_mean(b.ppo(b.token_ratio) * weights * ((geometric >= 0.98) & (geometric <= 1.02)))


def prime_rl_one_sided(b: Batch) -> Tensor:
    """-min(r, 8) A, whatever the sign of A, summed."""
    return (-(b.log_probs - b.rollout).exp().clamp(max=8) * b.advantages * b.mask).sum()


def prime_rl_sequence(b: Batch) -> Tensor:
    """The product's value with each token's own gradient."""
    moved = (b.log_probs - b.rollout) * b.mask
    ratio = (moved.sum(1, keepdim=True).detach() + moved - moved.detach()).exp()
    return (-ratio * b.advantages * b.mask).sum()


def wide_upper_clip(b: Batch) -> Tensor:
    return b.token_mean(b.ppo(b.token_ratio, high=3.0))


def slime_unbiased_kl(b: Batch) -> Tensor:
    """GSPO with use_unbiased_kl: the penalty is weighted by the token's ratio, the surrogate by the sequence's."""
    ratio = b.mean_B(b.log_probs - b.old).exp()
    return b.token_mean(b.ppo(ratio, 3e-4, 4e-4) + 0.01 * b.token_ratio * b.k3())


def nemo_on_policy_kl(b: Batch) -> Tensor:
    """exp(l - sg l) times the penalty."""
    return b.token_mean(b.ppo(b.token_ratio) + 0.05 * (b.log_probs - b.log_probs.detach()).exp() * b.k3())


def roll_topr(b: Batch) -> Tensor:
    """Good answers: -A log p; bad ones weighed by the whole answer's ratio, at most 1; mean over answers of their sums."""
    ratio = ((b.log_probs - b.old) * b.mask).sum(1, keepdim=True).exp().detach()
    weight = torch.where(b.advantages < 0, ratio.clamp(0, 1), 1.0)
    return -(weight * b.advantages * b.log_probs * b.mask).sum() / (b.mask.sum(1) > 0).sum()


Spec = dict[str, Any]
SUM: Spec = {"anchor": "rollout", "surrogate": "none", "aggregate": "sum"}
GSPO: Spec = {"preset": "gspo", "aggregate": "token"}
CAP: Spec = {"action": "truncate", "cap": 1.03, "normalize": True}
RANGE: Spec = {"low": 0.98, "high": 1.02}


def kl(gradient: str, coef: float) -> Spec:
    return {"kl": {"place": "loss", "gradient": gradient, "coef": coef}}


# The axes, and what is near to them and gives something else.
SPECS: dict[Callable[[Batch], Tensor], tuple[Spec, Spec]] = {
    openrlhf_tis: (
        {"correct": {"action": "truncate", "floor": 0.97, "cap": 1.05}},
        {"correct": {"action": "truncate", "cap": 1.05}},
    ),
    openrlhf_seq_mask_tis: (
        {"correct": {"action": "mask", "mask_level": "geometric"} | RANGE},
        {"correct": {"action": "mask", "level": "geometric"} | RANGE},
    ),
    verl_is_with_rejection: ({"correct": CAP | RANGE | {"mask_level": "geometric"}}, {"correct": CAP}),
    prime_rl_one_sided: (
        SUM | {"surrogate": {"clip_low": 0.999999, "clip_high": 7, "dual_clip": 8}},
        SUM | {"surrogate": {"clip_low": 0.2, "clip_high": 0.2}},
    ),
    prime_rl_sequence: (SUM | {"ratio": "product_token"}, SUM | {"ratio": "sequence_token"}),
    wide_upper_clip: ({"surrogate": {"clip_high": 3}}, {}),
    slime_unbiased_kl: (GSPO | kl("token_ratio_weighted", 0.01), GSPO | kl("ratio_weighted", 0.01)),
    roll_topr: ({"preset": "topr"}, {"preset": "topr", "surrogate": {"weight_min": 0}}),
    nemo_on_policy_kl: (kl("score", 0.05), kl("plain", 0.05)),
}


@pytest.mark.parametrize("formula", SPECS, ids=lambda formula: formula.__name__)
def test_the_axes_express_it(formula, cases):
    spec, near = SPECS[formula]
    differs = False
    for name in CASES:
        case = cases(name)
        mask = case["response_mask"].bool()
        cleared = {key: torch.where(mask, case[key], 0.0) for key in (*LOG_PROBS, "advantages")}
        log_probs = cleared["log_probs"].clone().requires_grad_()
        old, rollout, ref = (cleared[key] for key in LOG_PROBS[1:])
        expected = formula(Batch(log_probs, old, rollout, ref, cleared["advantages"], mask.double()))
        (expected_gradient,) = torch.autograd.grad(expected, log_probs)
        loss, gradient = ours(spec, case)
        assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-13, msg=f"the loss of {name}")
        assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13, msg=f"the gradient of {name}")
        differs |= not torch.allclose(ours(near, case)[1], gradient, rtol=1e-6)
    assert differs, "in some case it is not the same as what is near to it"


def ours(spec: Spec, case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    objective = Objective(ObjectiveSpec.model_validate(spec).resolve())
    log_probs = case["log_probs"].clone().requires_grad_()
    given: dict[str, Any] = {key: case[key] for key in ("response_mask", "advantages", *LOG_PROBS[1:])}
    loss, _ = objective.loss(log_probs, objective.prepare(**given).rows())
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]
