"""What must hold for every objective: property tests on values and gradients, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from workers.objectives import Objective, Rows, kernels

property_test = settings(max_examples=75, deadline=None, derandomize=True)

RATIOS: list[Any] = ["token", "sequence", "sequence_token", "product", {"kind": "segment", "chunk": 2}]
SURROGATES: list[Any] = [
    {"kind": "ppo", "clip_low": 0.1, "clip_high": 0.2},
    {"kind": "ppo", "clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3},
    {"kind": "two_sided", "delta": 1.5},
    "cispo",
    {"kind": "cispo", "weight_min": [1, 0], "weight_max": [1, 1]},
    "sapo",
    "gmpo",
    {"kind": "tv", "low": 0.1, "high": 0.1},
    {"kind": "bkl", "low": 0.02, "high": 0.02},
    "dro",
    "vespo",
    {"kind": "clip_cov", "share": 0.3, "cov_low": 0.0, "cov_high": 5},
    {"kind": "kl_cov", "share": 0.3},
    "none",
]
AGGREGATES: list[Any] = [
    "token",
    "seq",
    "prompt",
    "seq_sum",
    "sum",
    "constant",
    {"kind": "constant", "constant": 7},
    {"kind": "seq", "length_power": 1},
]
KLS: list[Any] = ["none"] + [
    {"place": "loss", "estimator": estimator, "gradient": gradient, "reference": reference}
    for estimator, gradient, reference in [
        ("k1", "plain", "ref"),
        ("k2", "plain", "rollout"),
        ("k3", "plain", "ref"),
        ("abs", "plain", "ref"),
        ("k3", "straight_through", "ref"),
        ("k3", "ratio_weighted", "ref"),
    ]
]
CORRECTIONS: list[Any] = (
    ["none"]
    + [
        {"level": level, "action": action, "cap": 1.1, "low": 0.9, "high": 1.1, "chunk": 2, "normalize": normalize}
        for level, action, normalize in [
            ("token", "truncate", False),
            ("token", "mask", True),
            ("geometric", "truncate", True),
            ("product", "mask", False),
            ("segment", "truncate", False),
        ]
    ]
    + [{"action": "none", "sequence_delta": 0.01}]
)

objectives = st.one_of(
    st.sampled_from(sorted(PRESETS)),
    st.fixed_dictionaries(
        {
            "ratio": st.sampled_from(RATIOS),
            "anchor": st.sampled_from(["old", "rollout"]),
            "surrogate": st.sampled_from(SURROGATES),
            "aggregate": st.sampled_from(AGGREGATES),
            "kl": st.sampled_from(KLS),
            "correct": st.sampled_from(CORRECTIONS),
        }
    ),
)


@st.composite
def batches(
    draw: st.DrawFn, min_rows: int = 1, max_rows: int = 5, max_tokens: int = 6, constant: bool = False
) -> dict[str, Any]:
    """Masks of every shape, log-probs that moved little or much, advantages a sequence or a token."""
    rows, tokens = draw(st.integers(min_rows, max_rows)), draw(st.integers(1, max_tokens))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    moved = draw(st.sampled_from([1e-4, 0.05, 0.5]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -normal(rows, tokens).abs() - 0.1
    per_token = not constant and draw(st.booleans())
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + moved * normal(rows, tokens),
        "rollout_log_probs": log_probs + moved * normal(rows, tokens),
        "ref_log_probs": log_probs + 0.3 * normal(rows, tokens),
        "entropy": normal(rows, tokens).abs(),
        "response_mask": mask.reshape(rows, tokens),
        "advantages": normal(rows, tokens) if per_token else normal(rows),
        "group_ids": torch.tensor(draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))),
    }


PER_ROW = (
    "log_probs",
    "old_log_probs",
    "rollout_log_probs",
    "ref_log_probs",
    "entropy",
    "response_mask",
    "advantages",
    "group_ids",
)


def build(spec: Any) -> Objective:
    return Objective(ObjectiveSpec.model_validate(spec).resolve())


def run(spec: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradient, and outputs of a batch taken as one step."""
    objective, log_probs = build(spec), batch["log_probs"].detach().clone().requires_grad_()
    step = objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})
    loss, outputs = objective.loss(log_probs, step.rows())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    metrics = (step.metrics + outputs.metrics).finish()
    return {"loss": loss.detach(), "gradient": gradient, "outputs": outputs, "metrics": metrics}


