"""Loss requests inside the worker: from the bytes of work orders to the bytes of answers, without Redis and processes."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from service.relay.orders import Answer, Order, Parcel
from service.relay.queue import Taken
from service.relay.tensors import Tensor as RawTensor
from service.relay.tensors import encode
from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from workers.losses import merge
from workers.losses.batch import bytes_of, viewed
from workers.losses.compute import RETURNED, Prepared
from workers.losses.serve import Round
from workers.objectives import Objective

torch.set_num_threads(1)

F64 = torch.float64
ALL = ["gradients", *RETURNED]
LOG_PROBS = ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs")
PER_TOKEN = (*LOG_PROBS, "entropy", "segment_ids", "response_mask", "weights")
WORKED: dict[str, Any] = {
    "log_probs": [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]],
    "old_log_probs": [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]],
    "advantages": torch.tensor([1.0, -1.0], dtype=F64),
}


# ---------------------------------------------------------------- what the API would have written


def ragged(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Rows in lists as flat tensors with cu_seqlens."""
    lengths = [len(row) for row in batch["log_probs"]]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = {name: _flat(rows) if isinstance(rows, list) else rows for name, rows in batch.items()}
    return {"cu_seqlens": offsets, **flat}


def _flat(rows: list[Any]) -> Tensor:
    if not isinstance(rows[0], list):
        return torch.tensor(rows)
    kind = torch.int64 if any(type(value) is int for row in rows for value in row) else F64
    return torch.tensor([value for row in rows for value in row], dtype=kind)


def item(batch: dict[str, Any], objective: Any = "gspo", **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An entry of an order and its tensors; rows in lists go ragged."""
    is_ragged = isinstance(batch["log_probs"], list)
    entry = {
        "objective": ObjectiveSpec.model_validate(objective).resolve(),
        "dtype": "float64",
        "layout": "ragged" if is_ragged or "cu_seqlens" in batch else "padded",
        "return": ALL,
        "on_nonfinite": "refuse",
        "on_singleton": "refuse",
        "seed": 0,
        "warnings": [],
        **options,
    }
    return entry, ragged(batch) if is_ragged else batch


def order(*items: tuple[dict[str, Any], dict[str, Tensor]], name: str = "loss_1", all_or_nothing: bool = False) -> Taken:
    entries = [{"index": index, **entry} for index, (entry, _) in enumerate(items)]
    tensors = {f"{index}/{name}": bytes_of(values) for index, (_, sent) in enumerate(items) for name, values in sent.items()}
    parcel = Order(name, "default", 2e9, all_or_nothing, entries, tensors).encode()
    return Taken(name, "default", parcel, name.encode())


def answers(*orders: Taken) -> list[Answer]:
    found: dict[str, bytes] = {}

    def answer(done: Sequence[tuple[Taken, bytes]]) -> None:
        for taken, raw in done:
            assert taken.id not in found, "answered twice"
            found[taken.id] = raw

    Round(orders, answer).run()
    return [Answer.decode(found[taken.id]) for taken in orders]


def results(*items: tuple[dict[str, Any], dict[str, Tensor]]) -> list[dict[str, Any]]:
    """The items of the answer to one order, with their tensors beside the numbers."""
    (answer,) = answers(order(*items))
    tensors = {name: viewed(raw) for name, raw in answer.tensors.items()}
    of = [{name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{i}/")} for i in range(len(items))]
    return [entry | sent for entry, sent in zip(answer.data, of, strict=True)]


def result(batch: dict[str, Any], objective: Any = "gspo", **options: Any) -> dict[str, Any]:
    (found,) = results(item(batch, objective, **options))
    return found


def drawn(lengths: Sequence[int] = (5, 3, 5, 1, 2, 4), seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with everything in it that any objective may ask for, and NaN behind the mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, longest, dtype=F64, generator=generator)

    old = -noise(1.0).abs() - 0.2
    batch = {"log_probs": old + noise(0.1), "old_log_probs": old, "rollout_log_probs": old + noise(0.05)}
    batch |= {"ref_log_probs": old + noise(0.2), "entropy": noise(1.0).abs()}
    batch = {name: torch.where(mask, values, torch.nan) for name, values in batch.items()}
    return batch | {
        "response_mask": mask.double(),
        "segment_ids": (torch.arange(longest) // 2).expand(rows, longest).contiguous(),
        "rewards": torch.randn(rows, dtype=F64, generator=generator),
        "group_ids": torch.arange(rows) // 2,
        "truncated": (torch.arange(rows) == 2).double(),
    }


def flattened(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch, ragged: what stands behind the mask is left out."""
    mask = batch["response_mask"].bool()
    flat = {name: values[mask] if values.shape == mask.shape else values for name, values in batch.items()}
    del flat["response_mask"]
    return flat | {"cu_seqlens": torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)}


