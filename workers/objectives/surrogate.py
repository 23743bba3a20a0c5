"""The surrogate axis: the per-token loss L, to be minimised, and which tokens its rule bounded.

Each function takes `Terms` and its parameters. r is the importance ratio (pooled by the ratio axis), A the advantage,
p the policy; sg is stop-gradient. "Through r" and "through log p" say where the gradient runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from workers.objectives import covariance
from workers.objectives.tensors import bounded_exp, clamped, flag


@dataclass(frozen=True)
class Terms:
    """What a surrogate may use. [B, T], or [B, 1] where a sequence has one value; where masked, finite and of no effect."""

    policy: Callable[[], Tensor]  # log_probs, computed when a surrogate asks for it; the others likewise
    anchor: Callable[[], Tensor]
    weights: Tensor
    delta: Tensor  # log_probs - anchor_log_probs, a token each
    ratio: Tensor  # exp of the pooled delta
    constant: bool  # whether the ratio axis gives the constant 1
    advantages: Tensor
    pool: Callable[[Tensor], Tensor]  # the ratio axis, for rules that bound tokens before they are pooled
    picked: Tensor | None = None  # tokens picked by covariance over the whole optimizer step; None: this batch is the whole

    @cached_property
    def log_probs(self) -> Tensor:
        return self.policy()

    @cached_property
    def anchor_log_probs(self) -> Tensor:
        return self.anchor()

    @cached_property
    def linear(self) -> Tensor:
        """What the plain objective multiplies A by: the ratio, or log p where the ratio is the constant 1."""
        return self.log_probs if self.constant else self.ratio

    @cached_property
    def mask(self) -> Tensor:
        """The tokens that count in the loss."""
        return self.weights != 0


Flags = Tensor | Callable[[], Tensor] | None


def seen(flags: Flags) -> Tensor | None:
    return flags() if callable(flags) else flags


@dataclass(frozen=True)
class TokenLoss:
    """The loss a token, and where it was bounded from below, from above, or by the bound on negative advantages: flags of any
    type, 1 and 0 in that of the loss being the fastest, or functions that give them."""

    loss: Tensor
    low: Flags = None
    high: Flags = None
    dual: Flags = None


def ppo(t: Terms, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A); with a dual clip c, at least c A where A < 0. Through r.

    Written as one clamp whose bounds depend on the sign of A: from above where A > 0, from below where A < 0, and there
    by c from above. PPO (arXiv 1707.06347, eq. 7); dual clip (1912.09729).
    """
    r, a = t.ratio, t.advantages
    negative = a < 0
    lower = _by_sign(negative, 1 - clip_low, -torch.inf, r)
    upper = _by_sign(a > 0, 1 + clip_high, torch.inf if dual_clip is None else dual_clip, r)
    bounded, below, above = clamped(r, lower, upper)
    if dual_clip is None:
        return TokenLoss(-a * bounded, below, above)
    return TokenLoss(-a * bounded, below, lambda: above() * ~negative, lambda: above() * negative)


def two_sided(t: Terms, *, clip_low: float, clip_high: float, delta: float) -> TokenLoss:
    """PPO with the ratio bounded by delta where A < 0: the dual clip under another name (INTELLECT-2, arXiv 2505.07291)."""
    return ppo(t, clip_low=clip_low, clip_high=clip_high, dual_clip=delta)


def cispo(t: Terms, *, weight_min: Sequence[float], weight_max: Sequence[float]) -> TokenLoss:
    """-sg(clip(r, min, max)) A log p, bounds for A >= 0 and for A < 0. Through log p, so no token loses its gradient while the
    weights are positive (MiniMax-M1, arXiv 2506.13585, eq. 4; with [1, 1] and [0, 1] TOPR, 2503.14286)."""
    r, negative = t.ratio.detach(), t.advantages < 0
    lower, upper = _by_sign(negative, weight_min[1], weight_min[0], r), _by_sign(negative, weight_max[1], weight_max[0], r)
    weight = torch.maximum(torch.minimum(r, upper), lower)
    return TokenLoss(-(weight * t.advantages) * t.log_probs, flag(torch.lt, r, lower), flag(torch.gt, r, upper))


