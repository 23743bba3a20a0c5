"""Published objectives as data: the axes that each name sets differently from `BASE`. No other module knows these names."""

from typing import Any, NamedTuple

Axes = dict[str, Any]

# The value of each axis that neither the caller nor the preset names.
BASE: Axes = {
    "ratio": {"kind": "token"},
    "anchor": "old",
    "surrogate": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2},
    "aggregate": {"kind": "token"},
    "advantage": {"centre": "group_mean", "scale": "group_std"},
    "kl": {"place": "none"},
    "correct": {"action": "none"},
    "select": {},
}


class Preset(NamedTuple):
    """The axes that differ from BASE, and the publication."""

    axes: Axes
    summary: str
    arxiv: str | None = None


def _ppo(low: float, high: float, dual: float | None = None) -> Axes:
    return {"kind": "ppo", "clip_low": low, "clip_high": high, "dual_clip": dual}


_GSPO_CLIP = _ppo(3e-4, 4e-4)
_SEQ = {"kind": "seq"}
_GIVEN = {"centre": "given", "scale": "none"}
_DAPO: Axes = {"surrogate": _ppo(0.2, 0.28), "select": {"truncated": True, "zero_variance": True}}
_GRPO: Axes = {"aggregate": _SEQ, "kl": {"place": "loss", "estimator": "k3", "coef": 0.04}}
_GSPO: Axes = {"ratio": {"kind": "sequence"}, "surrogate": _GSPO_CLIP, "aggregate": _SEQ}

