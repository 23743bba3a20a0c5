"""Loss and gradient against six libraries' own figures: about 2,000 entries.

`LIBRARIES` maps each library's options to our axes. `DIFFERENCES` lists where we compute something else on purpose: each
says why, and derives their figure from ours, so that nothing hides behind a tolerance. Tolerances are relative to
sum |w L| and to the largest gradient, and come from the libraries' own epsilons and float32 casts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Objective, tensors

Entry = Mapping[str, Any]
Case = Mapping[str, Tensor]
Figures = tuple[Tensor, Tensor]  # loss, gradient


# ---------------------------------------------------------------- what each option means on our axes


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


# ---------------------------------------------------------------- our figures


def rows(case: Case) -> int:
    """Rows that have tokens."""
    return int((case["response_mask"].sum(1) > 0).sum())


def ours(axes: Mapping[str, Any], case: Case, **changed: Any) -> tuple[Figures, LossOutputs]:
    """Loss, gradient and outputs; `changed` replaces tensors of the step."""
    objective = Objective(ObjectiveSpec.model_validate(axes).resolve())
    given = {
        "response_mask": case["response_mask"],
        "advantages": case["advantages"],
        "old_log_probs": case["old_log_probs"],
        "ref_log_probs": case["ref_log_probs"],
        "rollout_log_probs": case["rollout_log_probs"],
        "group_ids": case["group_index"],
        "dtype": torch.float64,
        "entropy": case["entropy"],
        "selected": objective.select(case["response_mask"], entropy=case["entropy"]),
        **changed,
    }
    log_probs = case["log_probs"].clone().requires_grad_()
    step = objective.prepare(**given)
    # picked tokens are left to the loss: with one batch it can use the current log-probs, as the libraries do
    loss, outputs = objective.loss(log_probs, **{**step.rows(), "picked": None})
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return (loss.detach(), gradient), outputs


def mapped(library: str, entry: Entry, case: Case) -> tuple[Figures, LossOutputs]:
    """Ours for a library's entry."""
    changed = dict[str, Any]()
    if entry.get("policy_loss_type") == "cross_entropy":
        changed["advantages"] = torch.ones_like(case["advantages"])
    if entry.get("policy_loss_type") in ("clip_cov", "kl_cov"):
        mask = case["response_mask"]
        count = {"token_mean": mask.sum(), "sequence_mean": len(mask) * mask.sum(1, keepdim=True).clamp(min=1)}
        changed["advantages"] = case["advantages"] / count[entry["loss_reduction"]]
    return ours(LIBRARIES[library].axes(entry, case), case, **changed)


def theirs(entry: Entry, as_tensor: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor | None]:
    loss = as_tensor(entry.get("loss", entry.get("loss_sum")))
    return loss, as_tensor(entry["grad_log_probs"]) if "grad_log_probs" in entry else None


def agree(a: Figures, b: tuple[Tensor, Tensor | None], scale: float, tolerance: float) -> bool:
    loss_agrees = bool(abs(a[0] - b[0]) <= tolerance * max(scale, float(abs(b[0]))) + 1e-15)
    if b[1] is None:
        return loss_agrees
    return loss_agrees and bool((a[1] - b[1]).abs().max() <= tolerance * float(b[1].abs().max()) + 1e-15)


# ---------------------------------------------------------------- where we differ on purpose: their figure from ours