def rows_of(batch: dict[str, Any], index: Tensor) -> dict[str, Any]:
    return {name: value[index] for name, value in batch.items()}


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(b["gradient"].abs().max())) if b["gradient"].numel() else 1.0
    assert_close(a["loss"], b["loss"], rtol=tolerance, atol=tolerance * scale)
    assert_close(a["gradient"], b["gradient"], rtol=tolerance, atol=tolerance * scale)


# ---------------------------------------------------------------- identities between axes


@property_test
@given(batches(constant=True), st.sampled_from(SURROGATES[:5]), st.sampled_from(AGGREGATES), st.sampled_from(KLS))
def test_gspo_and_gspo_token_agree_for_one_advantage_a_sequence(batch, surrogate, aggregate, kl):
    spec = {"surrogate": surrogate, "aggregate": aggregate, "kl": kl}
    assume(not (isinstance(kl, dict) and kl["gradient"] == "ratio_weighted"))  # that is a weight of its own a token
    assert_same(run(spec | {"ratio": "sequence"}, batch), run(spec | {"ratio": "sequence_token"}, batch))


@property_test
@given(batches(max_tokens=1), st.sampled_from(SURROGATES), st.sampled_from(RATIOS[1:]))
def test_every_ratio_is_the_token_ratio_where_there_is_one_token(batch, surrogate, ratio):
    assert_same(run({"surrogate": surrogate, "ratio": ratio}, batch), run({"surrogate": surrogate, "ratio": "token"}, batch))


@property_test
@given(batches(constant=True), st.sampled_from(sorted(set(PRESETS) - {"clip_cov"})))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(batch, preset):
    """-w A for every token, whatever the clip rule; the KL's gradient is 0 where the reference is the policy."""
    same = dict.fromkeys(("old_log_probs", "rollout_log_probs", "ref_log_probs"), batch["log_probs"])
    result = run(preset, batch | same)
    expected = -result["outputs"].weights * batch["advantages"].unsqueeze(1)
    if preset == "vespo":  # the product ratio's weight is 1 there, and so is everything else
        assert_close(
            result["outputs"].ratio[batch["response_mask"]], torch.ones(int(batch["response_mask"].sum()), dtype=torch.float64)
        )
    assert_close(result["gradient"], expected, rtol=1e-12, atol=1e-12)


@property_test
@given(batches(), st.sampled_from(["grpo", "gspo", "sapo"]))
def test_a_single_update_clips_nothing_and_the_metrics_say_so(batch, preset):
    measured = run(preset, batch | {"old_log_probs": batch["log_probs"]})["metrics"]
    if batch["response_mask"].any():
        assert measured["policy/ratio_min"] == measured["policy/ratio_max"] == 1
        assert measured["policy/clip_fraction_low"] == measured["policy/clip_fraction_high"] == 0
        assert measured["policy/approx_kl"] == 0


# ---------------------------------------------------------------- what stands behind the mask


@property_test
@given(
    batches(),
    objectives,
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from([*PER_ROW[:5], "advantages", "all"]),
)
def test_nothing_behind_the_mask_reaches_loss_gradient_or_metrics(batch, spec, poison, where):
    masked = ~batch["response_mask"]
    poisoned = dict(batch)
    for name in (*PER_ROW[:5], "advantages"):
        if where in (name, "all"):
            behind = masked if batch[name].dim() == 2 else masked.all(dim=1)
            poisoned[name] = torch.where(behind, poison, batch[name])
    a, b = run(spec, poisoned), run(spec, batch)
    assert torch.equal(a["loss"], b["loss"])
    assert torch.equal(a["gradient"], b["gradient"])
    assert a["metrics"] == b["metrics"]
    assert not a["outputs"].nonfinite_rows.any()
    for name in ("token_loss", "ratio", "log_importance_ratio", "advantages", "weights"):
        assert torch.equal(getattr(a["outputs"], name), getattr(b["outputs"], name)), name
        assert (getattr(a["outputs"], name)[masked] == 0).all(), name


