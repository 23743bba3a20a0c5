"""Advantages against five libraries' figures, and verl's aggregation of a plain matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from workers.objectives import advantage, aggregate

# their estimator and options -> our axis
PLAIN: dict[str, dict[str, Any]] = {
    "grpo": {"centre": "group_mean", "scale": "group_std"},
    "grpo_passk": {"centre": "best_minus_second", "scale": "group_std"},
    "rloo": {"centre": "leave_one_out", "scale": "none"},
    "rloo_vectorized": {"centre": "leave_one_out", "scale": "none"},
    "opo": {"centre": "length_weighted", "scale": "none"},
    "maxrl": {"centre": "group_mean", "scale": "group_mean"},
    "reinforce_plus_plus_baseline": {"centre": "group_mean", "scale": "whiten", "eps": 0.0},
    "reinforce_plus_plus": {"centre": "none", "scale": "whiten", "eps": 0.0},
    "reinforce++": {"centre": "none", "scale": "whiten", "eps": 0.0},
}
# not on this axis: they need a value of each token, a second greedy answer, or scale by a batch-wide count
VERL_GDPO = "gdpo(single reward fallback)"  # see below
NOT_OFFERED = {VERL_GDPO, "optimal_token_baseline", "remax(baseline=0.3)", "gpg", "gae(values=0)"}


def axis_of(entry: dict[str, Any]) -> dict[str, Any] | None:
    estimator = entry["estimator"].removesuffix("(float32 stats)").replace("grpo_vectorized", "grpo")
    if estimator in NOT_OFFERED or entry["options"].get("gamma", 1.0) != 1.0 or "error" in entry:
        return None
    axis = {"eps": 1e-6, **PLAIN[estimator]}
    return axis | {"scale": "none"} if entry["options"].get("norm_by_std") is False else axis


def figures(axis: dict[str, Any], inputs: dict[str, Any], as_tensor) -> tuple[Tensor, Tensor]:
    """Our advantages [B], and the mask [B, T]."""
    mask = as_tensor(inputs["response_mask"])
    group_ids = torch.tensor(inputs["index"])
    return advantage.advantages(as_tensor(inputs["scores"]), group_ids, lengths_B=mask.sum(1), **axis), mask


def test_advantages_agree_but_for_groups_without_spread(golden, as_tensor):
    """A singleton gets 0 from us, its whole reward from some (and whitening then moves every row); the rest is equal."""
    file, checked, without = golden("advantages"), 0, 0
    for entry in file["entries"]:
        axis = axis_of(entry) if entry["case"] in file["inputs"] else None
        if axis is None:
            continue
        inputs = file["inputs"][entry["case"]]
        ours_B, mask = figures(axis, inputs, as_tensor)
        ours, theirs = ours_B.unsqueeze(1) * mask, as_tensor(entry["advantages"]) * mask
        compared = torch.ones(len(mask), dtype=torch.bool)
        if axis == PLAIN["reinforce_plus_plus_baseline"] | {"eps": 0.0} and entry["case"] == "singleton_5x5":
            assert (ours - theirs).abs().max() > 0.1
            continue
        if axis["scale"] != "whiten" and entry["case"] == "singleton_5x5":
            compared = torch.tensor([inputs["index"].count(i) > 1 for i in inputs["index"]])
            assert (ours[~compared] == 0).all()
            without += int((theirs[~compared] != 0).any())
        if axis["scale"] == "group_mean":  # MaxRL divides by a mean reward of 0 and less; that is 0 here
            mean = torch.tensor(
                [sum(s for s, j in zip(inputs["scores"], inputs["index"], strict=True) if i == j) for i in inputs["index"]]
            )
            assert (ours[mean <= 0] == 0).all()
            compared = compared & (mean > 0)
        tolerance = 1e-5 if "float32" in entry["estimator"] else 1e-7
        assert torch.allclose(ours[compared], theirs[compared], rtol=tolerance, atol=tolerance), (
            entry["peer"],
            entry["estimator"],
        )
        checked += 1
    assert checked == 146
    assert without > 0


def test_verls_gdpo_whitens_over_tokens(golden, as_tensor):
    """Ours, TRL's and ms-swift's last step counts each sequence once; verl's is our scale whiten after group_std."""
    file = golden("advantages")
    entries = [e for e in file["entries"] if e["estimator"] == VERL_GDPO and e["case"] != "singleton_5x5"]
    for entry in entries:
        inputs = file["inputs"][entry["case"]]
        normalized_B, mask = figures({"centre": "group_mean", "scale": "group_std", "eps": 1e-6}, inputs, as_tensor)
        whitened, _ = figures(
            {"centre": "none", "scale": "whiten", "eps": 0.0}, inputs | {"scores": normalized_B.tolist()}, as_tensor
        )
        assert torch.allclose(whitened.unsqueeze(1) * mask, as_tensor(entry["advantages"]), rtol=1e-6, atol=1e-6)
    assert len(entries) == 4


