"""Metrics that merge over micro-batches without losing exactness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.objectives.metrics import Metrics
from workers.objectives.reductions import Reductions

EVERY_OBJECTIVE = {
    "policy/loss",
    "policy/ratio_mean",
    "policy/ratio_min",
    "policy/ratio_max",
    *(f"policy/clip_fraction_{name}{weighting}" for name in ("low", "high", "dual") for weighting in ("", "_sequence")),
    "batch/tokens",
    "batch/sequences",
    "batch/masked_rows",
    "batch/nonfinite_rows",
}


def test_what_every_objective_measures(example, make_objective):
    objective = make_objective("importance_sampling")
    step = objective.prepare(
        response_mask=example["response_mask"], advantages=example["advantages"], rollout_log_probs=example["old_log_probs"]
    )
    _, outputs = objective.loss(example["log_probs"], step.rows())
    assert set((step.metrics + outputs.metrics).finish()) == EVERY_OBJECTIVE


def test_what_is_given_is_measured_though_no_axis_needs_it(example, make_objective):
    old = example["old_log_probs"]
    step = make_objective("gspo").prepare(
        response_mask=example["response_mask"],
        advantages=example["advantages"],
        old_log_probs=old,
        ref_log_probs=old - 0.1,
        rollout_log_probs=old - 0.2,
        entropy=torch.full_like(old, 0.7),
    )
    _, outputs = make_objective("gspo").loss(example["log_probs"], step.rows())
    measured = (step.metrics + outputs.metrics).finish()
    more = {"policy/approx_kl", "kl/ref", "rollout/approx_kl"}
    assert set(measured) == EVERY_OBJECTIVE | more | {f"{name}_k3" for name in more} | {
        "rollout/effective_samples",
        "policy/entropy",
    }
    assert measured["kl/ref"] == pytest.approx(1.2 / 7 + 0.1)
    assert measured["rollout/approx_kl"] == pytest.approx(-0.2)
    assert measured["rollout/effective_samples"] == pytest.approx(1)
    assert measured["policy/entropy"] == pytest.approx(0.7)
    assert measured["batch/tokens"] == 7
    assert measured["batch/sequences"] == 2


def test_groups_that_teach_nothing_are_counted(make_objective):
    rewards, group_ids = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.2, 0.9]), torch.tensor([4, 4, 7, 7, 9, 2, 2])
    valid = torch.tensor([True, True, True, True, True, True, False])
    measured = make_objective("grpo").group_metrics(rewards, group_ids, valid).finish()
    assert measured == {"batch/groups": 4, "batch/zero_variance_groups": 3}
    none = make_objective("grpo").group_metrics(rewards, group_ids, torch.zeros(7)).finish()
    assert none == {"batch/groups": 0, "batch/zero_variance_groups": 0}


def test_fractions_by_token_and_by_sequence_differ():
    measured = Reductions(torch.tensor([[True, True, True], [True, False, False]]), torch.float64)
    measured.fraction("clipped", torch.tensor([[True, False, False], [True, True, True]]))
    measured.fraction("by_row", torch.tensor([[False], [True]]))
    assert measured.metrics.finish() == pytest.approx(
        {"clipped": 2 / 4, "clipped_sequence": (1 / 3 + 1) / 2, "by_row": 1 / 4, "by_row_sequence": 1 / 2}
    )


def test_one_value_a_sequence_counts_once_a_token():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    values = torch.tensor([[1.0], [5.0], [float("nan")]])
    narrow, wide = Reductions(mask, torch.float64), Reductions(mask, torch.float64)
    for measured, given_values in ((narrow, values), (wide, values.expand(3, 3))):
        measured.mean("mean", given_values)
        measured.extremes("value", given_values)
    assert narrow.metrics.finish() == wide.metrics.finish() == {"mean": 2.0, "value_min": 1.0, "value_max": 5.0}


def test_a_mean_over_nothing_is_left_out():
    measured = Reductions(torch.zeros(2, 3, dtype=torch.bool), torch.float32)
    measured.mean("mean", torch.ones(2, 3))
    measured.extremes("value", torch.ones(2, 3))
    measured.fraction("fraction", torch.ones(2, 3, dtype=torch.bool))
    measured.effective("share", torch.ones(2, 3))
    assert measured.metrics.finish() == {}
    assert Metrics().finish() == {}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(1, 5))
def test_merging_parts_gives_the_whole(rows, cut):
    values = torch.tensor(rows, dtype=torch.float64)
    mask = values > -5

    def measure(index) -> Metrics:
        measured = Reductions(mask[index], torch.float64)
        measured.mean("mean", values[index])
        measured.extremes("value", values[index])
        measured.fraction("positive", values[index] > 0)
        measured.effective("share", values[index].abs())
        measured.kl("kl", values[index])
        return measured.metrics

    merged = measure(slice(0, cut)) + measure(slice(cut, None))
    assert merged.finish() == pytest.approx(measure(slice(None)).finish(), rel=1e-12, abs=1e-12)


def test_metrics_of_other_rows_cannot_be_split():
    both = Metrics()
    both.add("sum", "one", torch.ones(3))
    assert both.split(torch.tensor([0, 1, 0]), 2) == [{"one": 2}, {"one": 1}]
    assert Metrics().split(torch.tensor([0, 1, 0]), 2) == [{}, {}]
    both.add("sum", "two", torch.ones(2))
    with pytest.raises(ValueError, match=r"metrics of \[2, 3\] rows"):
        both.split(torch.tensor([0, 1, 0]), 2)


def test_a_nonfinite_row_is_seen_in_the_extremes_wherever_it_stands():
    for rows in ([1.0, float("nan")], [float("nan"), 1.0]):
        measured = Reductions(torch.ones(2, 1, dtype=torch.bool), torch.float64)
        measured.extremes("value", torch.tensor(rows, dtype=torch.float64).unsqueeze(1))
        assert all(value != value for value in measured.metrics.finish().values())


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0])
def test_k3_of_float32_is_good_to_three_digits(scale):
    difference = scale * torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    measured = Reductions(torch.ones(64, 4096, dtype=torch.bool), torch.float32)
    measured.kl("kl", difference)
    exact = difference.double()
    assert measured.metrics.finish()["kl_k3"] == pytest.approx(float((torch.expm1(-exact) + exact).mean()), rel=1e-3)


def test_only_weights_count_whatever_their_precision(example, make_objective):
    """Log-probs, weights and what is computed in need not be of one type."""
    objective, found = make_objective("grpo"), []
    for weights_in, computed_in in (
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ):
        old = example["old_log_probs"].to(computed_in)
        step = objective.prepare(
            **{name: example[name] for name in ("response_mask", "advantages")},
            old_log_probs=old,
            ref_log_probs=old - 0.1,
            dtype=weights_in,
        )
        log_probs = example["log_probs"].detach().to(computed_in).requires_grad_()
        loss, outputs = objective.loss(log_probs, step.rows())
        loss.backward()
        assert log_probs.grad is not None
        found.append({**outputs.metrics.finish(), **dict(enumerate(log_probs.grad.flatten().tolist()))})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
