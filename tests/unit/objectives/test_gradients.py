"""Gradients: against finite differences where the loss is differentiated as it stands, against the formula where it is not."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from service.spec.objective import ObjectiveSpec
from workers.objectives import Objective
from workers.objectives.kernels import clamp

DIFFERENTIATED = {
    "ppo": {"surrogate": {"kind": "ppo", "clip_low": 0.1, "clip_high": 0.15}},
    "ppo dual": {"surrogate": {"kind": "ppo", "clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.2}},
    "two_sided": {"surrogate": {"kind": "two_sided", "delta": 1.2}},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": {"kind": "gmpo", "clip_low": 0.1, "clip_high": 0.1}},
    "dro": {"surrogate": {"kind": "dro", "beta": 0.7}},
    "none": {"surrogate": "none"},
    "reinforce": {"ratio": "one", "surrogate": "none"},
    "kl_cov": {"surrogate": {"kind": "kl_cov", "share": 0.3}},
    "kl k1": {"kl": {"place": "loss", "estimator": "k1"}},
    "kl k2": {"kl": {"place": "loss", "estimator": "k2", "reference": "rollout"}},
    "kl k3": {"kl": {"place": "loss", "estimator": "k3"}},
    "kl abs": {"kl": {"place": "loss", "estimator": "abs"}},
    "kl ratio-weighted": {"kl": {"place": "loss", "estimator": "k3", "gradient": "ratio_weighted"}},
    "corrected": {"correct": {"action": "truncate", "cap": 1.05}},
    "stale dropped": {"correct": {"action": "none", "sequence_delta": 0.02}},
}
RATIOS = ["token", "sequence", "product", {"kind": "segment", "chunk": 2}]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Ratios on both sides of every bound, and none near it: the smallest distance is far above gradcheck's step."""
    generator = torch.Generator().manual_seed(5)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)

    log_probs = -normal(1.0).abs() - 0.2
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + normal(0.2),
        "rollout_log_probs": log_probs + normal(0.2),
        "ref_log_probs": log_probs + normal(0.2),
        "response_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0, -0.7, 5.0], dtype=torch.float64),
        "group_ids": torch.tensor([0, 0, 1, 1]),
    }


def prepared(spec, batch):
    objective = Objective(ObjectiveSpec.model_validate(spec).resolve())
    return objective, objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradient_is_the_derivative_of_the_loss(name, ratio, batch):
    spec = {"ratio": ratio, **DIFFERENTIATED[name]}
    objective, step = prepared(spec, batch)

    def loss(log_probs: Tensor) -> Tensor:
        return objective.loss(log_probs, step.rows())[0]

    assert gradcheck(loss, (batch["log_probs"].requires_grad_(),), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "aggregate", ["token", "seq", "prompt", "seq_sum", "sum", "constant", {"kind": "seq", "length_power": 1}], ids=str
)
def test_aggregation_weights_enter_value_and_gradient_alike(aggregate, batch):
    objective, step = prepared({"aggregate": aggregate}, batch)
    assert gradcheck(lambda log_probs: objective.loss(log_probs, step.rows())[0], (batch["log_probs"].requires_grad_(),))