def directly(objective: Any, batch: dict[str, Tensor], advantages: Tensor | None = None) -> dict[str, Any]:
    """The same by `Objective` itself."""
    made = Objective(ObjectiveSpec.model_validate(objective).resolve())
    mask, rewards, ids = batch["response_mask"].bool(), batch["rewards"], batch["group_ids"]
    known: dict[str, Any] = {name: batch[name] for name in LOG_PROBS[1:]}
    if advantages is None:
        score = made.with_kl(rewards, response_mask=mask, **known)
        advantages = made.advantages(score, ids, lengths=mask.sum(1))
    selected = made.select(mask, rewards=rewards, group_ids=ids, truncated=batch["truncated"], entropy=batch["entropy"])
    step = made.prepare(
        response_mask=mask & selected.any(1, keepdim=True),
        selected=selected,
        advantages=advantages,
        segment_ids=batch["segment_ids"],
        group_ids=ids,
        entropy=batch["entropy"],
        **known,
    )
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, outputs = made.loss(log_probs, **{**step.rows(), "picked": None})
    (gradient,) = torch.autograd.grad(loss, log_probs)
    metrics = (step.metrics + made.group_metrics(rewards, ids) + outputs.metrics).finish()
    returned = {name: tensor_of(outputs).detach() for name, tensor_of in RETURNED.items()}
    return {"loss": float(loss.detach()), "metrics": metrics, "gradients/log_probs": gradient, **returned}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert found["status"] == "ok", found
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=tolerance)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
    for name in ("gradients/log_probs", *RETURNED):
        assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------- values


def test_the_worked_example() -> None:
    found = result(WORKED)
    assert found["loss"] == pytest.approx((math.exp(0.2) - 1.0004) / 2, abs=1e-12)
    assert_close(found["log_importance_ratio"], torch.tensor([0.15] * 4 + [0.2] * 3, dtype=F64))
    assert_close(found["ratio"], torch.tensor([math.exp(0.15)] * 4 + [math.exp(0.2)] * 3, dtype=F64))
    assert found["clipped"].tolist() == [True] * 4 + [False] * 3
    assert_close(found["gradients/log_probs"], torch.tensor([0.0] * 4 + [math.exp(0.2) / 6] * 3, dtype=F64))
    assert_close(found["token_loss"], torch.tensor([-1.0004] * 4 + [math.exp(0.2)] * 3, dtype=F64))
    assert_close(found["weights"], torch.tensor([1 / 8] * 4 + [1 / 6] * 3, dtype=F64))
    assert found["metrics"]["policy/ratio_mean"] == pytest.approx((4 * math.exp(0.15) + 3 * math.exp(0.2)) / 7)
    assert found["cu_seqlens"].tolist() == [0, 4, 7]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_what_the_objective_gives(preset: str) -> None:
    """From rewards, from advantages of sequences and of tokens."""
    batch = drawn()
    of_sequences, of_tokens = torch.randn(6, dtype=F64), torch.randn(6, 5, dtype=F64)
    sent = [batch, batch | {"advantages": of_sequences}, batch | {"advantages": of_tokens}]
    found = results(*(item(one, preset) for one in sent))
    for one, advantages in zip(found, (None, of_sequences, of_tokens), strict=True):
        assert_same(one, directly(preset, batch, advantages))


