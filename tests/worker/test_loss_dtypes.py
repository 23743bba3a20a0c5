"""Any dtype and any shape of the tensors of an order."""

import json

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loss_orders import F64, WORKED, answers, assert_same, drawn, item, order, result, results
from service.relay.orders import Order, Parcel
from service.relay.queue import Taken
from service.relay.tensors import Tensor as RawTensor
from service.relay.tensors import encode


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
