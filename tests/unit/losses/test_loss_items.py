"""Loss requests: one model for JSON and for tensors, and every item refused or taken by itself."""

import json
import math

import pytest

from loss_batches import INF, NAN, check, check_tensors, error, flat, item, numbers, padded, tensor
from service.api.examples import LOSS_REQUEST
from service.errors import InvalidRequest
from service.losses import request as requests
from service.relay.tensors import Tensor, encode

# ---------------------------------------------------------------- what is sound


def test_the_example_becomes_flat_tensors():
    checked = requests.check(LOSS_REQUEST)
    (entry,) = checked.items
    assert (entry["index"], entry["dtype"], entry["layout"], entry["seed"]) == (0, "float64", "ragged", 0)
    assert entry["return"] == LOSS_REQUEST["items"][0]["return"]
    assert (entry["on_nonfinite"], entry["on_singleton"], entry["warnings"]) == ("refuse", "refuse", [])
    assert entry["objective"]["surrogate"]["clip_high"] == 4e-4
    assert entry["objective"]["ratio"] == {"kind": "sequence"}
    assert {name: (one.dtype, numbers(one)) for name, one in checked.tensors.items()} == {
        "0/log_probs": ("F64", [-2.0, -1.8, -1.5, -1.2, -1.9, -1.6, -1.3]),
        "0/old_log_probs": ("F64", [-2.2, -2.0, -1.6, -1.3, -2.1, -1.8, -1.5]),
        "0/advantages": ("F64", [1.0, -1.0]),
        "0/cu_seqlens": ("I64", [0, 4, 7]),
    }
    assert not checked.is_hopeless


def test_json_and_tensors_make_the_same_order():
    in_json = check(item(group_ids=[3, 4], truncated=[0, 1], response_mask=[[1, 1], [0, True, 1]]), dtype="float32")
    sent = flat(
        group_ids=tensor([3, 4], dtype="I64"),
        truncated=tensor([0, 1], dtype="BOOL"),
        response_mask=tensor([1, 1, 0, 1, 1], dtype="I32"),
    )
    in_tensors = check_tensors(sent)
    assert in_json.items == in_tensors.items
    assert {name: numbers(one) for name, one in in_json.tensors.items()} == {
        name: numbers(one) for name, one in in_tensors.tensors.items()
    }
    assert in_json.tensors["0/log_probs"].dtype == "F32"


def test_the_data_of_tensors_is_never_copied():
    raw = encode({f"0/{name}": one for name, one in flat().items()}, {"request": '{"items": [{"objective": "gspo"}]}'})
    tensors, text = requests.decoded(raw)
    checked = requests.check(json.loads(text), tensors)
    assert checked.tensors["0/log_probs"].data.obj is raw
    assert checked.tensors["0/cu_seqlens"].dtype == "I64"  # of int32


@pytest.mark.parametrize(
    ("sent", "dtype", "computed"),
    [
        ("F64", None, "float64"),
        ("F32", None, "float32"),
        ("BF16", None, "float32"),
        ("F32", "float64", "float64"),
        ("BF16", "bfloat16", "bfloat16"),
    ],
)
def test_tensors_are_computed_in_the_type_of_log_probs_unless_another_is_asked_for(sent, dtype, computed):
    size = {"F64": 8, "F32": 4, "BF16": 2}[sent]
    log_probs = Tensor(sent, (5,), memoryview(bytes(5 * size)))
    request = {"items": [{"objective": "gspo"}]} | ({"dtype": dtype} if dtype else {})
    batch = flat(log_probs=log_probs)
    checked = requests.check(request, {f"0/{name}": one for name, one in batch.items()})
    assert checked.items[0]["dtype"] == computed


def test_numbers_that_are_not_finite_may_be_written_in_five_ways():
    checked = check(item(log_probs=[[NAN, None], ["NaN", "Infinity", "-Infinity"]]))
    found = numbers(checked.tensors["0/log_probs"])
    assert [math.isnan(one) for one in found[:3]] == [True] * 3
    assert found[3:] == [INF, -INF]


def test_integers_are_numbers_and_large_ones_too():
    checked = check(item(log_probs=[[-1, -2], [0, -(10**20), -0.5]]))
    assert numbers(checked.tensors["0/log_probs"]) == [-1, -2, 0, -1e20, -0.5]


def test_groups_may_have_names():
    batch = {"rewards": [1, 0], "advantages": ...}
    assert numbers(check(item(**batch, group_ids=["b", "a"])).tensors["0/group_ids"]) == [0, 1]
    assert numbers(check(item(**batch, group_ids=["b", 7])).tensors["0/group_ids"]) == [0, 1]
    assert numbers(check(item(**batch, group_ids=[7, 7])).tensors["0/group_ids"]) == [7, 7]
    assert numbers(check(item(**batch, group_ids=[2**70, 7])).tensors["0/group_ids"]) == [0, 1]


