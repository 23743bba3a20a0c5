"""The named losses of training sessions, whose clients drive the loop: sums over tokens, never means.

    LOSSES["ppo"].of(log_probs, Inputs({"log_probs": ..., "advantages": ...}, {"clip_low_threshold": 0.8, ...}, ...))

A loss is a scalar to minimise, over the N tokens of all items, one after the other. lp are the log-probs of the targets under
the policy that is trained, q those that came with the request (of the policy that sampled), A the advantages, r = exp(lp - q).
`mask` [N] leaves out the tokens where it is 0, whatever stands there. As the losses are sums, those of parts of a batch add up
to the batch's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# How a ratio is bounded: these are bounds of the ratio itself, not offsets from 1.
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one pass beside the log-probs that carry the graph, each [N], and the numbers of the loss's config."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, float]
    items: Tensor  # [N] which item each token belongs to, numbered from 0
    count: int  # of the items

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def bound(self, name: str) -> Tensor | float:
        """A bound of the ratio: the token's own, where the request has such a tensor, else the config's."""
        return self.tensors.get(name, self.config[name])

    def counted(self, like: Tensor) -> Tensor:
        mask = self.tensors.get("mask")
        return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def cross_entropy(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-lp * weights), both [N] or [N, K]. A weight may have any sign; where it is 0, nothing is learnt, even from -inf.
    Without weights all are 1."""
    weights = given.tensors.get("weights", torch.ones_like(log_probs))
    return -(torch.where(weights != 0, log_probs, 0.0) * weights).sum()


def importance_sampling(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-r * A)"""
    advantages = _advantages(given)
    return -(_moved(log_probs, given, advantages != 0).exp() * advantages).sum()


def ppo(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-min(r * A, clip(r, low, high) * A))"""
    advantages = _advantages(given)
    return _clipped(_moved(log_probs, given, advantages != 0).exp(), advantages, given)


def cispo(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-sg(clip(r, low, high)) * lp * A), where no gradient runs through sg (MiniMax-M1, arXiv 2506.13585)"""
    advantages = _advantages(given)
    ratio = _moved(log_probs, given, advantages != 0).detach().exp()
    return -(_clip(ratio, given) * torch.where(advantages != 0, log_probs, 0.0) * advantages).sum()


def dro(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-(lp * A - beta / 2 * (lp - q)^2)) (arXiv 2405.19107). The square counts where A is 0, unless it is masked."""
    counted = given.counted(log_probs)
    learnt, moved = torch.where(counted, log_probs, 0.0), _moved(log_probs, given, counted)
    return -(learnt * _advantages(given) - given.config["beta"] / 2 * moved.square()).sum()


def gspo(log_probs: Tensor, given: Inputs) -> Tensor:
    """sum(-min(s * A, clip(s, low, high) * A)) over the tokens under the mask, with the ratio of the sequence at each token:

    s = sg(exp(mean of lp - q over the item's mask)) * exp(lp - sg(lp)): GSPO-token (arXiv 2507.18071, eq. 14), which is GSPO
    where all advantages of an item are equal.
    """
    counted = given.counted(log_probs)
    moved = _moved(log_probs.detach(), given, counted)
    zeros = moved.new_zeros(given.count)
    lengths = zeros.index_add(0, given.items, counted.to(moved.dtype))
    means = zeros.index_add(0, given.items, moved) / lengths.clamp(min=1)
    learnt = torch.where(counted, log_probs, 0.0)
    return _clipped(means[given.items].exp() * (learnt - learnt.detach()).exp(), _advantages(given), given)


def _advantages(given: Inputs) -> Tensor:
    """The advantages, 0 where the mask leaves the token out."""
    advantages = given["advantages"]
    return torch.where(given.counted(advantages), advantages, 0.0)


def _moved(log_probs: Tensor, given: Inputs, counted: Tensor) -> Tensor:
    """lp - q where it counts, else 0: what stands on other tokens must not reach the sum, not even as 0 times infinity."""
    return torch.where(counted, log_probs, 0.0) - torch.where(counted, given["log_probs"], 0.0)


def _clip(ratio: Tensor, given: Inputs) -> Tensor:
    low, high = (torch.as_tensor(given.bound(name), dtype=ratio.dtype, device=ratio.device) for name in (LOW, HIGH))
    return ratio.clamp(low, high)


def _clipped(ratio: Tensor, advantages: Tensor, given: Inputs) -> Tensor:
    return -torch.minimum(ratio * advantages, _clip(ratio, given) * advantages).sum()


@dataclass(frozen=True)
class SumLoss:
    """A loss, the tensors that it needs and may get, and its config: names and defaults (None: it has to be given)."""

    of: Callable[[Tensor, Inputs], Tensor]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ("mask",)
    config: Mapping[str, float | None] = field(default_factory=dict)


_SAMPLED = ("log_probs", "advantages")
_CLIPS = ("mask", LOW, HIGH)

# GSPO's bounds are those of its paper: the mean of a sequence moves by thousandths, so that wider ones would never act.
LOSSES: Mapping[str, SumLoss] = {
    "cross_entropy": SumLoss(cross_entropy, (), ("weights",)),
    "importance_sampling": SumLoss(importance_sampling, _SAMPLED),
    "ppo": SumLoss(ppo, _SAMPLED, _CLIPS, {LOW: 0.8, HIGH: 1.2}),
    "cispo": SumLoss(cispo, _SAMPLED, _CLIPS, {LOW: 0.0, HIGH: 4.0}),
    "dro": SumLoss(dro, _SAMPLED, config={"beta": None}),
    "gspo": SumLoss(gspo, (*_SAMPLED, "mask"), (LOW, HIGH), {LOW: 1 - 3e-4, HIGH: 1 + 4e-4}),
}
