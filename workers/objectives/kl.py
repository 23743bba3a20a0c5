"""The kl axis: a per-token estimate of KL(policy || reference) from sampled tokens, and the way to compute its gradient.

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
    """The importance ratios of the trained policy to the one that sampled, differentiable."""

    pooled: Tensor  # the ratio of the ratio axis, [B, T] or [B, 1]
    delta: Tensor  # each token's own log ratio, [B, T]


def plain(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The estimator itself, differentiated."""
    return value


def straight_through(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The estimator's value with k2's gradient."""
    with_gradient = k2(x)
    return value.detach() + (with_gradient - with_gradient.detach())


def ratio_weighted(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """r times the estimator, with r differentiated too: unbiased if an older policy sampled the tokens."""
    return ratios.pooled * value


def token_ratio_weighted(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """The same with the token's own ratio, for objectives whose ratio is of a segment or sequence."""
    return kernels.bounded_exp(ratios.delta) * value


def score(value: Tensor, x: Tensor, ratios: Ratios) -> Tensor:
    """exp(l - sg l) times the estimator: the same value, and the score-function part of the gradient, KL grad l."""
    return torch.exp(x - x.detach()) * value


GRADIENTS: dict[str, Callable[[Tensor, Tensor, Ratios], Tensor]] = {
    "plain": plain,
    "straight_through": straight_through,
    "ratio_weighted": ratio_weighted,
    "token_ratio_weighted": token_ratio_weighted,
    "score": score,
}


def penalty(x_B_T: Tensor, ratios: Ratios, *, estimator: str, gradient: str) -> Tensor:
    """The KL per token, [B, T]."""
    return GRADIENTS[gradient](ESTIMATORS[estimator](x_B_T), x_B_T, ratios)


@torch.no_grad()
def in_reward(x_B_T: Tensor, *, estimator: str, coef: float) -> Tensor:
    """What to subtract from an answer's reward: coef times the sum over its tokens. [B]"""
    return coef * ESTIMATORS[estimator](x_B_T).sum(dim=1)