PRESETS: dict[str, Preset] = {
    "ppo": Preset(
        {"advantage": _GIVEN, "kl": {"place": "reward", "estimator": "k1", "coef": 0.05}},
        "clipped token ratio, token mean, advantages from outside",
        "1707.06347",
    ),
    "grpo": Preset(_GRPO, "clipped token ratio, mean of sequence means, rewards normalised within the group", "2402.03300"),
    "dr_grpo": Preset(
        {"aggregate": {"kind": "constant"}, "advantage": {"scale": "none"}},
        "GRPO without its two biases: constant normaliser, no division by the group's deviation",
        "2503.20783",
    ),
    "dapo": Preset(_DAPO, "token mean, higher upper clip, no truncated answers, no groups without spread", "2503.14476"),
    "gspo": Preset(_GSPO, "one ratio a sequence: the geometric mean of its token ratios", "2507.18071"),
    "gspo_token": Preset(
        {**_GSPO, "ratio": {"kind": "sequence_token"}},
        "GSPO's ratio with gradients a token, for advantages a token",
        "2507.18071",
    ),
    "luspo": Preset(
        {**_GSPO, "aggregate": {"kind": "seq", "length_power": 1.0}},
        "GSPO with each sequence weighted by its length",
        "2602.05261",
    ),
    "gmpo": Preset(
        {"ratio": {"kind": "sequence"}, "surrogate": {"kind": "gmpo", "clip_low": 0.4, "clip_high": 0.4}, "aggregate": _SEQ},
        "token log ratios clipped, then their geometric mean",
        "2507.20673",
    ),
    "cispo": Preset(
        {"surrogate": {"kind": "cispo", "weight_min": 0.0, "weight_max": 5.0}},
        "the clipped ratio is a constant weight: no token loses its gradient",
        "2506.13585",
    ),
    "topr": Preset(
        {
            "ratio": {"kind": "product"},
            "surrogate": {"kind": "cispo", "weight_min": [1.0, 0.0], "weight_max": [1.0, 1.0]},
            "aggregate": {"kind": "seq_sum"},
            "advantage": {"scale": "none"},
        },
        "good answers are learned as they are, bad ones with a weight that fades as they become unlikely",
        "2503.14286",
    ),
    "sapo": Preset(
        {"surrogate": {"kind": "sapo", "tau_positive": 1.0, "tau_negative": 1.05}, "aggregate": _SEQ},
        "a sigmoid gate in place of the clip",
        "2511.20347",
    ),
    "vespo": Preset(
        {"ratio": {"kind": "product"}, "surrogate": {"kind": "vespo", "k": [2.0, 3.0], "lam": [3.0, 2.0]}},
        "a gamma-shaped weight of the whole sequence's product ratio",
        "2602.10693",
    ),
    "dppo": Preset(
        {
            "anchor": "rollout",
            "surrogate": {"kind": "tv", "low": 0.2, "high": 0.2},
            "advantage": {"scale": "none"},
            "kl": {"place": "loss", "estimator": "k2", "reference": "rollout", "coef": 1e-3},
        },
        "tokens whose probability left a trust region of total variation are dropped",
        "2602.04879",
    ),
    "intellect2": Preset({"surrogate": _ppo(0.2, 0.2, 4.0)}, "PPO bounded on both sides for negative advantages", "2505.07291"),
    "clip_cov": Preset(
        {"surrogate": {"kind": "clip_cov"}},
        "a few tokens of high covariance between log-prob and advantage lose their gradient",
        "2505.22617",
    ),
    "kl_cov": Preset({"surrogate": {"kind": "kl_cov"}}, "the tokens of highest covariance get a KL penalty", "2505.22617"),
    "dro": Preset(
        {"anchor": "rollout", "surrogate": {"kind": "dro"}, "advantage": _GIVEN},
        "a quadratic penalty on the log ratio in place of a clip",
        "2405.19107",
    ),
    "rloo": Preset(
        {
            "ratio": {"kind": "one"},
            "surrogate": {"kind": "none"},
            "advantage": {"centre": "leave_one_out", "scale": "none"},
            "kl": {"place": "reward", "estimator": "k1", "coef": 0.05},
        },
        "REINFORCE with the mean of the group's other answers as the baseline",
        "2402.14740",
    ),
    "reinforce_pp": Preset(
        {
            "advantage": {"centre": "group_mean", "scale": "whiten"},
            "kl": {"place": "loss", "estimator": "k2", "coef": 1e-3},
        },
        "group mean as the baseline, then whitened over the batch",
        "2501.03262",
    ),
    "importance_sampling": Preset(
        {"anchor": "rollout", "surrogate": {"kind": "none"}, "aggregate": {"kind": "sum"}, "advantage": _GIVEN},
        "the plain importance-weighted policy gradient, summed",
    ),
    "cross_entropy": Preset(
        {"ratio": {"kind": "one"}, "surrogate": {"kind": "none"}, "aggregate": {"kind": "sum"}, "advantage": _GIVEN},
        "minus weight times log-prob; the weights are given as advantages",
    ),
    "opo": Preset(
        {"advantage": {"centre": "length_weighted", "scale": "none"}},
        "the group's length-weighted mean as the baseline",
        "2505.23585",
    ),
    "passk": Preset(
        {**_GRPO, "advantage": {"centre": "best_minus_second", "scale": "group_std"}},
        "only the group's best answer counts, by its lead over the second",
        "2503.19595",
    ),
    "maxrl": Preset(
        {"advantage": {"scale": "group_mean"}}, "rewards over the group's mean: towards maximum likelihood", "2602.02710"
    ),
    "gdpo": Preset(
        {**_GRPO, "advantage": {"several": "normalize_then_sum"}},
        "each of several rewards is normalised in its group, then they are summed",
        "2601.05242",
    ),
    "easyr1_gspo": Preset(
        {**_GSPO, "surrogate": _ppo(3e-4, 4e-4, 3.0), "aggregate": {"kind": "token"}},
        "what EasyR1 computes as gspo: token mean and a dual clip of 3",
    ),
    "verl_gspo": Preset(
        {**_GSPO, "ratio": {"kind": "sequence_token"}}, "what verl computes as gspo: the sequence ratio with gradients a token"
    ),
    "trl_gspo": Preset({**_GSPO, "aggregate": {"kind": "token"}}, "what TRL computes with importance_sampling_level: sequence"),
}