@property_test
@given(batches(), objectives, st.integers(1, 3))
def test_fully_masked_rows_count_nowhere(batch, spec, count):
    """Padding a step with empty rows, of whatever content, changes nothing."""
    padding = {name: torch.full((count, *value.shape[1:]), float("nan")).to(value.dtype) for name, value in batch.items()}
    padding["response_mask"] = torch.zeros(count, batch["response_mask"].shape[1], dtype=torch.bool)
    padding["group_ids"] = torch.full((count,), 9)
    padded = {name: torch.cat([value, padding[name]]) for name, value in batch.items()}
    a, b = run(spec, padded), run(spec, batch)
    a["gradient"], added = a["gradient"][:-count], a["gradient"][-count:]
    assert (added == 0).all()
    assert_same(a, b)


# ---------------------------------------------------------------- cutting a step up


@property_test
@given(batches(), objectives, st.data())
def test_micro_batches_add_up_to_the_step(batch, spec, data):
    """Any cut, in any order, with any row alone: the same loss, gradient and metrics."""
    rows = len(batch["log_probs"])
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, rows - 1)))))
    parts = [part for part in torch.tensor(order).tensor_split(cuts) if len(part)]
    objective, log_probs = build(spec), batch["log_probs"].clone().requires_grad_()
    step = objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})
    whole_loss, whole = objective.loss(log_probs, step.rows())
    (gradient,) = torch.autograd.grad(whole_loss, log_probs)
    metrics, total = step.metrics, torch.zeros((), dtype=torch.float64)
    for part in parts:
        loss, outputs = objective.loss(log_probs[part], step.rows(part))
        loss.backward()
        total, metrics = total + loss.detach(), metrics + outputs.metrics
    assert_same({"loss": total, "gradient": log_probs.grad}, {"loss": whole_loss.detach(), "gradient": gradient})
    assert metrics.finish() == pytest.approx((step.metrics + whole.metrics).finish(), rel=1e-12, abs=1e-12)


@property_test
@given(batches(), objectives, st.data())
def test_metrics_of_merged_items_split_into_those_of_each_item_alone(batch, spec, data):
    """Items lie in any order, one may have no rows; each has its own weights, corrections and picked tokens."""
    rows, items = len(batch["log_probs"]), 3
    item_of_row = torch.tensor(data.draw(st.lists(st.integers(0, items - 1), min_size=rows, max_size=rows)))
    rewards = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=rows, max_size=rows)))
    objective, alone = build(spec), list[dict[str, float]]()
    given = {name: value for name, value in batch.items() if name != "log_probs"}
    whole = objective.prepare(**given)
    together = {name: tensor.clone() for name, tensor in whole.rows().known().items()}
    for item in range(items):
        index = (item_of_row == item).nonzero().squeeze(1)
        step = objective.prepare(**rows_of(given, index))
        _, outputs = objective.loss(batch["log_probs"][index], step.rows())
        groups = objective.group_metrics(rewards[index], batch["group_ids"][index])
        alone.append((step.metrics + outputs.metrics + groups).finish())
        for name, tensor in step.rows().known().items():
            together[name][index] = tensor
    _, outputs = objective.loss(batch["log_probs"], Rows(**together))
    metrics = whole.metrics + outputs.metrics + objective.group_metrics(rewards, batch["group_ids"] + 10 * item_of_row)
    assert len(metrics.split(item_of_row, items)) == items
    for split, finished in zip(metrics.split(item_of_row, items), alone, strict=True):
        assert split == pytest.approx(finished, rel=1e-12, abs=1e-12)


@property_test
@given(batches(), objectives)
def test_how_many_rows_are_taken_at_a_time_does_not_matter(batch, spec):
    whole = run(spec, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 1)
        alone = run(spec, batch)
    assert torch.equal(whole["loss"], alone["loss"])
    assert torch.equal(whole["gradient"], alone["gradient"])
    assert whole["metrics"] == pytest.approx(alone["metrics"], rel=1e-12, abs=1e-12)


@property_test
@given(batches(), objectives)
def test_plain_operations_give_what_the_fast_ones_do(batch, spec):
    fast = run(spec, batch)
    with kernels.plain():
        plain = run(spec, batch)
    assert_same(fast, plain)
    assert fast["metrics"] == pytest.approx(plain["metrics"], rel=1e-12, abs=1e-12)
    for name in ("ratio", "token_loss", "log_importance_ratio", "clipped_low", "clipped_high", "clipped_dual", "weights"):
        assert_close(getattr(fast["outputs"], name), getattr(plain["outputs"], name), rtol=1e-12, atol=1e-12)


