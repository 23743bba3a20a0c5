"""The advantage axis: from rewards [B] (or several, [B, R]) to one advantage per sequence [B]. Computed in float64.

Invalid samples (ungraded, or with a reward that is not finite) enter no statistic and get 0. In a group whose rewards are all
equal, such as a group of one, every baseline gives exactly 0; only whitening over the batch changes it afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.objectives.tensors import by_column, group_indices, group_sum


@dataclass(frozen=True)
class Groups:
    """The groups of a batch and its valid rows."""

    index_B: Tensor
    count: int
    valid_B: Tensor
    lengths_B: Tensor

    @property
    def sizes_B(self) -> Tensor:
        """Valid members of each row's group, at least 1."""
        return self.sum_B(self.valid_B.double()).clamp(min=1)

    def sum_B(self, values_B: Tensor) -> Tensor:
        """Each row gets its group's sum over valid rows."""
        return group_sum(torch.where(self.valid_B, values_B, 0.0), self.index_B, self.count)[self.index_B]

    def mean_B(self, values_B: Tensor) -> Tensor:
        return self.sum_B(values_B) / self.sizes_B

    def extreme_B(self, values_B: Tensor, how: str) -> Tensor:
        """Each row gets its group's amax or amin over valid rows."""
        nothing = torch.full(
            (self.count,), torch.inf if how == "amin" else -torch.inf, dtype=torch.float64, device=values_B.device
        )
        values_B, index_B = values_B[self.valid_B], self.index_B[self.valid_B]
        return nothing.scatter_reduce(0, index_B, values_B, how)[self.index_B]

    def spread_B(self, values_B: Tensor) -> Tensor:
        """Whether the row's group has two different values."""
        return self.extreme_B(values_B, "amax") > self.extreme_B(values_B, "amin")


# ---------------------------------------------------------------- centre: reward minus a baseline


def as_given(rewards_B: Tensor, groups: Groups) -> Tensor:
    """R."""
    return rewards_B


def group_mean(rewards_B: Tensor, groups: Groups) -> Tensor:
    """R - mean (GRPO, arXiv 2402.03300)."""
    return rewards_B - groups.mean_B(rewards_B)


def leave_one_out(rewards_B: Tensor, groups: Groups) -> Tensor:
    """R minus the mean of the others, n / (n - 1) (R - mean) (RLOO, arXiv 2402.14740)."""
    n = groups.sizes_B
    return group_mean(rewards_B, groups) * n / (n - 1).clamp(min=1)


def length_weighted(rewards_B: Tensor, groups: Groups) -> Tensor:
    """R minus the length-weighted mean (OPO, arXiv 2505.23585)."""
    tokens_B = groups.lengths_B
    return rewards_B - groups.sum_B(tokens_B * rewards_B) / groups.sum_B(tokens_B).clamp(min=1)


def best_minus_second(rewards_B: Tensor, groups: Groups) -> Tensor:
    """The best answer gets its lead over the second, the others 0; a tie for the best gives 0 (pass@k, arXiv 2503.19595)."""
    best_B = (rewards_B == groups.extreme_B(rewards_B, "amax")) & groups.valid_B
    second_B = groups.extreme_B(torch.where(best_B, -torch.inf, rewards_B), "amax")
    alone_B = groups.sum_B(best_B.double()) == 1
    return torch.where(best_B & alone_B, rewards_B - second_B, 0.0)


CENTRES: dict[str, Callable[[Tensor, Groups], Tensor]] = {
    "none": as_given,
    "given": as_given,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted": length_weighted,
    "best_minus_second": best_minus_second,
}
BASELINES = frozenset(CENTRES) - {"none", "given"}


# ---------------------------------------------------------------- scale


def unscaled(centred_B: Tensor, rewards_B: Tensor, groups: Groups, eps: float) -> Tensor:
    """No scaling."""
    return centred_B


def group_std(centred_B: Tensor, rewards_B: Tensor, groups: Groups, eps: float) -> Tensor:
    """Divided by the group's unbiased standard deviation; 0 in a group whose rewards are all equal."""
    variance_B = groups.sum_B(group_mean(rewards_B, groups).square()) / (groups.sizes_B - 1).clamp(min=1)
    return torch.where(groups.spread_B(rewards_B), centred_B / (variance_B.sqrt() + eps).clamp(min=_TINY), 0.0)


def batch_std(centred_B: Tensor, rewards_B: Tensor, groups: Groups, eps: float) -> Tensor:
    """Divided by the unbiased standard deviation of all rewards; 0 if they are all equal."""
    _, deviation = _moments(rewards_B, groups.valid_B.double())
    return centred_B / (deviation + eps) if deviation > 0 else torch.zeros_like(centred_B)


def over_group_mean(centred_B: Tensor, rewards_B: Tensor, groups: Groups, eps: float) -> Tensor:
    """Divided by the group's mean reward (MaxRL, for rewards that are not negative); 0 if that mean is not positive."""
    mean_B = groups.mean_B(rewards_B)
    return torch.where(mean_B > eps, centred_B / (mean_B + eps).clamp(min=_TINY), 0.0)


def whiten(centred_B: Tensor, rewards_B: Tensor, groups: Groups, eps: float) -> Tensor:
    """Shifted and scaled to mean 0 and deviation 1 over the batch's tokens (each row counts by its length)."""
    mean, deviation = _moments(centred_B, torch.where(groups.valid_B, groups.lengths_B, 0.0))
    return (centred_B - mean) / (deviation + eps) if deviation > 0 else torch.zeros_like(centred_B)