# ms-swift and TRL on two weighted rewards; their eps is 1e-4, ms-swift's for GDPO 1e-8
SEVERAL: list[tuple[str, str, str, dict[str, Any]]] = [
    ("ms-swift", "grpo", "group", {"centre": "group_mean", "scale": "group_std"}),
    ("ms-swift", "grpo", "batch", {"centre": "group_mean", "scale": "batch_std"}),
    ("ms-swift", "grpo", "none", {"centre": "group_mean", "scale": "none"}),
    ("ms-swift", "grpo", "gdpo", {"centre": "group_mean", "scale": "group_std", "several": "normalize_then_sum", "eps": 1e-8}),
    ("ms-swift", "rloo", "group", {"centre": "leave_one_out", "scale": "group_std"}),
    ("ms-swift", "rloo", "batch", {"centre": "leave_one_out", "scale": "batch_std"}),
    ("ms-swift", "rloo", "none", {"centre": "leave_one_out", "scale": "none"}),
    ("ms-swift", "reinforce_plus_plus", "group", {"centre": "group_mean", "scale": "group_std"}),
    ("ms-swift", "reinforce_plus_plus", "batch", {"centre": "group_mean", "scale": "whiten"}),
    ("ms-swift", "reinforce_plus_plus", "none", {"centre": "group_mean", "scale": "none"}),
    ("TRL", "sum_then_normalize", "group", {"centre": "group_mean", "scale": "group_std"}),
    ("TRL", "sum_then_normalize", "batch", {"centre": "group_mean", "scale": "batch_std"}),
    ("TRL", "sum_then_normalize", "none", {"centre": "group_mean", "scale": "none"}),
    ("TRL", "normalize_then_sum (GDPO)", "", {"centre": "group_mean", "scale": "group_std", "several": "normalize_then_sum"}),
]


@pytest.mark.parametrize(("peer", "estimator", "scale_rewards", "axis"), SEVERAL)
def test_several_rewards_agree(peer, estimator, scale_rewards, axis, golden, as_tensor):
    file = golden("advantages")
    inputs = file["multi_reward_inputs"]["two_rewards_8x2"]
    rewards = as_tensor(inputs["rewards_per_func"])
    (entry,) = [
        e
        for e in file["entries"]
        if e["peer"].startswith(peer) and e["estimator"] == estimator and e["options"].get("scale_rewards", "") == scale_rewards
        if e["case"] == "two_rewards_8x2"
    ]
    group_ids = torch.arange(len(rewards)) // inputs["num_generations"]
    axis, weights = {"eps": 1e-4, **axis}, as_tensor(inputs["reward_weights"])
    ours = advantage.advantages(rewards, group_ids, reward_weights_R=weights, **axis)
    assert torch.allclose(ours, as_tensor(entry["advantages_per_sequence"]), rtol=1e-6, atol=1e-7)


AGGREGATES = {
    "token-mean": "token",
    "seq-mean-token-mean": "seq",
    "seq-mean-token-sum": "seq_sum",
    "seq-mean-token-sum-norm": "sum",  # and divided by T, or by loss_scale_factor
}


def as_part_of(mask: Tensor, rows: int, tokens: int) -> Tensor:
    """The mask as the first rows of a step with so many rows and tokens."""
    others, left = rows - int((mask.sum(1) > 0).sum()), tokens - int(mask.sum())
    whole = torch.zeros(len(mask) + others, tokens, dtype=torch.bool)
    whole[: len(mask), : mask.shape[1]] = mask
    for i in range(others):
        whole[len(mask) + i, : left - (others - 1) if i == 0 else 1] = True
    return whole


def test_micro_batch_weights_are_verls_with_global_counts(golden, cases):
    """What verl scales by hand (batch_num_tokens, global_batch_size, dp_size) follows here from the whole step's mask."""
    checked = 0
    for entry in golden("verl_0.8.0.dev")["entries"]:
        if entry.get("function") != "agg_loss":
            continue
        info, mode = entry["global_batch_info"], entry["loss_agg_mode"]
        if entry["case"] == "all_masked_2x3":
            mask, values = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.float64)
        else:
            case = cases(entry["case"])
            mask, values = case["response_mask"].bool(), case["entropy"]
        whole = as_part_of(mask, info["global_batch_size"], info["batch_num_tokens"]) if "global_batch_size" in info else mask
        weights = aggregate.weights(whole, kind=AGGREGATES[mode], dtype=torch.float64)[: len(mask), : mask.shape[1]]
        ours = float((weights * values).sum()) * info.get("dp_size", 1)  # ranks' gradients are averaged there, added here
        if mode == "seq-mean-token-sum-norm":
            ours /= info.get("loss_scale_factor", mask.shape[1])
            ours /= info.get("dp_size", 1)
        theirs = float(entry["loss"])
        if theirs != theirs:  # of no token at all some of verl's modes give NaN
            assert ours == 0
        else:
            assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-12), (entry["case"], mode, info)
        checked += 1
    assert checked == 28
