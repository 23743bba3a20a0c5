"""What each library's options mean on our axes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Entry = Mapping[str, Any]
Case = Mapping[str, Tensor]
Figures = tuple[Tensor, Tensor]  # loss, gradient


def rows(case: Case) -> int:
    """Rows that have tokens."""
    return int((case["response_mask"].sum(1) > 0).sum())


def ppo(low: float, high: float, dual: float | None = None) -> dict[str, Any]:
    return {"kind": "ppo", "clip_low": low, "clip_high": high, "dual_clip": dual}


def easyr1(entry: Entry, case: Case) -> dict[str, Any]:
    o = entry["options"]
    low, high = o["clip_ratio_low"], o["clip_ratio_high"]
    clipped = ppo(low, high, o["clip_ratio_dual"])
    cispo = {"kind": "cispo", "weight_min": 1 - low, "weight_max": 1 + high}
    sapo = {"kind": "sapo", "tau_positive": o["tau_positive"], "tau_negative": o["tau_negative"]}
    return {
        "ratio": {"gspo": "sequence", "gspo_token": "sequence_token"}.get(o["loss_type"], "token"),
        "surrogate": {"cispo": cispo, "sapo": sapo}.get(o["loss_type"], clipped),
        "aggregate": o["loss_avg_mode"],
    }


VERL_MODES: dict[str, Callable[[float, float, float], dict[str, Any]]] = {
    "vanilla": lambda low, high, c: {"surrogate": ppo(low, high, c)},
    "gspo": lambda low, high, c: {"ratio": "sequence_token", "surrogate": ppo(low, high)},
    "sapo": lambda low, high, c: {"surrogate": "sapo"},
    "gpg": lambda low, high, c: {"ratio": "one", "surrogate": "none"},
    "reinforce": lambda low, high, c: {"ratio": "one", "surrogate": "none"},
    "geo_mean": lambda low, high, c: {"ratio": "sequence", "surrogate": {"kind": "gmpo", "clip_low": low, "clip_high": high}},
    "cispo": lambda low, high, c: {"surrogate": {"kind": "cispo", "weight_min": 1 - low, "weight_max": 1 + high}},
    "clip_cov": lambda low, high, c: {
        "surrogate": {"kind": "clip_cov", "clip_low": low, "clip_high": high, "share": 0.05, "cov_low": 0.05, "cov_high": 5}
    },
    "kl_cov": lambda low, high, c: {"surrogate": {"kind": "kl_cov", "share": 0.2, "coef": 0.1}},
}


def verl(entry: Entry, case: Case) -> dict[str, Any]:
    tokens = case["response_mask"].shape[1]
    mode = (
        "seq-mean-token-mean" if entry["loss_mode"] in ("gspo", "sapo", "geo_mean") else entry["loss_agg_mode"]
    )  # it is ignored
    aggregate = {
        "token-mean": "token",
        "seq-mean-token-mean": "seq",
        "seq-mean-token-sum": "seq_sum",
        # verl's "norm" is the plain sum over T, without the number of sequences: our constant is per sequence
        "seq-mean-token-sum-norm": {"kind": "constant", "constant": tokens / rows(case)},
    }[mode]
    level = "geometric" if entry["loss_mode"] == "geo_mean" else "token"  # geo_mean pools the token weights it is given
    correct = {"level": level, "action": "truncate", "cap": 2.0} if "rollout_is_weights" in entry else "none"
    clip = entry["clip"]
    return VERL_MODES[entry["loss_mode"]](clip["low"], clip["high"], clip["c"]) | {"aggregate": aggregate, "correct": correct}


TRL_AGGREGATES = {
    "grpo": "seq",
    "sapo": "seq",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "vespo": "token",
    "dr_grpo": {"kind": "constant", "constant": 16},
    "luspo": {"kind": "seq", "length_power": 1},
}


def trl(entry: Entry, case: Case) -> dict[str, Any]:
    o = entry["options"]
    low, high = o["epsilon"], o["epsilon_high"]
    spec: dict[str, Any] = {
        "ratio": o.get("importance_sampling_level", "token"),
        "surrogate": {
            "cispo": {"kind": "cispo", "weight_min": 0, "weight_max": high},
            "sapo": "sapo",
            "vespo": "vespo",
        }.get(o["loss_type"], ppo(low, high, o.get("delta"))),
        "aggregate": TRL_AGGREGATES[o["loss_type"]],
    }
    if o["loss_type"] == "vespo":
        spec["ratio"] = "product"
    if entry.get("trainer") == "experimental.gmpo":
        spec |= {"ratio": "sequence", "surrogate": {"kind": "gmpo", "clip_low": low, "clip_high": high}}
    if "beta" in o:
        gradient = "ratio_weighted" if o.get("use_bias_correction_kl") else "plain"
        spec["kl"] = {"place": "loss", "estimator": "k3", "gradient": gradient, "coef": o["beta"]}
    if "off_policy_mask_threshold" in o:
        spec["correct"] = {"action": "none", "sequence_delta": o["off_policy_mask_threshold"]}
    if o.get("use_vllm"):
        level, action = o["vllm_importance_sampling_mode"].split("_")
        cap = o["vllm_importance_sampling_clip_max"]
        spec["correct"] = {
            "level": {"sequence": "product"}.get(level, level),
            "action": action,
            "cap": cap,
            "low": 0,
            "high": cap,
        }
    if "top_entropy_quantile" in o:
        spec["select"] = {"top_entropy": o["top_entropy_quantile"]}
    return spec


def liger(entry: Entry, case: Case) -> dict[str, Any]:
    low, high = entry["epsilon"]
    level = {"loss_type": entry["loss_type"], "importance_sampling_level": entry["importance_sampling_level"]}
    return trl({"options": {**level, "epsilon": low, "epsilon_high": high}}, case)


SKYRL_AGGREGATES = {
    "token_mean": "token",
    "token_mean_legacy": "token",
    "sequence_mean": "seq",
    "prompt_mean": "prompt",
    "seq_mean_token_sum_norm": {"kind": "constant", "constant": 16},
}
SKYRL_LOSSES: dict[str, Callable[[float, float], dict[str, Any]]] = {
    "regular": lambda low, high: {"surrogate": ppo(low, high)},
    "dual_clip": lambda low, high: {"surrogate": ppo(low, high, 3.0)},
    "sapo": lambda low, high: {"surrogate": "sapo"},
    "gspo": lambda low, high: {"ratio": "sequence_token", "surrogate": ppo(low, high)},
    "cispo": lambda low, high: {"surrogate": {"kind": "cispo", "weight_min": 0, "weight_max": 5}},
    "dppo": lambda low, high: {"anchor": "rollout", "surrogate": {"kind": "tv", "low": 0.15, "high": 0.15}},
    "importance_sampling": lambda low, high: {"surrogate": "none"},
    # advantages are not looked at (weights of 1), nor the aggregation
    "cross_entropy": lambda low, high: {"ratio": "one", "surrogate": "none", "aggregate": "sum"},
    # its advantages are scaled by the aggregation before anything else, so covariances are of scaled advantages
    "clip_cov": lambda low, high: {
        "aggregate": "sum",
        "surrogate": {"kind": "clip_cov", "clip_low": low, "clip_high": high, "share": 0.05, "cov_low": 0.05, "cov_high": 5},
    },
    "kl_cov": lambda low, high: {"aggregate": "sum", "surrogate": {"kind": "kl_cov", "share": 0.2, "coef": 0.1}},
    # the next has no axis value; test_a_new_surrogate_is_one_function_and_one_line adds it
    "rollout_is": lambda low, high: {"anchor": "rollout", "surrogate": "none"},
}


def skyrl(entry: Entry, case: Case) -> dict[str, Any]:
    aggregate = {"aggregate": SKYRL_AGGREGATES[entry["loss_reduction"]]}
    off_policy = entry.get("off_policy_correction", {})
    correct: Any = "none"
    if "tis_ratio_type" in off_policy:
        level = {"token": "token", "sequence": "product"}[off_policy["tis_ratio_type"]]
        cap = off_policy.get("token_tis_ratio_clip_high", off_policy.get("sequence_tis_ratio_clip_high"))
        correct = {"level": level, "action": "truncate", "cap": cap}
    if "sequence_mask_metric" in off_policy:
        low, high = off_policy.get("product_mask_low", 0.99), off_policy.get("product_mask_high", 1.01)
        correct = {"level": off_policy["sequence_mask_metric"], "action": "mask", "low": low, "high": high, "weigh": False}
    if "token_mask_is_threshold_low" in off_policy:
        low, high = off_policy["token_mask_is_threshold_low"], off_policy["token_mask_is_threshold_high"]
        correct = {"action": "mask", "low": low, "high": high, "weigh": False}
    return aggregate | SKYRL_LOSSES[entry["policy_loss_type"]](*entry["eps"]) | {"correct": correct}


def tinker(entry: Entry, case: Case) -> dict[str, Any]:
    config = entry["loss_fn_config"]
    low, high = config.get("clip_low_threshold", 1), config.get("clip_high_threshold", 1)  # absolute, not offsets
    surrogate = {
        "importance_sampling": "none",
        "ppo": {"kind": "ppo", "clip_low": 1 - low, "clip_high": high - 1},
        "cispo": {"kind": "cispo", "weight_min": low, "weight_max": high},
        "dro": {"kind": "dro", **config},
    }[entry["loss_fn"]]
    return {"surrogate": surrogate, "aggregate": "sum"}


@dataclass(frozen=True)
class Library:
    file: str
    axes: Callable[[Entry, Case], dict[str, Any]]
    tolerance: float


LIBRARIES = {
    "easyr1": Library("easyr1", easyr1, 1e-7),
    "verl": Library("verl_0.8.0.dev", verl, 1e-7),
    "trl": Library("trl", trl, 1e-12),
    "liger": Library("liger", liger, 1e-12),
    "skyrl": Library("skyrl", skyrl, 1e-6),
    "tinker": Library("tinker", tinker, 1e-12),
}