@pytest.mark.parametrize(
    "objective",
    [
        {"preset": "gspo", "ratio": {"kind": "segment"}},
        {"preset": "gspo", "ratio": {"kind": "segment", "chunk": 2}},
        {"preset": "grpo", "aggregate": "prompt"},
        {"preset": "dapo", "select": {"top_entropy": 0.5}},
        {"preset": "gspo", "select": {"top_entropy": 0.5}},
        {"preset": "grpo", "correct": {"level": "segment", "action": "truncate", "cap": 1.01, "normalize": True}},
        {"preset": "grpo", "correct": {"action": "none", "sequence_delta": 0.01}},
        {"preset": "gspo", "kl": {"place": "reward", "coef": 0.5}},
    ],
    ids=str,
)
def test_axes_beside_the_presets_too(objective: dict[str, Any]) -> None:
    assert_same(result(drawn(), objective), directly(objective, drawn()))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [(5, 3, 5, 1, 2, 4), (4, 4, 4, 4)], ids=["uneven", "even"])
def test_ragged_is_padded_without_the_padding(preset: str, lengths: tuple[int, ...]) -> None:
    batch = drawn(lengths)
    mask = batch["response_mask"].bool()
    padded, flat = results(item(batch, preset), item(flattened(batch), preset))
    assert_same(flat, {name: values[mask] if isinstance(values, Tensor) else values for name, values in padded.items()})


def test_interior_holes_may_be_sent_ragged_too() -> None:
    batch = drawn((5, 5, 5, 5))
    batch["response_mask"][:, 2] = 0
    ids = {"cu_seqlens": torch.arange(0, 21, 5)}
    flat = {name: values.flatten() if values.dim() == 2 else values for name, values in batch.items()}
    padded, found = results(item(batch), item(flat | ids))
    assert_same(found, {name: v.flatten() if isinstance(v, Tensor) else v for name, v in padded.items()})


def test_several_rewards_and_their_weights() -> None:
    batch, weights = drawn(), torch.tensor([1.0, 0.25], dtype=F64)
    two = torch.stack([batch["rewards"], batch["rewards"].flip(0)], dim=1)
    both = {**batch, "rewards": two, "reward_weights": weights}
    expected = directly("grpo", {**batch, "rewards": two @ weights})
    found = result(both, "grpo")
    assert_close(found["advantages"], expected["advantages"])
    in_reward = {"preset": "grpo", "kl": {"place": "reward", "coef": 0.5}}
    found = result(both, in_reward)
    assert_close(found["advantages"], directly(in_reward, {**batch, "rewards": two @ weights})["advantages"])


def test_minus_log_p_needs_no_advantages_and_takes_token_weights() -> None:
    found = result({"log_probs": WORKED["log_probs"]}, "cross_entropy")
    assert found["loss"] == pytest.approx(11.3)
    weights = [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 2.0]]
    found = result({"log_probs": WORKED["log_probs"], "weights": weights}, "cross_entropy")
    assert found["loss"] == pytest.approx(2.0 + 0.75 + 2.6)
    assert found["gradients/log_probs"].tolist() == [-1.0, 0.0, -0.5, 0.0, 0.0, 0.0, -2.0]


SPLITTABLE = [name for name in PRESETS if name not in ("clip_cov", "kl_cov")]


@pytest.mark.parametrize("preset", SPLITTABLE)
def test_micro_batches_with_the_weights_of_the_step_add_up_to_it(preset: str) -> None:
    whole = drawn((5, 3, 5, 1, 2, 4, 6, 6))
    ids = whole["group_ids"]
    step = result(whole, preset)
    parts = [ids < 1, (ids >= 1) & (ids < 3), ids >= 3]
    found = results(*(item({name: v[rows] for name, v in (whole | sent(step)).items()}, preset) for rows in parts))
    assert sum(part["loss"] for part in found) == pytest.approx(step["loss"], abs=1e-12)
    gradient = torch.cat([part["gradients/log_probs"] for part in found])
    assert_close(gradient, step["gradients/log_probs"], rtol=1e-12, atol=1e-12)
    assert_close(torch.cat([part["weights"] for part in found]), step["weights"], rtol=0, atol=0)


def test_the_weights_of_the_step_weigh_one_loss_a_sequence_too() -> None:
    """With one advantage and one ratio a sequence no loss of a token is ever made."""
    whole = drawn() | {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.5], dtype=F64)}
    step = result(whole)
    batch = whole | {"weights": step["weights"]}
    found = results(*(item({name: values[rows] for name, values in batch.items()}) for rows in torch.arange(6).split(4)))
    assert sum(part["loss"] for part in found) == pytest.approx(step["loss"], abs=1e-12)
    assert_close(
        torch.cat([part["gradients/log_probs"] for part in found]), step["gradients/log_probs"], rtol=1e-12, atol=1e-12
    )


