"""Loss and gradient against six libraries' own figures: about 2,000 entries.

`LIBRARIES` maps each library's options to our axes (library_losses.options). `DIFFERENCES` lists where we compute something
else on purpose (library_losses.differences): each says why, and derives their figure from ours, so that nothing hides behind
a tolerance. Tolerances are relative to sum |w L| and to the largest gradient, and come from the libraries' own epsilons and
float32 casts.
"""

import pytest
import torch

from library_losses.differences import DIFFERENCES, luspo, not_offered
from library_losses.figures import agree, entries_of, mapped, settings, theirs
from library_losses.options import LIBRARIES, rows


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