def counting_masked_rows(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = mapped(library, entry, case)[0]
    share = rows(case) / len(case["response_mask"])
    return loss * share, gradient * share


def masked_rows_have_a_loss(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = counting_masked_rows(library, entry, case)
    masked = case["response_mask"].sum(1) == 0
    return loss - case["advantages"][masked, 0].sum() / len(masked), gradient


def unbounded(library: str, entry: Entry, case: Case) -> Figures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "MAX_LOG_RATIO", 500.0)
        return mapped(library, entry, case)[0]


def padding_in_the_mean(library: str, entry: Entry, case: Case) -> Figures:
    """mean over B x T of n_i L_it, with the padding's L."""
    o = entry.get("options", {"epsilon": entry.get("epsilon")})
    low, high = (o["epsilon"], o["epsilon_high"]) if "epsilon_high" in o else o["epsilon"]
    mask, advantages = case["response_mask"], case["advantages"]
    log_probs = case["log_probs"].clone().requires_grad_()
    delta, lengths = log_probs - case["old_log_probs"], mask.sum(1, keepdim=True)
    level = o.get("importance_sampling_level", entry.get("importance_sampling_level"))
    log_ratio = {"token": delta, "sequence": (delta * mask).sum(1, keepdim=True) / lengths.clamp(min=1)}[level]
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    away = case["ref_log_probs"] - log_probs
    loss = ((loss + o.get("beta", 0) * (away.exp() - away - 1)) * lengths).mean()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def dividing_by_all_tokens(library: str, entry: Entry, case: Case) -> Figures:
    (loss, gradient), outputs = mapped(library, entry, case)
    share = (outputs.weights != 0).sum() / case["response_mask"].sum()
    return loss * share, gradient * share


def with_entropy_bonus(library: str, entry: Entry, case: Case) -> Figures:
    loss, gradient = mapped(library, entry, case)[0]
    mask = case["response_mask"]
    return loss - entry["options"]["entropy_coef"] * (case["entropy"] * mask).sum() / mask.sum(), gradient


def gradient_through_the_weight(library: str, entry: Entry, case: Case) -> Figures:
    mask, advantages = case["response_mask"], case["advantages"]
    log_probs = case["log_probs"].clone().requires_grad_()
    ratio = (
        ((log_probs - case["old_log_probs"]).clamp(-20, 20) * mask).sum(1, keepdim=True).clamp(-18.420680743952367, 20).exp()
    )
    k, lam = torch.where(advantages < 0, 3.0, 2.0), torch.where(advantages < 0, 2.0, 3.0)
    loss = (-(ratio**k * torch.exp(lam * (1 - ratio))) * advantages * log_probs * mask).sum() / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def mean_of_pairs(library: str, entry: Entry, case: Case) -> Figures:
    parts = [
        mapped(library, entry, {k: v[i : i + 2] for k, v in case.items()})[0] for i in range(0, len(case["advantages"]), 2)
    ]
    return sum((loss for loss, _ in parts), torch.zeros(())) / len(parts), torch.cat([g for _, g in parts]) / len(parts)


@dataclass(frozen=True)
class Difference:
    reason: str
    applies: Callable[[str, Entry, Case], bool]
    derive: Callable[[str, Entry, Case], Figures]


DIFFERENCES = (
    Difference(
        "they divide by all rows; a fully masked row counts nowhere here, so that padding a batch changes nothing",
        lambda library, entry, case: rows(case) < len(case["response_mask"]),
        counting_masked_rows,
    ),
    Difference(
        "their gmpo gives a fully masked row the ratio 1 and the loss -A / B",
        lambda library, entry, case: rows(case) < len(case["response_mask"]) and entry.get("trainer") == "experimental.gmpo",
        masked_rows_have_a_loss,
    ),
    Difference(
        "they do not bound the log ratio: exp(25) and more reaches loss and gradient, in float32 it overflows",
        lambda library, entry, case: entry["case"] == "extreme_4x6",
        unbounded,
    ),
    Difference(
        "luspo there is a mean over B x T that takes the padding in and ignores the mask",
        lambda library, entry, case: luspo(entry),
        padding_in_the_mean,
    ),
    Difference(
        "top-entropy selection there keeps the divisor of all tokens; ours selects before the weights are computed",
        lambda library, entry, case: "top_entropy_quantile" in entry.get("options", {}),
        dividing_by_all_tokens,
    ),
    Difference(
        "an entropy bonus is no part of these axes: it needs the logits",
        lambda library, entry, case: "entropy_coef" in entry.get("options", {}),
        with_entropy_bonus,
    ),
    Difference(
        "Liger differentiates VESPO's weight; the paper (and TRL) stop the gradient there",
        lambda library, entry, case: library == "liger" and entry["loss_type"] == "vespo",
        gradient_through_the_weight,
    ),
    Difference(
        "token_mean_legacy averages micro-batch means, so the result depends on the cut; our weights know the whole step",
        lambda library, entry, case: entry.get("loss_reduction") == "token_mean_legacy",
        mean_of_pairs,
    ),
)


def luspo(entry: Entry) -> bool:
    return entry.get("loss_type", entry.get("options", {}).get("loss_type")) == "luspo"


def not_offered(entry: Entry) -> bool:
    """rollout_is is added in test_extension.py; dropping sequences by their worst token is left out of the axes."""
    return entry.get("policy_loss_type") == "rollout_is" or "outlier_token_is_threshold_low" in entry.get(
        "off_policy_correction", {}
    )


# ---------------------------------------------------------------- the tests


def entries_of(library: str, golden: Callable[[str], dict[str, Any]]) -> list[Entry]:
    return [entry for entry in golden(LIBRARIES[library].file)["entries"] if "error" not in entry and "function" not in entry]


def settings(entry: Entry) -> str:
    figures = ("case", "loss", "loss_sum", "grad_log_probs", "metrics", "log_importance_ratio", "advantages")
    return str({key: value for key, value in entry.items() if key not in figures and key != "rollout_is_weights"})


@pytest.mark.parametrize("library", LIBRARIES)
def test_loss_and_gradient_agree_or_differ_for_a_stated_reason(library, golden, cases, as_tensor):
    tolerance, wrong, explained = LIBRARIES[library].tolerance, list[str](), 0
    for entry in entries_of(library, golden):
        case = cases(entry["case"])
        if entry["case"] == "nan_pad_4x7" or not_offered(entry):
            continue
        figures, outputs = mapped(library, entry, case)
        scale = float((outputs.token_loss.detach() * outputs.weights).abs().sum())
        expected = theirs(entry, as_tensor)
        if agree(figures, expected, scale, tolerance):
            continue
        derived = [d.derive(library, entry, case) for d in DIFFERENCES if d.applies(library, entry, case)]
        explained += any(agree(d, expected, scale, tolerance) for d in derived)
        if not any(agree(d, expected, scale, tolerance) for d in derived):
            wrong.append(f"{entry['case']}: ours {float(figures[0])}, theirs {float(expected[0])} {settings(entry)}")
    assert not wrong, "\n".join(wrong)
    assert explained == EXPLAINED[library]


# How many entries differ, all of them derived above: a change of either side shows here.
EXPLAINED = {"easyr1": 13, "verl": 10, "trl": 53, "liger": 36, "skyrl": 25, "tinker": 4}


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.derive.__name__)
def test_every_stated_difference_is_a_real_one(difference, golden, cases, as_tensor):
    """Somewhere their figure is not ours and is what this difference makes of ours."""
    for library, known in LIBRARIES.items():
        for entry in entries_of(library, golden):
            case = cases(entry["case"])
            if entry["case"] == "nan_pad_4x7" or not_offered(entry) or not difference.applies(library, entry, case):
                continue
            figures, outputs = mapped(library, entry, case)
            scale, expected = float((outputs.token_loss.detach() * outputs.weights).abs().sum()), theirs(entry, as_tensor)
            derived = difference.derive(library, entry, case)
            if not agree(figures, expected, scale, known.tolerance) and agree(derived, expected, scale, known.tolerance):
                return
    pytest.fail(f"no entry shows: {difference.reason}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_nan_behind_the_mask_gives_what_clean_padding_gives(library, golden, cases, as_tensor):
    """nan_pad_4x7 is ragged_4x7 with NaN and infinities where masked: ours must be their clean figure."""
    tolerance = LIBRARIES[library].tolerance
    clean = {settings(entry): entry for entry in entries_of(library, golden) if entry["case"] == "ragged_4x7"}
    checked = 0
    for entry in entries_of(library, golden):
        if entry["case"] != "nan_pad_4x7" or not_offered(entry) or luspo(entry) or entry.get("loss_type") == "vespo":
            continue
        expected = theirs(clean[settings(entry)], as_tensor)
        figures, outputs = mapped(library, entry, cases("nan_pad_4x7"))
        same, _ = mapped(library, clean[settings(entry)], cases("ragged_4x7"))
        assert torch.equal(figures[0], same[0])
        assert torch.equal(figures[1], same[1])
        if expected[1] is not None:
            scale = float((outputs.token_loss.detach() * outputs.weights).abs().sum())
            assert agree(figures, expected, scale, tolerance), settings(entry)
        checked += 1
    assert checked >= 4


def test_log_importance_ratio_is_easyr1s(golden, cases, as_tensor):
    """Also on the worked example, which is theirs."""
    checked = 0
    for entry in entries_of("easyr1", golden):
        if "log_importance_ratio" not in entry or entry["case"] == "nan_pad_4x7":
            continue
        case = cases(entry["case"])
        mask, (_, outputs) = case["response_mask"].bool(), mapped("easyr1", entry, case)
        expected = torch.where(mask, as_tensor(entry["log_importance_ratio"]), 0.0)
        assert torch.allclose(outputs.log_importance_ratio, expected, rtol=1e-6, atol=1e-9), settings(entry)
        checked += 1
    assert checked == 60


# Metrics of theirs that mean the same as one of ours (or the sum of several). In verl only for the plain clip: elsewhere the
# same names carry other quantities (clip_cov: the share picked, kl_cov: mean |d|, geo_mean: a sequence's share, reinforce: k3).
VERL_CLIPPED = ("vanilla", "gspo")
METRICS = {
    "easyr1": {
        "ppo_kl": ("policy/approx_kl",),
        "pg_clipfrac_higher": ("policy/clip_fraction_low", "policy/clip_fraction_high"),
        "pg_clipfrac_lower": ("policy/clip_fraction_dual",),
    },
    "verl": {
        "actor/ppo_kl": ("policy/approx_kl",),
        "actor/pg_clipfrac": ("policy/clip_fraction_low", "policy/clip_fraction_high"),
        "actor/pg_clipfrac_lower": ("policy/clip_fraction_dual",),
    },
    "trl": {
        "clip_ratio/low_mean": ("policy/clip_fraction_low",),
        "clip_ratio/high_mean": ("policy/clip_fraction_high",),
        "entropy": ("policy/entropy",),
    },
}


@pytest.mark.parametrize("library", METRICS)
def test_metrics_mean_what_theirs_mean(library, golden, cases):
    wrong, checked = list[str](), 0
    for entry in entries_of(library, golden):
        if entry["case"] in ("nan_pad_4x7", "extreme_4x6") or not isinstance(entry.get("metrics"), dict):
            continue
        case, level = cases(entry["case"]), entry.get("options", {}).get("importance_sampling_level")
        if entry.get("loss_mode", "vanilla") not in VERL_CLIPPED or "top_entropy_quantile" in entry.get("options", {}):
            continue  # the latter measures what it does not train on
        if level == "sequence" and rows(case) < len(case["response_mask"]):
            continue  # counts masked rows, as above
        by_sequence = library == "trl" and level == "sequence" and entry["case"] != "token_adv_3x6"
        suffix = "_sequence" if by_sequence else ""  # TRL has one flag a sequence there
        measured = mapped(library, entry, case)[1].metrics.finish()
        for name, names in METRICS[library].items():
            if name not in entry["metrics"]:
                continue
            checked += 1
            value = sum(measured[part + suffix if "clip" in part else part] for part in names)
            if value != pytest.approx(float(entry["metrics"][name]), rel=1e-6, abs=1e-8):
                wrong.append(f"{entry['case']} {name}: ours {value}, theirs {entry['metrics'][name]} {settings(entry)}")
    assert not wrong, f"{len(wrong)} of {checked}\n" + "\n".join(wrong)
