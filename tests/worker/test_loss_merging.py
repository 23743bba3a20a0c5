"""Items of several orders are computed together, and get what they would get alone."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loss_orders import WORKED, answers, assert_same, drawn, flattened, item, order, result, results
from service.relay.orders import Answer, Order, Parcel
from service.relay.queue import Taken
from service.spec.presets import PRESETS
from workers.losses import merge
from workers.losses.batch import viewed
from workers.losses.compute import Prepared
from workers.losses.serve import Round


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
