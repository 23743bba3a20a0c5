"""KL estimators and their gradients against six libraries' figures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.objectives import kernels, kl

# their name -> estimator, gradient
NAMES = {
    "k1": ("k1", "plain"),
    "kl": ("k1", "plain"),
    "abs": ("abs", "plain"),
    "k2": ("k2", "plain"),
    "mse": ("k2", "plain"),
    "k3": ("k3", "plain"),
    "low_var_kl": ("k3", "plain"),
    "k1+": ("k1", "straight_through"),
    "k3+": ("k3", "straight_through"),
    "low_var_kl+": ("k3", "straight_through"),
    "k3 unbiased (ratio-weighted)": ("k3", "ratio_weighted"),
    "k3 use_bias_correction_kl": ("k3", "ratio_weighted"),
}


def figures(entry: dict[str, Any], case: dict[str, Tensor], bound: Callable[[Tensor], Tensor] | None = None):
    estimator, gradient = NAMES[entry["kl"]]
    log_probs = case["log_probs"].clone().requires_grad_()
    x = log_probs - case[f"{entry['reference']}_log_probs"]
    delta = log_probs - case["old_log_probs"]
    value = kl.penalty(x, kl.Ratios(delta.exp(), delta), estimator=estimator, gradient=gradient)
    value = value if bound is None else bound(value)
    return value.detach(), torch.autograd.grad(value.sum(), log_probs)[0]


def agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


def capped_at_10(value: Tensor) -> Tensor:
    return value.clamp(-10, 10)


def test_estimators_agree_wherever_no_bound_acts(golden, cases, as_tensor):
    checked = 0
    for entry in golden("kl")["entries"]:
        if "error" in entry or (entry["case"] == "extreme_4x6" and NAMES[entry["kl"]][0] == "k3"):
            continue
        tolerance = 1e-6 if "float32" in entry["peer"] else 1e-12
        case = cases("ragged_4x7" if entry["case"] == "nan_pad_4x7" else entry["case"])
        if entry["case"] == "extreme_4x6":
            tolerance *= 100  # of log ratios up to 80
        expected = as_tensor(entry["value"]), as_tensor(entry["grad_of_sum"])
        assert agree(figures(entry, case), expected, tolerance), (entry["peer"], entry["kl"], entry["case"])
        checked += 1
    assert checked == 92


def explanations(entry, case):
    """The two bounds that libraries choose, made of our formulas."""
    tolerance = 1e-4 if "float32" in entry["peer"] else 1e-7
    value, gradient = figures(entry, case)
    if NAMES[entry["kl"]][1] == "straight_through":
        yield (capped_at_10(value), gradient), tolerance
    yield figures(entry, case, capped_at_10), tolerance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MAX_LOG_RATIO", 500.0)
        yield figures(entry, case), tolerance


def test_k3_of_extreme_log_ratios_differs_by_the_bounds_that_libraries_choose(golden, cases, as_tensor):
    """Ours bounds only the exponent, at 20, where exp would overflow. Some bound nothing; others cap the value at 10, and with
    it lose the gradient of every token that is far off. (Straight-through keeps k2's gradient under either bound.)"""
    checked = 0
    for entry in golden("kl")["entries"]:
        if "error" in entry or entry["case"] != "extreme_4x6" or NAMES[entry["kl"]][0] != "k3":
            continue
        case, expected = cases(entry["case"]), (as_tensor(entry["value"]), as_tensor(entry["grad_of_sum"]))
        assert not agree(figures(entry, case), expected, 1e-4)
        fits = [agree(derived, expected, tolerance) for derived, tolerance in explanations(entry, case)]
        assert any(fits), (entry["peer"], entry["kl"], entry["reference"])
        checked += 1
    assert checked == 24
