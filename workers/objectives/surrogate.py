"""The surrogate axis: the per-token loss L, to be minimised, and flags for the tokens that its rule bounded.

Each function takes `Terms` and its parameters. r is the importance ratio (pooled by the ratio axis), A the advantage,
p the policy; sg is stop-gradient. "Through r" and "through log p" say through which term the gradient flows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from workers.objectives import covariance, kernels
from workers.objectives.step import Moved
from workers.objectives.tensors import either


@dataclass(frozen=True)
class Terms:
    """The inputs of a surrogate. [B, T], or [B, 1] if a sequence has one value. Masked values are finite and have no effect."""

    ratio: Tensor  # r, the exponential of the ratio axis's result
    advantages: Tensor  # A
    delta: Tensor  # d = log p - log p_anchor of each token
    weights: Tensor  # of the aggregate axis; 0 if a token does not count
    constant: bool  # whether the ratio axis gives the constant 1
    pool: Callable[[Tensor], Tensor]  # the ratio axis, for rules that bound tokens before they are pooled
    picked: Tensor | None  # tokens picked by covariance over the whole optimizer step; None: this batch is the whole step
    moved: Moved
    anchor: str  # whose log-probs p_anchor are

    @property
    def log_probs(self) -> Tensor:
        """log p"""
        return self.moved.less(None)

    @property
    def anchor_log_probs(self) -> Tensor:
        """log p_anchor"""
        return self.moved.other(self.anchor) if self.moved.knows(self.anchor) else self.log_probs.detach()


@dataclass(frozen=True)
class TokenLoss:
    """The loss per token, and flags for tokens bounded from below, from above, or by the dual clip: booleans, or 1 and 0 in any
    dtype."""

    loss: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    dual: Tensor | None = None


def ppo(t: Terms, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A); with a dual clip c, at least c A where A < 0. Through r.

    That is one clamp of r whose bounds depend on the sign of A: above by 1 + high if A > 0; below by 1 - low and above by c if
    A < 0. PPO (arXiv 1707.06347, eq. 7); dual clip (1912.09729).
    """
    r, a = t.ratio, t.advantages
    lower = either(a < 0, 1 - clip_low, -inf, r)
    upper = either(a > 0, 1 + clip_high, inf if dual_clip is None else dual_clip, r)
    bounded, below, above = kernels.clamp(r, lower, upper)
    if dual_clip is None:
        return TokenLoss(-a * bounded, below, above)
    return TokenLoss(-a * bounded, below, above * ~(a < 0), above * (a < 0))


def two_sided(t: Terms, *, clip_low: float, clip_high: float, delta: float) -> TokenLoss:
    """PPO with the ratio bounded by delta where A < 0: the dual clip under another name (INTELLECT-2, arXiv 2505.07291)."""
    return ppo(t, clip_low=clip_low, clip_high=clip_high, dual_clip=delta)


def cispo(t: Terms, *, weight_min: Sequence[float], weight_max: Sequence[float]) -> TokenLoss:
    """-sg(clip(r, min, max)) A log p, bounds for A >= 0 and for A < 0. Through log p, so no token loses its gradient while the
    weights are positive (MiniMax-M1, arXiv 2506.13585, eq. 4; with [1, 1] and [0, 1] TOPR, 2503.14286)."""
    r, a = t.ratio.detach(), t.advantages
    lower, upper = either(a < 0, weight_min[1], weight_min[0], r), either(a < 0, weight_max[1], weight_max[0], r)
    weight, below, above = kernels.clamp(r, lower, upper)
    return TokenLoss(-(weight * a) * t.log_probs, below, above)