@property_test
@given(batches(), objectives)
def test_each_rows_share_of_the_loss_is_known(batch, spec):
    result = run(spec, batch)
    outputs = result["outputs"]
    assert_close(outputs.loss_B.sum(), result["loss"], rtol=1e-12, atol=1e-12)
    assert_close(outputs.loss_B, (outputs.token_loss.detach() * outputs.weights).sum(1), rtol=1e-12, atol=1e-12)


@property_test
@given(batches(), objectives, st.data())
def test_permuting_rows_permutes_everything(batch, spec, data):
    assume("clip_cov" not in str(spec))  # it draws by position
    order = torch.tensor(data.draw(st.permutations(range(len(batch["log_probs"])))))
    a, b = run(spec, rows_of(batch, order)), run(spec, batch)
    b["gradient"] = b["gradient"][order]
    assert_same(a, b)
    for name in ("ratio", "token_loss", "clipped_low", "clipped_high", "clipped_dual", "weights"):
        assert_close(getattr(a["outputs"], name), getattr(b["outputs"], name)[order], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the edges


@pytest.mark.parametrize("preset", [*PRESETS, "segment"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 4)], ids=["no rows", "no tokens", "all masked"])
def test_of_nothing_the_loss_is_zero_with_a_graph(preset, shape):
    nan = torch.full(shape, float("nan"), dtype=torch.float64)
    batch = dict.fromkeys(PER_ROW[:5], nan) | {
        "response_mask": torch.zeros(shape),
        "advantages": nan[:, 0] if shape[1] else torch.zeros(shape[0]),
        "group_ids": torch.zeros(shape[0], dtype=torch.long),
    }
    spec = preset if preset in PRESETS else {"ratio": {"kind": "segment", "chunk": 2}}
    result = run(spec, batch)
    assert result["loss"] == 0
    assert (result["gradient"] == 0).all()
    assert result["metrics"]["batch/tokens"] == 0
    assert "policy/ratio_mean" not in result["metrics"]


@property_test
@given(batches(), objectives, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_extreme_log_ratios_give_finite_gradients(batch, spec, dtype, data):
    far = torch.tensor([-100.0, 100.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shift = far[torch.randint(3, batch["log_probs"].shape, generator=generator)]
    extreme = batch | {"old_log_probs": batch["old_log_probs"] + shift, "rollout_log_probs": batch["rollout_log_probs"] - shift}
    extreme = {name: value.to(dtype) if value.is_floating_point() else value for name, value in extreme.items()}
    result = run(spec, extreme)
    assert result["loss"].isfinite()
    assert result["gradient"].isfinite().all()
    assert all(value == value for value in result["metrics"].values())


@property_test
@given(batches(), objectives)
def test_float32_agrees_with_float64(batch, spec):
    assume("cov" not in str(spec))  # which token has the higher covariance may turn on the last digit
    single = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    double = {name: value.double() if value.is_floating_point() else value for name, value in single.items()}
    a, b = run(spec, single), run(spec, double)
    same = (a["outputs"].clipped_low == b["outputs"].clipped_low) & (a["outputs"].clipped_high == b["outputs"].clipped_high)
    assume(bool(same.all()))  # a ratio at the very bound may fall on either side
    assert a["gradient"].dtype == torch.float32
    scale = float((b["outputs"].token_loss.detach() * b["outputs"].weights).abs().sum())
    assert abs(float(a["loss"]) - float(b["loss"])) <= 1e-5 * max(scale, 1e-3)
    largest = float(b["gradient"].abs().max())
    assert_close(a["gradient"].double(), b["gradient"], rtol=1e-5, atol=2e-5 * max(largest, 1e-3))


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_computed_in_float32(preset):
    generator = torch.Generator().manual_seed(0)
    half = -torch.rand(3, 4, generator=generator).bfloat16()
    batch = dict.fromkeys(PER_ROW[:5], half) | {
        "response_mask": torch.ones(3, 4),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "group_ids": torch.tensor([0, 0, 1]),
    }
    result = run(preset, batch)
    assert result["loss"].dtype == torch.float32
    assert result["gradient"].dtype == torch.bfloat16


def test_a_row_that_is_not_finite_is_named(compute, example):
    broken = example["log_probs"].clone()
    broken[1, 2] = float("nan")
    _, _, outputs = compute("gspo", example | {"log_probs": broken})
    assert outputs.nonfinite_rows.tolist() == [False, True]
    assert outputs.metrics.finish()["batch/nonfinite_rows"] == 1
