"""A new value on an axis is one function and one registry line: shown with SkyRL's rollout_is, which we do not offer."""

import torch
from torch.testing import assert_close

from service.spec.objective import ObjectiveSpec
from workers.objectives import Objective
from workers.objectives.aggregate import AGGREGATES
from workers.objectives.ratio import RATIOS, Ratio
from workers.objectives.surrogate import SURROGATES, Terms, TokenLoss


def in_range(t: Terms, *, low: float, high: float) -> TokenLoss:
    """-sg(r) A log p inside of (1 - low, 1 + high), nothing outside."""
    r = t.ratio.detach()
    inside = (r > 1 - low) & (r < 1 + high)
    return TokenLoss(-torch.where(inside, r, 0.0) * t.advantages * t.log_probs, low=r <= 1 - low, high=r >= 1 + high)


def test_a_new_surrogate_is_one_function_and_one_line(golden, cases, as_tensor, monkeypatch):
    monkeypatch.setitem(SURROGATES, "in_range", in_range)
    checked = 0
    for entry in golden("skyrl")["entries"]:
        # a fully masked row and one with extreme ratios differ as DIFFERENCES says
        if entry["policy_loss_type"] != "rollout_is" or entry["case"] in ("masked_row_5x6", "nan_pad_4x7"):
            continue
        low, high = entry["eps"]
        aggregate = {"token_mean": "token", "sequence_mean": "seq"}[entry["loss_reduction"]]
        axes = ObjectiveSpec.model_validate({"anchor": "rollout", "aggregate": aggregate}).resolve()
        objective = Objective(axes | {"surrogate": {"kind": "in_range", "low": low, "high": high}})
        case = cases(entry["case"])
        log_probs = case["log_probs"].clone().requires_grad_()
        step = objective.prepare(**{name: case[name] for name in ("response_mask", "advantages", "rollout_log_probs")})
        loss, outputs = objective.loss(log_probs, step.rows())
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert_close(loss.detach(), as_tensor(entry["loss"]), rtol=1e-5, atol=1e-6)
        assert_close(gradient, as_tensor(entry["grad_log_probs"]), rtol=1e-6, atol=1e-7)
        measured = outputs.metrics.finish()
        clipped = measured["policy/clip_fraction_low"] + measured["policy/clip_fraction_high"]
        assert abs(clipped - entry["metrics"]["clip_ratio"]) < 1e-6
        checked += 1
    assert checked == 22


def test_a_new_ratio_and_a_new_aggregate_are_one_function_and_one_line_each(cases, monkeypatch):
    """The first token's ratio for all, and only the longest answer counts."""
    monkeypatch.setitem(RATIOS, "first", Ratio(lambda delta, answers: delta[:, :1]))
    monkeypatch.setitem(AGGREGATES, "longest", lambda c: (c.tokens_B == c.tokens_B.max()).double() / c.tokens_B.max())
    axes = ObjectiveSpec.model_validate({"surrogate": "none"}).resolve()
    objective = Objective(axes | {"ratio": {"kind": "first"}, "aggregate": {"kind": "longest"}})
    case = cases("ragged_4x7")
    step = objective.prepare(**{name: case[name] for name in ("response_mask", "advantages", "old_log_probs")})
    loss, outputs = objective.loss(case["log_probs"], step.rows())
    first = (case["log_probs"] - case["old_log_probs"])[:, 0].exp()
    assert_close(outputs.ratio[0], first[0].expand(7))
    assert_close(loss, -first[0] * case["advantages"][0, 0])