SCALES: dict[str, Callable[[Tensor, Tensor, Groups, float], Tensor]] = {
    "none": unscaled,
    "group_std": group_std,
    "batch_std": batch_std,
    "group_mean": over_group_mean,
    "whiten": whiten,
}
_TINY = torch.finfo(torch.float64).tiny


def _moments(values_B: Tensor, weights_B: Tensor) -> tuple[Tensor, float]:
    """Weighted mean and unbiased standard deviation, which is 0 for equal values or a total weight of at most 1."""
    total = weights_B.sum()
    counted = values_B[weights_B > 0]
    mean = torch.where(weights_B > 0, values_B * weights_B, 0.0).sum() / total.clamp(min=1)
    if counted.numel() < 2 or total <= 1 or bool(counted.max() == counted.min()):
        return mean, 0.0
    squares = torch.where(weights_B > 0, weights_B * (values_B - mean).square(), 0.0).sum()
    return mean, float((squares / (total - 1)).sqrt())


# ---------------------------------------------------------------- several rewards


def sum_then_normalize(
    rewards_B_R: Tensor, weights_R: Tensor, normalize: Callable[[Tensor], Tensor], groups: Groups, eps: float
):
    """Normalise the weighted sum of the rewards."""
    return normalize(rewards_B_R @ weights_R)


def normalize_then_sum(
    rewards_B_R: Tensor, weights_R: Tensor, normalize: Callable[[Tensor], Tensor], groups: Groups, eps: float
):
    """Normalise each reward, take their weighted sum, and scale it to mean 0 and deviation 1 over the batch's sequences
    (GDPO, arXiv 2601.05242)."""
    summed_B = torch.stack([normalize(column) for column in rewards_B_R.unbind(1)], dim=1) @ weights_R
    mean, deviation = _moments(summed_B, groups.valid_B.double())
    return (summed_B - mean) / (deviation + eps) if deviation > 0 else torch.zeros_like(summed_B)


SEVERAL: dict[str, Callable[..., Tensor]] = {"sum_then_normalize": sum_then_normalize, "normalize_then_sum": normalize_then_sum}


# ---------------------------------------------------------------- the axis


@torch.no_grad()
def advantages(
    rewards: Tensor,
    group_ids_B: Tensor,
    *,
    centre: str,
    scale: str,
    eps: float = 1e-6,
    several: str = "sum_then_normalize",
    lengths_B: Tensor | None = None,
    valid_B: Tensor | None = None,
    reward_weights_R: Tensor | None = None,
) -> Tensor:
    """Advantages [B] of rewards [B] or [B, R], in the rewards' dtype (float32 for integers).

    `lengths_B` (answer tokens) weights rows in formulas that use lengths; default: all equal. `reward_weights_R`: default 1.
    """
    rewards_B_R = by_column(rewards).double()
    groups = groups_of(rewards, group_ids_B, lengths_B=lengths_B, valid_B=valid_B)
    rewards_B_R = torch.where(groups.valid_B.unsqueeze(1), rewards_B_R, 0.0)

    def normalize(rewards_B: Tensor) -> Tensor:
        centred_B = CENTRES[centre](rewards_B, groups)
        if centre in BASELINES:
            centred_B = torch.where(groups.spread_B(rewards_B), centred_B, 0.0)
        return SCALES[scale](centred_B, rewards_B, groups, eps)

    weights_R = rewards_B_R.new_ones(rewards_B_R.shape[1]) if reward_weights_R is None else reward_weights_R.double()
    result_B = SEVERAL[several](rewards_B_R, weights_R, normalize, groups, eps)
    dtype = rewards.dtype if rewards.dtype.is_floating_point else torch.float32
    return torch.where(groups.valid_B, result_B, 0.0).to(dtype)


def groups_of(
    rewards: Tensor, group_ids_B: Tensor, *, lengths_B: Tensor | None = None, valid_B: Tensor | None = None
) -> Groups:
    """The groups. Rows whose reward is not finite are invalid."""
    finite_B = by_column(rewards).isfinite().all(dim=1)
    valid_B = finite_B if valid_B is None else finite_B & valid_B.bool()
    lengths_B = torch.ones_like(finite_B, dtype=torch.float64) if lengths_B is None else lengths_B.double()
    index_B, count = group_indices(group_ids_B)
    return Groups(index_B, count, valid_B, lengths_B)


def zero_variance_groups(rewards: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flags of groups whose rewards are all equal, and of all groups. Both [B], set only at a group's first valid row."""
    groups = groups_of(rewards, group_ids_B, valid_B=valid_B)
    row_B = torch.arange(len(groups.index_B), dtype=torch.float64, device=rewards.device)
    first_B = groups.valid_B & (row_B == groups.extreme_B(row_B, "amin"))
    return first_B & without_spread(rewards, group_ids_B, valid_B), first_B


def without_spread(rewards: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
    """Rows whose group's valid rewards are all equal (with several rewards: each of them). [B]"""
    groups = groups_of(rewards, group_ids_B, valid_B=valid_B)
    columns = by_column(rewards).double().unbind(1)
    return ~torch.stack([groups.spread_B(column) for column in columns]).any(dim=0)