def sapo(t: Terms, *, tau_positive: float, tau_negative: float) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A. Through r, damped away from r = 1 (arXiv 2511.20347)."""
    r, a = t.ratio, t.advantages
    tau = either(a > 0, tau_positive, tau_negative, r)
    return TokenLoss(-4 / tau * torch.sigmoid(tau * (r - 1)) * a)


def gmpo(t: Terms, *, clip_low: float, clip_high: float) -> TokenLoss:
    """-A exp(pool(clip(d))): token log ratios bounded on the harmful side, then pooled. Through r (arXiv 2507.20673)."""
    d, a = t.delta, t.advantages
    lower, upper = either(a < 0, -clip_low, -inf, d), either(a > 0, clip_high, inf, d)
    bounded, below, above = kernels.clamp(d, lower, upper)
    return TokenLoss(-a * kernels.bounded_exp(t.pool(bounded)), below, above)


def tv(t: Terms, *, low: float, high: float) -> TokenLoss:
    """-r A, without tokens whose probability moved further than the bound to the harmful side. Through r (arXiv 2602.04879)."""
    with torch.no_grad():
        moved = t.log_probs.exp() - t.anchor_log_probs.exp()
        too_high, too_low = (t.advantages > 0) & (moved > high), (t.advantages < 0) & (moved < -low)
    return _without(t, too_low, too_high)


def bkl(t: Terms, *, low: float, high: float) -> TokenLoss:
    """As tv, with the KL of the two-outcome distribution (this token or another) as the measure (arXiv 2602.04879)."""
    with torch.no_grad():
        p, q = t.log_probs.exp().clamp(max=1), t.anchor_log_probs.exp().clamp(max=1)
        tiny = torch.finfo(p.dtype).tiny
        rest = (1 - q) * (torch.log((1 - q).clamp(min=tiny)) - torch.log((1 - p).clamp(min=tiny)))
        divergence = rest - q * t.delta
        too_high = (t.advantages > 0) & (p > q) & (divergence > high)
        too_low = (t.advantages < 0) & (p < q) & (divergence > low)
    return _without(t, too_low, too_high)


def _without(t: Terms, low: Tensor, high: Tensor) -> TokenLoss:
    return TokenLoss(-torch.where(low | high, 0.0, t.advantages) * t.ratio, low, high)


def dro(t: Terms, *, beta: float) -> TokenLoss:
    """-(A log p - beta / 2 d^2). Through log p; the quadratic takes the place of the clip (arXiv 2405.19107)."""
    return TokenLoss(beta / 2 * t.delta.square() - t.advantages * t.log_probs)


def vespo(t: Terms, *, k: Sequence[float], lam: Sequence[float]) -> TokenLoss:
    """-sg(w) A log p, w = r^k exp(lam (1 - r)); k and lam for A >= 0 and for A < 0. Through log p (arXiv 2602.10693)."""
    r, a = t.ratio.detach(), t.advantages
    shape, rate = either(a < 0, k[1], k[0], r), either(a < 0, lam[1], lam[0], r)
    weight = torch.exp(shape * r.log() + rate * (1 - r))
    return TokenLoss(-weight * a * t.log_probs)


def clip_cov(t: Terms, *, clip_low: float, clip_high: float, share: float, cov_low: float, cov_high: float) -> TokenLoss:
    """PPO, in which the picked tokens (see `covariance.draw`) contribute nothing. Through r (arXiv 2505.22617)."""
    clipped = ppo(t, clip_low=clip_low, clip_high=clip_high)
    picked = t.picked
    if picked is None:
        r, a, counted = t.ratio, t.advantages, t.weights != 0
        outside = (a > 0) & (r > 1 + clip_high) | (a < 0) & (r < 1 - clip_low)
        picked = covariance.draw(t.log_probs, a, counted, share=share, cov_low=cov_low, cov_high=cov_high, clipped_B_T=outside)
    return TokenLoss(torch.where(picked, 0.0, clipped.loss), clipped.low, clipped.high)


def kl_cov(t: Terms, *, share: float, coef: float) -> TokenLoss:
    """-r A, plus coef |d| on the picked tokens (see `covariance.top`). Through r (arXiv 2505.22617)."""
    picked = covariance.top(t.log_probs, t.advantages, t.weights != 0, share=share) if t.picked is None else t.picked
    return TokenLoss(torch.where(picked, coef * t.delta.abs(), 0.0) - t.ratio * t.advantages)


def none(t: Terms) -> TokenLoss:
    """-r A; -A log p where the ratio is the constant 1 (REINFORCE)."""
    return TokenLoss(-(t.log_probs if t.constant else t.ratio) * t.advantages)


SURROGATES: dict[str, Callable[..., TokenLoss]] = {
    "ppo": ppo,
    "two_sided": two_sided,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "tv": tv,
    "bkl": bkl,
    "dro": dro,
    "vespo": vespo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "none": none,
}
# Those with a term that is no multiple of the advantage: a token that has none still moves the policy.
UNSCALED = frozenset({"dro", "kl_cov"})


def _pick_drawn(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, seed: int, clipped_B_T: Tensor | None = None, **p: float
) -> Tensor:
    bounds = {name: p[name] for name in ("share", "cov_low", "cov_high")}
    return covariance.draw(log_probs, advantages, mask, **bounds, clipped_B_T=clipped_B_T, seed=seed)


def _pick_top(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, seed: int, clipped_B_T: Tensor | None = None, **p: float
) -> Tensor:
    return covariance.top(log_probs, advantages, mask, share=p["share"])


# For surrogates that need all tokens of an optimizer step: how to pick their tokens before the step is split. `clipped_B_T` can
# be given only if the log-probs of the policy being trained are known.
PICKS: dict[str, Callable[..., Tensor]] = {"clip_cov": _pick_drawn, "kl_cov": _pick_top}
