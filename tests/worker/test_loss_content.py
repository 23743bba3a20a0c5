"""What is wrong with the numbers of an item, or probably not meant."""

import json
import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loss_orders import F64, LOG_PROBS, WORKED, answers, assert_same, directly, drawn, flattened, item, order, result


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