def test_an_empty_batch_and_empty_sequences_are_sound():
    empty = check(item(log_probs=[], old_log_probs=[], advantages=[]))
    assert numbers(empty.tensors["0/cu_seqlens"]) == [0]
    assert len(empty.tensors["0/log_probs"]) == 0
    hollow = check(item(log_probs=[[], [-1.0]], old_log_probs=[[], [-1.0]]))
    assert numbers(hollow.tensors["0/cu_seqlens"]) == [0, 0, 1]
    none = flat(log_probs=tensor([]), old_log_probs=tensor([]), advantages=tensor([]), cu_seqlens=tensor([0], dtype="I64"))
    assert check_tensors(none).items[0]["layout"] == "ragged"


def test_options_of_an_item_stand_before_those_of_the_request():
    checked = check({**item(), "on_nonfinite": "refuse", "seed": 7}, item(), on_nonfinite="mask")
    assert [one["on_nonfinite"] for one in checked.items] == ["refuse", "mask"]
    assert [one["seed"] for one in checked.items] == [7, 0]


def test_a_padded_batch_without_a_mask_is_computed_with_a_warning():
    assert check_tensors(padded()).items[0]["warnings"] == []
    (warning,) = check_tensors(padded(response_mask=...)).items[0]["warnings"]
    assert "no response_mask" in warning


# ---------------------------------------------------------------- one item among others


def test_what_is_wrong_with_one_item_says_nothing_of_the_others():
    checked = check(item(), item(log_probs="text"), item())
    assert [one.get("status", "sound") for one in checked.items] == ["sound", "error", "sound"]
    assert {name[0] for name in checked.tensors} == {"0", "2"}
    assert not checked.is_hopeless


def test_with_all_or_nothing_nothing_is_computed_beside_an_error():
    checked = check(item(), item(log_probs=3), all_or_nothing=True)
    assert checked.is_hopeless
    first, second = requests.withheld(checked.items)
    assert first["error"]["code"] == "all_or_nothing"
    assert second["error"]["pointer"] == "/items/1/batch/log_probs"
    assert [one.pointer for one in checked.errors] == ["/items/1/batch/log_probs"]


def test_nothing_but_errors_is_hopeless():
    assert check(item(log_probs=3)).is_hopeless


@pytest.mark.parametrize(
    ("sent", "pointer", "says"),
    [
        ([], "", "must be an object"),
        ({}, "/items", "is required"),
        ({"items": []}, "/items", "must be at least 1 long"),
        ({"items": [item()] * 1025}, "/items", "must be at most 1024 long"),
        ({"items": {}}, "/items", "must be an array"),
        ({"items": [item()], "dtype": "float16"}, "/dtype", "one of float64, float32, bfloat16"),
        ({"items": [item()], "all_or_nothin": True}, "/all_or_nothin", "did you mean 'all_or_nothing'?"),
        ({"items": [item()], "all_or_nothing": "maybe"}, "/all_or_nothing", "true or false"),
    ],
)
def test_an_envelope_that_cannot_be_read_is_refused_whole(sent, pointer, says):
    with pytest.raises(InvalidRequest) as caught:
        requests.check(sent)
    assert caught.value.errors[0].pointer == pointer
    assert says in caught.value.errors[0].detail


# ---------------------------------------------------------------- fields of an item


@pytest.mark.parametrize(
    ("change", "pointer", "code", "says"),
    [
        ({"objective": "gpso"}, "/objective/preset", "unknown_value", "did you mean 'gspo'?"),
        ({"objective": {"preset": "gspo", "surrogate": {"clip_low": 1.5}}}, "/objective/surrogate/clip_low", "invalid", "1.5"),
        ({"objective": {"preset": "gspo", "agregate": "token"}}, "/objective/agregate", "unknown_key", "'aggregate'"),
        ({"objective": ...}, "/objective", "missing", "is required"),
        ({"batch": ...}, "/batch", "missing", "is required"),
        ({"batch": {}}, "/batch/log_probs", "missing", "is required"),
        ({"return": ["gradient"]}, "/return/0", "unknown_value", "did you mean 'gradients'?"),
        ({"return": "gradients"}, "/return", "invalid", "must be an array"),
        ({"on_nonfinite": "drop"}, "/on_nonfinite", "unknown_value", "refuse, mask"),
        ({"on_singleton": None}, "/on_singleton", "unknown_value", "refuse, zero"),
        ({"seed": -1}, "/seed", "invalid", "at least 0"),
        ({"weight": 1}, "/weight", "unknown_key", "unknown key 'weight'"),
    ],
)
def test_wrong_fields_are_refused_where_they_stand(change, pointer, code, says):
    sent = {name: value for name, value in {**item(), **change}.items() if value is not ...}
    found = error(check(sent))
    assert found[:2] == (pointer, code)
    assert says in found[2]


def test_an_item_that_is_no_object_is_refused():
    assert error(check(7)) == ("", "invalid", "must be an object, got 7")