def gradient_of(spec, batch) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the weights, and d = log p - log p_old, 0 where masked."""
    objective, step = prepared(spec, batch)
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, outputs = objective.loss(log_probs, step.rows())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    delta = torch.where(batch["response_mask"].bool(), batch["log_probs"] - batch["old_log_probs"], 0.0)
    return gradient, outputs.weights, delta


def test_cispo_weighs_the_policy_gradient_by_the_clipped_ratio(batch):
    gradient, weights, delta = gradient_of({"surrogate": {"kind": "cispo", "weight_min": 0.9, "weight_max": 1.1}}, batch)
    clipped = delta.exp().clamp(0.9, 1.1)
    assert (clipped == 0.9).any()
    assert (clipped == 1.1).any()
    assert_close(gradient, -weights * clipped * batch["advantages"].unsqueeze(1))


def test_topr_learns_good_answers_as_they_are_and_fades_bad_ones_out(batch):
    gradient, weights, delta = gradient_of("topr", batch)
    ratio, advantages = delta.sum(1, keepdim=True).exp(), batch["advantages"].unsqueeze(1)
    assert ((advantages < 0) & (ratio < 1)).any()
    assert ((advantages < 0) & (ratio > 1)).any()
    assert_close(gradient, -weights * torch.where(advantages < 0, ratio.clamp(max=1), 1.0) * advantages)


def test_vespo_weighs_the_policy_gradient_by_its_gamma_weight(batch):
    gradient, weights, delta = gradient_of("vespo", batch)
    ratio, advantages = delta.sum(1, keepdim=True).exp(), batch["advantages"].unsqueeze(1)
    weight = torch.where(advantages < 0, ratio**3 * torch.exp(2 * (1 - ratio)), ratio**2 * torch.exp(3 * (1 - ratio)))
    assert_close(gradient, -weights * weight * advantages)


@pytest.mark.parametrize(
    "spec",
    [{"surrogate": {"kind": "tv", "low": 0.05, "high": 0.05}}, {"surrogate": {"kind": "bkl", "low": 0.02, "high": 0.02}}],
)
def test_trust_regions_drop_tokens_that_moved_too_far_on_the_harmful_side_only(spec, batch):
    gradient, weights, delta = gradient_of(spec, batch)
    advantages = batch["advantages"].unsqueeze(1).expand_as(delta)
    p, q = batch["log_probs"].exp(), batch["old_log_probs"].exp()
    measure = {"tv": (p - q).abs(), "bkl": q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()}[spec["surrogate"]["kind"]]
    harmful = (p - q) * advantages > 0
    dropped = harmful & (measure > spec["surrogate"]["low"]) & batch["response_mask"].bool()
    assert dropped.any()
    assert (batch["response_mask"].bool() & ~dropped & (measure > spec["surrogate"]["low"])).any()
    assert_close(gradient, torch.where(dropped, 0.0, -weights * delta.exp() * advantages))


def test_gspo_token_gives_each_token_its_own_advantage_under_the_sequences_ratio(batch):
    token_level = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spec = {"ratio": "sequence_token", "surrogate": "none", "aggregate": "seq"}
    gradient, weights, delta = gradient_of(spec, batch | {"advantages": token_level})
    lengths = batch["response_mask"].sum(1, keepdim=True).clamp(min=1)
    assert_close(gradient, -weights * (delta.sum(1, keepdim=True) / lengths).exp() * token_level)


def test_gspo_gives_every_token_the_mean_advantage(batch):
    token_level = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient, weights, delta = gradient_of(
        {"ratio": "sequence", "surrogate": "none", "aggregate": "seq"}, batch | {"advantages": token_level}
    )
    mask = batch["response_mask"]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    mean = (token_level * mask).sum(1, keepdim=True) / lengths
    assert_close(gradient, -weights * (delta.sum(1, keepdim=True) / lengths).exp() * mean)


def test_straight_through_has_the_estimators_value_and_k2s_gradient(batch):
    free = batch | {"advantages": torch.zeros(4, dtype=torch.float64)}
    kl = {"place": "loss", "estimator": "k3", "coef": 1.0}
    straight, weights, _ = gradient_of({"kl": {**kl, "gradient": "straight_through"}}, free)
    away = torch.where(batch["response_mask"].bool(), batch["log_probs"] - batch["ref_log_probs"], 0.0)
    assert_close(straight, weights * away)
    losses = [prepared({"kl": {**kl, "gradient": gradient}}, free) for gradient in ("straight_through", "plain")]
    values = [objective.loss(batch["log_probs"], step.rows())[0] for objective, step in losses]
    assert_close(values[0], values[1])


def test_the_order_of_addition_keeps_digits_in_low_precision():
    """sg(mean) + (d - sg d) is the mean to the last bit; (sg(mean) + d) - sg d is not."""
    from workers.objectives.ratio import AnswerTokens, sequence, sequence_token

    delta = torch.tensor([[300.0, -299.9, 0.01]], dtype=torch.bfloat16)
    answers = AnswerTokens.of(torch.ones(1, 3, dtype=torch.bool))
    mean = sequence(delta, answers)
    assert torch.equal(sequence_token(delta, answers), mean.expand(1, 3))
    assert not torch.equal((mean + delta) - delta, mean.expand(1, 3))


def test_clip_cov_drops_only_drawn_tokens_of_high_covariance(batch):
    spec = {"surrogate": {"kind": "clip_cov", "share": 0.3, "cov_low": 0.1, "cov_high": 9.0}}
    gradient, _, _ = gradient_of(spec, batch)
    plain, _, _ = gradient_of({}, batch)
    lost = (gradient == 0) & (plain != 0)
    mask, advantages = batch["response_mask"].bool(), batch["advantages"].unsqueeze(1).expand(4, 5)
    old = batch["old_log_probs"]
    covariance = (advantages - advantages[mask].mean()) * (old - old[mask].mean())
    assert lost.sum() <= max(1, int(0.3 * mask.sum()))
    assert lost.any()
    assert (covariance[lost] > 0.1).all()
    assert_close(gradient[~lost], plain[~lost])
    again, _, _ = gradient_of(spec, batch)
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("width", [1, 2])
def test_at_a_bound_nothing_is_flagged_and_the_gradient_passes(width):
    """One number a sequence goes another way than one a token."""
    values = torch.tensor([0.8, 0.79, 1.2, 1.21, 1.0], dtype=torch.float64).unsqueeze(1).repeat(1, width).requires_grad_()
    lower, upper = torch.full_like(values, 0.8), torch.full_like(values, 1.2)
    bounded, below, above = clamp(values, lower, upper)
    assert bounded[:, 0].tolist() == [0.8, 0.8, 1.2, 1.2, 1.0]
    assert below[:, 0].bool().tolist() == [False, True, False, False, False]
    assert above[:, 0].bool().tolist() == [False, False, False, True, False]
    (gradient,) = torch.autograd.grad(bounded.sum(), values)
    assert gradient[:, 0].tolist() == [1, 0, 1, 0, 1]
