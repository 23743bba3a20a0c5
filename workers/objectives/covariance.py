"""Tokens picked by the covariance of their log-prob and advantage, (A - mean A)(log p - mean log p), for clip_cov and
kl_cov (arXiv 2505.22617). Means are over the unmasked tokens of all rows, so tokens are picked for a whole optimizer step."""

import torch
from torch import Tensor


def covariance(log_probs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """The covariance term of each token, [B, T]; meaningless where masked."""
    count = mask_B_T.sum().clamp(min=1)
    mean_log_prob = torch.where(mask_B_T, log_probs_B_T, 0.0).sum() / count
    mean_advantage = torch.where(mask_B_T, advantages_B_T, 0.0).sum() / count
    return (advantages_B_T - mean_advantage) * (log_probs_B_T - mean_log_prob)


@torch.no_grad()
def draw(
    log_probs_B_T: Tensor,
    advantages_B_T: Tensor,
    mask_B_T: Tensor,
    *,
    share: float,
    cov_low: float,
    cov_high: float,
    clipped_B_T: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """A share of all tokens (at least one), drawn with `seed` from the unclipped ones whose covariance is in (low, high)."""
    terms = covariance(log_probs_B_T, advantages_B_T, mask_B_T)
    eligible = mask_B_T & (terms > cov_low) & (terms < cov_high)
    if clipped_B_T is not None:
        eligible = eligible & ~clipped_B_T
    places = eligible.flatten().nonzero().squeeze(1)
    wanted = max(1, int(share * int(mask_B_T.sum())))
    order = torch.randperm(places.numel(), generator=torch.Generator().manual_seed(seed))
    return _at(places[order[:wanted].to(places.device)], mask_B_T)


@torch.no_grad()
def top(log_probs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, *, share: float) -> Tensor:
    """The share of tokens (at least one) with the highest covariance."""
    terms = covariance(log_probs_B_T, advantages_B_T, mask_B_T)
    tokens = int(mask_B_T.sum())
    count = min(tokens, max(1, int(share * tokens)))
    return _at(torch.where(mask_B_T, terms, -torch.inf).flatten().topk(count).indices, mask_B_T)


def _at(places: Tensor, mask_B_T: Tensor) -> Tensor:
    picked = torch.zeros(mask_B_T.numel(), dtype=torch.bool, device=mask_B_T.device)
    picked[places] = True
    return picked.view_as(mask_B_T)