def sent(step: dict[str, Any]) -> dict[str, Tensor]:
    """What a step's answer tells its micro-batches: those of whole batches cannot make it of their rows."""
    return {"weights": step["weights"], "advantages": step["advantages"]}


def test_what_looks_at_the_step_all_the_same_is_warned_of() -> None:
    batch = drawn() | {"weights": torch.ones(6, 5, dtype=F64)}
    normalized = {"preset": "grpo", "correct": {"action": "truncate", "normalize": True}}
    found = results(item(batch, normalized), item(batch, "clip_cov"), item(batch, "grpo"))
    said = [" ".join(one.get("warnings", [])) for one in found]
    assert "correct.normalize" in said[0] and "clip_cov" in said[1] and not said[2]


def test_tokens_drawn_by_covariance_follow_the_seed() -> None:
    drawn_by = {"preset": "clip_cov", "surrogate": {"share": 0.1, "cov_low": 1e-6}}
    batch = drawn((8,) * 8)
    losses = [one["loss"] for one in results(*(item(batch, drawn_by, seed=seed) for seed in (1, 1, 2, 3)))]
    assert losses[0] == losses[1] and len(set(losses)) > 1


# ---------------------------------------------------------------- dtypes and shapes


def test_float32_and_bfloat16() -> None:
    batch = drawn()
    half = {name: v.bfloat16() if v.is_floating_point() else v for name, v in batch.items()}
    rounded = {name: v.double() if v.is_floating_point() else v for name, v in half.items()}
    exact = result(batch)
    single, from_half, asked = results(
        item(batch, dtype="float32"), item(half, dtype="bfloat16"), item(batch, dtype="bfloat16")
    )
    for one in (single, from_half, asked):
        assert one["gradients/log_probs"].dtype == torch.float32
    assert single["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    assert_close(single["gradients/log_probs"].double(), exact["gradients/log_probs"], rtol=1e-4, atol=1e-6)
    assert from_half["loss"] == asked["loss"] == pytest.approx(result(rounded)["loss"], rel=1e-5)


def test_masks_and_ids_of_any_type() -> None:
    batch = drawn()
    expected = result(batch, "dapo")
    for kind in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16):
        masks = {name: batch[name].to(kind) for name in ("response_mask", "truncated")}
        assert_same(result(batch | masks | {"group_ids": batch["group_ids"].int()}, "dapo"), expected)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0]], ids=str)