def sapo(t: Terms, *, tau_positive: float, tau_negative: float) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A. Through r, damped away from r = 1 (arXiv 2511.20347)."""
    tau = _by_sign(t.advantages > 0, tau_positive, tau_negative, t.ratio)
    return TokenLoss(-4 / tau * torch.sigmoid(tau * (t.ratio - 1)) * t.advantages)


def gmpo(t: Terms, *, clip_low: float, clip_high: float) -> TokenLoss:
    """-A exp(pool(clip(d))): token log ratios bounded on the harmful side, then pooled. Through r (arXiv 2507.20673)."""
    lower = _by_sign(t.advantages < 0, -clip_low, -torch.inf, t.delta)
    upper = _by_sign(t.advantages > 0, clip_high, torch.inf, t.delta)
    bounded, low, high = clamped(t.delta, lower, upper)
    return TokenLoss(-t.advantages * bounded_exp(t.pool(bounded)), low, high)


def tv(t: Terms, *, low: float, high: float) -> TokenLoss:
    """-r A without tokens whose probability moved by more than the bound to the harmful side. Through r (arXiv 2602.04879)."""
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
    r, negative = t.ratio.detach(), t.advantages < 0
    shape, rate = _by_sign(negative, k[1], k[0], r), _by_sign(negative, lam[1], lam[0], r)
    weight = torch.exp(shape * r.log() + rate * (1 - r))
    return TokenLoss(-weight * t.advantages * t.log_probs)


def clip_cov(t: Terms, *, clip_low: float, clip_high: float, share: float, cov_low: float, cov_high: float) -> TokenLoss:
    """PPO, in which the picked tokens (see `covariance.draw`) contribute nothing. Through r (arXiv 2505.22617)."""
    clipped = ppo(t, clip_low=clip_low, clip_high=clip_high)
    picked = t.picked
    if picked is None:
        bounded = (t.advantages > 0) & (t.ratio > 1 + clip_high) | (t.advantages < 0) & (t.ratio < 1 - clip_low)
        picked = covariance.draw(
            t.log_probs, t.advantages, t.mask, share=share, cov_low=cov_low, cov_high=cov_high, clipped_B_T=bounded
        )
    return TokenLoss(torch.where(picked, 0.0, clipped.loss), clipped.low, clipped.high)


def kl_cov(t: Terms, *, share: float, coef: float) -> TokenLoss:
    """-r A, plus coef |d| on the picked tokens (see `covariance.top`). Through r (arXiv 2505.22617)."""
    picked = covariance.top(t.log_probs, t.advantages, t.mask, share=share) if t.picked is None else t.picked
    return TokenLoss(torch.where(picked, coef * t.delta.abs(), 0.0) - t.ratio * t.advantages)


def none(t: Terms) -> TokenLoss:
    """-r A; -A log p where the ratio is the constant 1 (REINFORCE)."""
    return TokenLoss(-t.linear * t.advantages)


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


def _by_sign(condition: Tensor, then: float, otherwise: float, like: Tensor) -> Tensor:
    """torch.where of two numbers in the dtype of `like`; of bare numbers it would be float32."""
    if condition.shape[1] == 1:
        return torch.where(condition, _constant(then, like.dtype, like.device), _constant(otherwise, like.dtype, like.device))
    return like.new_full(condition.shape, otherwise).masked_fill_(condition, then)


@lru_cache(maxsize=256)  # the numbers may be a caller's
def _constant(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(number, dtype=dtype, device=device)


def _pick_drawn(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, seed: int, clipped_B_T: Tensor | None = None, **p: float
) -> Tensor:
    bounds = {name: p[name] for name in ("share", "cov_low", "cov_high")}
    return covariance.draw(log_probs, advantages, mask, **bounds, clipped_B_T=clipped_B_T, seed=seed)


def _pick_top(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, seed: int, clipped_B_T: Tensor | None = None, **p: float
) -> Tensor:
    return covariance.top(log_probs, advantages, mask, share=p["share"])


# Surrogates that look at all tokens of an optimizer step at once: how their tokens are picked before it is cut up. Which
# tokens the clip bounds is known only to who knows the log-probs of the policy that is trained.
PICKS: dict[str, Callable[..., Tensor]] = {"clip_cov": _pick_drawn, "kl_cov": _pick_top}
