"""The kl axis: a per-token estimate of KL(policy || reference) from sampled tokens, and how its gradient is taken.

x = log p - log p_ref [B, T], 0 where masked. The estimators are Schulman's (http://joschu.net/blog/kl-approx.html).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workers.objectives import kernels


def k1(x: Tensor) -> Tensor:
    """x. Unbiased; its gradient has expectation 0 on policy, so it belongs in the reward."""
    return x


def k2(x: Tensor) -> Tensor:
    """x^2 / 2. Biased; its gradient is the KL's."""
    return x.square() / 2


def k3(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x. Unbiased and never negative (GRPO)."""
    return kernels.k3(x)


def absolute(x: Tensor) -> Tensor:
    """|x|."""
    return x.abs()


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}


class Ratios(NamedTuple):
    """How much likelier the trained policy makes what was sampled, differentiable."""

    pooled: Tensor  # as the ratio axis has it, [B, T] or [B, 1]
    delta: Tensor  # the logarithm of each token's own, [B, T]


def plain(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The estimator differentiated as it stands."""
    return value


def straight_through(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The estimator's value with k2's gradient."""
    with_gradient = k2(x)
    return value.detach() + (with_gradient - with_gradient.detach())


def ratio_weighted(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """r times the estimator, r differentiated too: unbiased when the tokens were sampled by an older policy."""
    return ratios.pooled * value


def token_ratio_weighted(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The same with the token's own ratio, where the surrogate's is of something larger."""
    return kernels.bounded_exp(ratios.delta) * value


def score(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """exp(l - sg l) times the estimator: its value, and the score function's share of the gradient, KL grad l."""
    return torch.exp(x - x.detach()) * value


GRADIENTS: dict[str, Callable[[Tensor, Tensor, Ratios], Tensor]] = {
    "plain": plain,
    "straight_through": straight_through,
    "ratio_weighted": ratio_weighted,
    "token_ratio_weighted": token_ratio_weighted,
    "score": score,
}


def penalty(x_B_T: Tensor, ratios: Ratios, *, estimator: str, gradient: str) -> Tensor:
    """The KL a token, [B, T]."""
    return GRADIENTS[gradient](ESTIMATORS[estimator](x_B_T), x_B_T, ratios)


@torch.no_grad()
def in_reward(x_B_T: Tensor, *, estimator: str, coef: float) -> Tensor:
    """What an answer's reward is lowered by: coef times the sum over its tokens. [B]"""
    return coef * ESTIMATORS[estimator](x_B_T).sum(dim=1)