def test_nothing_to_learn_from_is_a_loss_of_zero(lengths: list[int]) -> None:
    tokens = torch.full((sum(lengths),), -1.0, dtype=F64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    batch = {"cu_seqlens": offsets, "log_probs": tokens, "old_log_probs": tokens, "advantages": torch.ones(len(lengths))}
    found = result(batch)
    assert found["status"] == "ok" and found["loss"] == (-1.0 if sum(lengths) else 0.0)
    assert found["gradients/log_probs"].shape == tokens.shape


def test_only_what_was_asked_for_is_sent() -> None:
    found = results(item(WORKED, **{"return": []}), item(WORKED, **{"return": ["ratio"]}))
    tensors = [{name for name, value in one.items() if isinstance(value, Tensor)} for one in found]
    assert tensors == [set(), {"ratio", "cu_seqlens"}]


def test_bytes_that_lie_askew_are_read_right() -> None:
    entry, batch = item(WORKED)
    head, raw = order((entry, batch)).parcel
    size = int.from_bytes(raw[:8], "little")
    askew = (size + 3).to_bytes(8, "little") + raw[8 : 8 + size] + b"   " + raw[8 + size :]
    (answer,) = answers(Taken("loss_1", "default", Parcel(head, askew), b""))
    assert answer.data[0]["loss"] == result(WORKED)["loss"]


def test_tensors_of_a_refused_item_travel_along_and_are_not_looked_at() -> None:
    """A body of safetensors goes on as it came."""
    head, _ = order(item(WORKED)).parcel
    sent = Order.decode(order(item(WORKED)).parcel)
    refused = {"index": 1, "error": {"code": "dtype_not_taken", "pointer": "/items/1/batch/log_probs", "detail": "F16"}}
    strange = RawTensor("F16", (3,), memoryview(bytes(6)))
    raw = encode(sent.tensors | {"1/log_probs": strange}, {"request": "{}"})
    orders = json.loads(head)
    orders["items"].append(refused)
    (answer,) = answers(Taken("loss_1", "default", Parcel(json.dumps(orders).encode(), raw), b""))
    assert [one["status"] for one in answer.data] == ["ok", "error"]
    assert answer.data[0]["loss"] == result(WORKED)["loss"]


# ---------------------------------------------------------------- merging


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each computation was of."""
    sizes, compute = list[int](), merge.compute

    def counting(prepared: Sequence[Prepared]) -> Any:
        sizes.append(len(prepared))
        return compute(prepared)

    monkeypatch.setattr(merge, "compute", counting)
    return sizes


def several() -> list[dict[str, Tensor]]:
    """Items of like size; one with a fully masked row."""
    lengths = [(5, 3, 5, 1, 2, 4), (4, 4), (5, 0, 7, 6)]
    return [drawn(one, seed) for seed, one in enumerate(lengths)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_merged_items_get_what_they_would_get_alone(preset: str, dtype: str, tolerance: float, batches: list[int]) -> None:
    items = [item(batch, preset, dtype=dtype) for batch in several()]
    together = [one.data[0] | _tensors(one) for one in answers(*(order(one, name=f"l{i}") for i, one in enumerate(items)))]
    assert batches == [3]
    for found, alone in zip(together, items, strict=True):
        assert_same(found, results(alone)[0], tolerance)


def _tensors(answer: Answer) -> dict[str, Tensor]:
    return {name.removeprefix("0/"): viewed(raw) for name, raw in answer.tensors.items()}


def test_what_was_computed_together_is_answered_together() -> None:
    """And what was refused before anything was computed does not wait for it."""
    refused, trips = order(item({**WORKED, "old_log_probs": [[math.nan] * 4, [-1.0] * 3]}), name="refused"), []
    orders = [order(item(WORKED), name="first"), refused, order(item(WORKED), name="second")]
    Round(orders, lambda done: trips.append([taken.id for taken, _ in done])).run()
    assert trips == [["refused"], ["first", "second"]]


def test_what_differs_is_not_merged(batches: list[int]) -> None:
    batch = drawn()
    without = {name: values for name, values in batch.items() if name != "rollout_log_probs"}
    wide = drawn((40, 40))
    results(
        item(batch),
        item(batch, "grpo"),
        item(batch, dtype="float32"),
        item(without),
        item(batch, **{"return": ["ratio"]}),
        item(wide),  # with it, most of the batch would be padding
        item(flattened(batch)),  # this one goes with the first
    )
    assert sorted(batches) == [1, 1, 1, 1, 1, 2]


def test_large_items_stay_alone(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SMALL_CELLS", 29)
    results(*(item(batch) for batch in several()))
    assert sorted(batches) == [1, 2]


def test_a_merged_batch_is_bounded(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MERGED_CELLS", 40)
    results(*(item(drawn((5, 5))) for _ in range(6)))
    assert batches == [4, 2]


def test_who_fails_fails_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Unreadable, refused, raising at its own preparation, raising only when it is computed: the others are answered."""
    compute = merge.compute

    def failing(prepared: Sequence[Prepared]) -> Any:
        if any(one.item.seed == 13 for one in prepared):
            raise RuntimeError(f"the numbers are {prepared[0].log_probs.tolist()}")
        return compute(prepared)

    monkeypatch.setattr(merge, "compute", failing)
    broken = item(WORKED)
    broken[0]["objective"] = {**broken[0]["objective"], "ratio": {"kind": "nonsense"}}
    refused = item({**WORKED, "old_log_probs": [[math.nan] * 4, [-1.0] * 3]})
    whole = order(item(WORKED)).parcel
    orders = [
        order(item(WORKED), name="first"),
        Taken("torn", "default", Parcel(whole.head, whole.tensors[:50]), b""),
        order(broken, name="broken"),
        order(item(WORKED, seed=13), item(WORKED), name="raising"),
        order(refused, item(WORKED), name="refused"),
        order(item(WORKED), name="last"),
    ]
    with caplog.at_level(logging.ERROR):
        found = answers(*orders)
    assert [one.outcome for one in found] == ["ok", "unavailable", "unavailable", "unavailable", "ok", "ok"]
    assert {one.problem["code"] for one in found if one.problem} == {"loss_internal"}
    assert [entry["status"] for entry in found[4].data] == ["error", "ok"]
    assert found[0].data[0]["loss"] == found[4].data[1]["loss"] == found[5].data[0]["loss"] == result(WORKED)["loss"]
    assert all(name in caplog.text for name in ("torn", "broken", "raising", "RuntimeError"))
    assert "-1.8" not in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_answered(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prepared: Sequence[Prepared]) -> Any:
        raise error

    monkeypatch.setattr(merge, "compute", full)
    (answer,) = answers(order(item(WORKED)))
    assert answer.problem is not None
    assert answer.problem["code"] == "loss_out_of_memory" and answer.problem["retryable"]


def test_an_order_whose_time_is_over_is_not_computed(batches: list[int]) -> None:
    late = Order(**{**vars(Order.decode(order(item(WORKED)).parcel)), "deadline": 1.0}).encode()
    (answer,) = answers(Taken("loss_1", "default", late, b""))
    assert answer.outcome == "unavailable" and not batches


# ---------------------------------------------------------------- what is wrong with the content


def error_of(batch: dict[str, Any], objective: Any = "gspo", **options: Any) -> dict[str, Any]:
    (answer,) = answers(order(item(batch, objective, **options)))
    assert answer.outcome == "invalid" and not answer.tensors
    return answer.data[0]["error"]


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, math.nan, math.inf, 1e-30, 1 - 1e-6])
def test_a_mask_that_is_not_0_or_1(value: float) -> None:
    batch = drawn()
    batch["response_mask"][1, 2] = value
    error = error_of(batch)
    assert (error["code"], error["pointer"]) == ("mask_not_binary", "/items/0/batch/response_mask")
    assert "row 1, token 2" in error["detail"]
    batch = drawn()
    batch["truncated"][3] = value
    assert error_of(batch, "dapo")["pointer"] == "/items/0/batch/truncated"


