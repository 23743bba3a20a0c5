"""Correction weights and masks against verl's."""

import torch

from workers.objectives import correct
from workers.objectives.kernels import bounded_exp
from workers.objectives.reductions import Reductions

WEIGHTS = {"token": "token", "sequence": "product"}
# their masks by a k1 bound: -log of our weight between the logs of the thresholds, so our bounds are their inverses
MASKS = {"token_k1": "token", "seq_sum_k1": "product", "seq_mean_k1": "geometric"}


def pair_of(entry, case):
    names = {"old_vs_rollout": ("old_log_probs", "rollout_log_probs"), "log_probs_vs_old": ("log_probs", "old_log_probs")}
    return tuple(case[name] for name in names[entry["pair"]])


def difference_of(entry, case):
    trained, sampled = pair_of(entry, case)
    return torch.where(case["response_mask"].bool(), trained - sampled, 0.0)


def test_truncated_weights_are_verls(golden, cases, as_tensor):
    checked = 0
    for entry in golden("rollout_correction")["entries"]:
        if "rollout_is" not in entry:
            continue
        case = cases(entry["case"])
        result = correct.correction(
            difference_of(entry, case),
            case["response_mask"].bool(),
            level=WEIGHTS[entry["rollout_is"]],
            action="truncate",
            cap=entry["rollout_is_threshold"],
            low=0.5,
            high=2.0,
            weigh=True,
            normalize=entry["batch_normalize"],
        )
        assert torch.allclose(result.weights, as_tensor(entry["weights"]), rtol=1e-7, atol=1e-12), entry["case"]
        if entry["rollout_is"] == "token":
            measured = Reductions(case["response_mask"].bool(), torch.float64)
            measured.fraction("truncated", result.truncated)
            measured.extremes("raw", result.raw)
            ours, theirs = measured.metrics.finish(), entry["metrics"]
            assert abs(ours["truncated"] - theirs["rollout_corr/rollout_is_ratio_fraction_high"]) < 1e-8
            assert abs(ours["raw_max"] / theirs["rollout_corr/rollout_is_max"] - 1) < 1e-8
        checked += 1
    assert checked == 50


def test_masks_by_the_log_ratio_are_verls(golden, cases, as_tensor):
    """Its masks by k2 and k3 and by a sequence's worst token are not among our levels."""
    checked = 0
    for entry in golden("rollout_correction")["entries"]:
        if entry.get("rollout_rs") not in MASKS:
            continue
        thresholds = [float(bound) for bound in entry["rollout_rs_threshold"].split("_")]
        high, low = thresholds[-1], thresholds[0] if len(thresholds) > 1 else 1 / thresholds[0]
        case = cases(entry["case"])
        result = correct.correction(
            difference_of(entry, case),
            case["response_mask"].bool(),
            level=MASKS[entry["rollout_rs"]],
            action="mask",
            cap=2.0,
            low=1 / high,
            high=1 / low,
            weigh=False,
            normalize=False,
        )
        assert torch.equal(result.weights, as_tensor(entry["modified_mask"])), (entry["case"], entry["rollout_rs"])
        checked += 1
    assert checked == 40


def test_mismatch_metrics_are_verls(golden, cases):
    """kl, k3_kl and the effective sample size; the last is of raw weights here, of bounded ones there."""
    checked = 0
    for entry in golden("rollout_correction")["entries"]:
        if entry["case"] == "extreme_4x6" or "rollout_is" not in entry:
            continue
        case, theirs = cases(entry["case"]), entry["metrics"]
        old, rollout = pair_of(entry, case)
        mask = case["response_mask"].bool()
        measured = Reductions(mask, torch.float64)
        measured.kl("k1", rollout - old)
        measured.effective("share", bounded_exp(old - rollout))
        ours = measured.metrics.finish()
        assert abs(ours["k1"] - theirs["rollout_corr/kl"]) < 1e-8
        assert abs(ours["k1_k3"] - theirs["rollout_corr/k3_kl"]) < 1e-8
        bounded = theirs["rollout_corr/rollout_is_ratio_fraction_high"] + theirs["rollout_corr/rollout_is_ratio_fraction_low"]
        if entry["rollout_is"] == "token" and bounded == 0:
            assert abs(ours["share"] - theirs["rollout_corr/rollout_is_eff_sample_size"]) < 1e-7
            checked += 1
    assert checked >= 4