@pytest.mark.parametrize("name", [*LOG_PROBS, "entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_where_they_count(name: str, value: float) -> None:
    batch = drawn()
    batch[name][1, 2] = value
    for sent in (batch, flattened(batch)):
        error = error_of(sent)
        assert (error["code"], error["pointer"]) == ("nonfinite", f"/items/0/batch/{name}")
        assert "row 1, token 2" in error["detail"] and "on_nonfinite" in error["detail"]
    batch[name][1] = torch.where(batch["response_mask"][1] == 0, value, -1.0)  # behind the mask anything is legal
    assert result(batch)["status"] == "ok"


@pytest.mark.parametrize("name", ["rewards", "advantages"])
def test_advantages_and_rewards_that_are_not_finite(name: str) -> None:
    batch = drawn((5, 3, 0, 4))
    if name == "advantages":
        batch["advantages"] = torch.ones(4, dtype=F64)
    batch[name][2] = math.nan  # of a row without tokens
    assert result(batch)["status"] == "ok"
    batch[name][1] = math.nan
    error = error_of(batch)
    assert (error["code"], error["pointer"]) == ("nonfinite", f"/items/0/batch/{name}")
    assert "rows 1;" in error["detail"]


@pytest.mark.parametrize("name", ["log_probs", "ref_log_probs", "rewards"])
@pytest.mark.parametrize(("preset", "flat"), [("grpo", False), ("grpo", True), ("dapo", False)])
def test_rows_that_are_not_finite_are_left_out_when_that_is_asked_for(name: str, preset: str, flat: bool) -> None:
    batch = drawn((5, 5, 5, 5, 5, 5)) | {"group_ids": torch.tensor([0, 0, 0, 1, 1, 1])}
    batch["rewards"][3:] = torch.tensor([1.0, 9.0, 1.0])  # without the row its group has no spread
    left = torch.arange(6) != 4
    alone = result({n: values[left] for n, values in batch.items()}, preset)
    batch[name][4] = math.nan
    found = result(flattened(batch) if flat else batch, preset, on_nonfinite="mask")
    assert found["nonfinite_rows"] == [4] and "1 of 6 rows" in " ".join(found["warnings"])
    assert found["loss"] == pytest.approx(alone["loss"], abs=1e-12)
    gradient = found["gradients/log_probs"].view(6, 5)
    assert_close(gradient[left], alone["gradients/log_probs"], rtol=1e-12, atol=1e-12)
    assert (gradient[4] == 0).all()
    assert {"nonfinite_rows", "warnings"}.isdisjoint(alone)


def test_singletons_are_refused_or_get_an_advantage_of_0() -> None:
    batch = drawn((5, 4, 3))
    batch["group_ids"] = torch.tensor([7, 9, 7])
    error = error_of(batch)
    assert (error["code"], error["pointer"]) == ("singleton_group", "/items/0/batch/group_ids")
    assert "row 1 is alone" in error["detail"]
    found = result(batch, on_singleton="zero")
    assert found["advantages"][1].tolist() == [0.0] * 5 and "row 1 is alone" in found["warnings"][0]
    assert result({**batch, "advantages": torch.ones(3, dtype=F64)})["status"] == "ok"  # then no baseline is needed
    assert result(batch, "ppo")["status"] == "ok"


def test_segment_ids() -> None:
    batch, objective = drawn(), {"preset": "gspo", "ratio": {"kind": "segment"}}
    expected = result(batch, objective)
    far_apart = batch | {"segment_ids": batch["segment_ids"] * 2**40 + torch.arange(6).unsqueeze(1)}
    assert_same(result(far_apart, objective), expected)
    batch["segment_ids"][3, 4] = -1  # behind the mask
    assert_same(result(batch, objective), expected)
    batch["segment_ids"][3, 0] = -1
    error = error_of(batch, objective)
    assert error["pointer"] == "/items/0/batch/segment_ids" and "row 3, token 0" in error["detail"]
    assert result(batch, "gspo")["status"] == "ok"


def test_positive_log_probs_are_computed_with_a_warning() -> None:
    batch = drawn()
    batch["old_log_probs"][0, 1] = 0.5
    batch["log_probs"][3, 4] = 0.5  # behind the mask
    found = result(batch)
    (warning,) = found["warnings"]
    assert warning.startswith("old_log_probs: a log-probability above 0, at row 0, token 1")
    assert_same(found, directly("gspo", batch))


def test_results_that_are_not_finite_are_said_to_be() -> None:
    huge = [[-1e308, -1e308], [-1.0]]
    found = result({"log_probs": huge}, "cross_entropy")
    assert found["loss"] == "Infinity" and found["nonfinite_rows"] == [0]
    assert "not finite" in " ".join(found["warnings"])
    assert found["gradients/log_probs"].tolist() == [-1.0, -1.0, -1.0]
    found = result({"log_probs": [[-1e308], [-1e308]]}, "cross_entropy")
    assert found["loss"] == "Infinity" and "nonfinite_rows" not in found and "not finite" in " ".join(found["warnings"])


def test_everything_wrong_is_said_at_once() -> None:
    batch = drawn()
    batch["log_probs"][0, 0], batch["response_mask"][0, 1], batch["group_ids"] = math.nan, 0.5, torch.arange(6)
    (answer,) = answers(order(item(batch)))
    codes = [error["code"] for error in answer.data[0]["errors"]]
    assert codes == ["mask_not_binary", "nonfinite", "singleton_group"]


def test_a_refused_item_leaves_the_others_unless_all_or_nothing_is_set() -> None:
    bad = item({**WORKED, "log_probs": [[math.nan] * 4, [-1.0] * 3]})
    refused_before = ({"error": {"code": "missing_tensor", "pointer": "/items/2", "detail": "no"}}, {})
    items = (item(WORKED), bad, refused_before)
    some, nothing = answers(order(*items), order(*items, name="loss_2", all_or_nothing=True))
    assert (some.outcome, nothing.outcome) == ("ok", "invalid")
    for answer in (some, nothing):
        assert [entry["status"] for entry in answer.data] == ["ok", "error", "error"]
        assert answer.data[2]["error"]["code"] == "missing_tensor"
    assert some.tensors and not nothing.tensors
    assert json.dumps(nothing.data, allow_nan=False)
