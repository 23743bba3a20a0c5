"""Loss requests: one model for JSON and for tensors, and every item refused or taken by itself."""

import json
import math
import struct
from array import array

import orjson
import pytest

from service.api.examples import LOSS_REQUEST
from service.edge.arrays import parse_arrays
from service.errors import BodyTooLarge, InvalidRequest, Malformed
from service.losses import numbers as numbers_of_json
from service.losses import request as requests
from service.losses import shapes
from service.losses.answers import as_json
from service.relay.orders import Answer, Order, answered, unavailable
from service.relay.tensors import BadTensors, Tensor, encode

NAN, INF = math.nan, math.inf
FORMATS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U8": "B", "BOOL": "?"}


def tensor(values, *shape, dtype="F32"):
    packed = struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)
    return Tensor(dtype, shape or (len(values),), memoryview(packed))


def numbers(tensor):
    return list(struct.unpack(f"<{len(tensor)}{FORMATS[tensor.dtype]}", tensor.data))


def item(**batch):
    """Two sequences of 2 and 3 tokens, under plain GSPO."""
    sound = {
        "log_probs": [[-1.0, -2.0], [-0.5, -1.5, -2.5]],
        "old_log_probs": [[-1.0, -2.0], [-0.5, -1.5, -2.5]],
        "advantages": [1.0, -1.0],
    }
    laid = {name: value for name, value in {**sound, **batch}.items() if value is not ...}
    return {"objective": "gspo", "batch": laid}


def flat(**batch):
    """The same as tensors."""
    sound = {
        "log_probs": tensor([-1.0, -2.0, -0.5, -1.5, -2.5]),
        "old_log_probs": tensor([-1.0, -2.0, -0.5, -1.5, -2.5]),
        "advantages": tensor([1.0, -1.0]),
        "cu_seqlens": tensor([0, 2, 5], dtype="I32"),
    }
    return {name: value for name, value in {**sound, **batch}.items() if value is not ...}


def padded(**batch):
    sound = {
        "log_probs": tensor([-1.0, -2.0, NAN, -0.5, -1.5, -2.5], 2, 3),
        "old_log_probs": tensor([-1.0, -2.0, NAN, -0.5, -1.5, -2.5], 2, 3),
        "response_mask": tensor([1, 1, 0, 1, 1, 1], 2, 3, dtype="U8"),
        "advantages": tensor([1.0, -1.0]),
    }
    return {name: value for name, value in {**sound, **batch}.items() if value is not ...}


def check(*items, **more):
    return requests.check({"items": list(items), **more})


def check_tensors(batch, objective="gspo", **more):
    tensors = {f"0/{name}": value for name, value in batch.items()}
    return requests.check({"items": [{"objective": objective, **more}]}, tensors)


def errors(checked):
    """What is wrong with the only item."""
    (entry,) = checked.items
    assert entry["status"] == "error", entry
    said = entry.get("errors", [entry["error"]])
    assert said[0] == entry["error"]
    assert len(said) == 1 or len(entry["errors"]) > 1
    assert not checked.tensors
    assert [error.pointer for error in checked.errors] == [one["pointer"] for one in said]
    return [(one["pointer"].removeprefix("/items/0"), one["code"], one["detail"]) for one in said]


def error(checked):
    (one,) = errors(checked)
    return one


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
        ({"objective": "gpso"}, "/objective/preset", "invalid", "did you mean 'gspo'?"),
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


# ---------------------------------------------------------------- numbers and shapes of JSON


@pytest.mark.parametrize(
    ("batch", "pointer", "code", "says"),
    [
        ({"log_probs": 3}, "/log_probs", "invalid", "must be an array, got 3"),
        ({"log_probs": [-1.0, -2.0]}, "/log_probs/0", "invalid", "must be an array: one for a sequence, got -1.0"),
        ({"old_log_probs": [[-1, -2], [-1, "x", -1]]}, "/old_log_probs/1/1", "invalid", "must be a number, got 'x'"),
        ({"old_log_probs": [[-1, -2], [-1, True, -1]]}, "/old_log_probs/1/1", "invalid", "must be a number, got true"),
        ({"old_log_probs": [[-1, -2], [-1, [2], -1]]}, "/old_log_probs/1/1", "invalid", "got an array of 1 item"),
        ({"old_log_probs": [[-1, -2], [-1, {}, -1]]}, "/old_log_probs/1/1", "invalid", "got an object with 0 keys"),
        ({"old_log_probs": [[-1, -2], [-1, "nan", -1]]}, "/old_log_probs/1/1", "invalid", "must be a number, got 'nan'"),
        ({"old_log_probs": [[-1, -2], [-1, 10**400, -1]]}, "/old_log_probs/1/1", "invalid", "below 1.8e308"),
        ({"old_log_probs": [[-1, -2], [-1, -2]]}, "/old_log_probs/1", "shape_mismatch", "has 2 tokens, log_probs has 3"),
        ({"old_log_probs": [[-1, -2]]}, "/old_log_probs", "shape_mismatch", "has 1 sequences, log_probs has 2"),
        ({"response_mask": [[1, 1], [1, 1]]}, "/response_mask/1", "shape_mismatch", "has 2 tokens"),
        ({"response_mask": [[1, 1], [1, "1", 1]]}, "/response_mask/1/1", "invalid", "got '1'"),
        ({"segment_ids": [[0, 0], [0, 1.0, 1]]}, "/segment_ids/1/1", "invalid", "an integer of 64 bits, got 1.0"),
        ({"segment_ids": [[0, 0], [0, 2**63, 1]]}, "/segment_ids/1/1", "invalid", "an integer of 64 bits"),
        ({"segment_ids": [[0, 0], [0, True, 1]]}, "/segment_ids/1/1", "invalid", "an integer, got true"),
        ({"advantages": [1.0]}, "/advantages", "shape_mismatch", "has 1 values; there are 2 sequences"),
        ({"advantages": [1.0, [1.0]]}, "/advantages/1", "invalid", "must be a number, got an array of 1 item"),
        ({"advantages": [[1.0, 2.0], [1.0]]}, "/advantages/1", "shape_mismatch", "has 1 tokens, log_probs has 3"),
        (
            {"rewards": [1.0, 2.0, 3.0]},
            "/rewards",
            "shape_mismatch",
            "has the shape [3]; one value a sequence is [2] or",
        ),
        ({"rewards": [[1.0, 2.0], [3.0]]}, "/rewards/1", "shape_mismatch", "has 1 rewards, the sequences before have 2"),
        ({"rewards": [[], []]}, "/rewards", "shape_mismatch", "has the shape [2, 0]"),
        ({"reward_weights": [1.0]}, "/reward_weights", "missing_tensor", "no rewards"),
        ({"rewards": [1, 2], "reward_weights": [1, 2]}, "/reward_weights", "shape_mismatch", "one weight a reward is [1]"),
        ({"group_ids": [1, 2.5]}, "/group_ids/1", "invalid", "an integer or a string, got 2.5"),
        ({"group_ids": [1, True]}, "/group_ids/1", "invalid", "an integer or a string, got true"),
        ({"group_ids": ["a"]}, "/group_ids", "shape_mismatch", "has the shape [1]; one value a sequence is [2]"),
        ({"truncated": [0, "no"]}, "/truncated/1", "invalid", "must be a number, got 'no'"),
        ({"cu_seqlens": [0, 2, 5]}, "/cu_seqlens", "unknown_key", "in JSON write an array for each sequence"),
        ({"logprobs": [[]]}, "/logprobs", "unknown_key", "did you mean 'log_probs'?"),
    ],
)
def test_batches_of_json_that_cannot_be(batch, pointer, code, says):
    found = error(check(item(**batch)))
    assert found[:2] == (f"/batch{pointer}", code)
    assert says in found[2]


def test_all_that_is_wrong_with_an_item_is_said_at_once():
    found = errors(check(item(log_probs=[[1, "x"]], group_ids=[None], old_log_probs=...)))
    assert [one[0] for one in found] == ["/batch/log_probs/0/1", "/batch/group_ids/0", "/batch/old_log_probs"]


def test_it_cannot_be_told_whether_one_advantage_is_meant_for_a_token_or_a_sequence():
    rows = {"log_probs": [[], [-1.0, -2.0]], "old_log_probs": [[], [-1.0, -2.0]]}
    assert "some sequences are empty" in error(check(item(**rows, advantages=[[], [1.0, 2.0]])))[2]
    assert check(item(**rows, advantages=[1.0, 2.0])).items[0]["layout"] == "ragged"  # one a sequence, as it stands there


# ---------------------------------------------------------------- shapes of tensors


@pytest.mark.parametrize(
    ("batch", "pointer", "code", "says"),
    [
        (flat(cu_seqlens=...), "/cu_seqlens", "missing_tensor", "because log_probs is flat"),
        (flat(cu_seqlens=tensor([], dtype="I64")), "/cu_seqlens", "shape_mismatch", "it is [B + 1]"),
        (flat(cu_seqlens=tensor([0, 2, 5, 5], 2, 2, dtype="I64")), "/cu_seqlens", "shape_mismatch", "it is [B + 1]"),
        (flat(cu_seqlens=tensor([0, 2, 5])), "/cu_seqlens", "dtype_not_taken", "has the dtype F32; taken are I64, I32"),
        (flat(cu_seqlens=tensor([1, 2, 5], dtype="I64")), "/cu_seqlens/0", "shape_mismatch", "must be 0, got 1"),
        (flat(cu_seqlens=tensor([0, 5, 2], dtype="I64")), "/cu_seqlens/2", "shape_mismatch", "is 2, less than 5"),
        (flat(cu_seqlens=tensor([0, 2, 4], dtype="I64")), "/cu_seqlens/2", "shape_mismatch", "must be 5"),
        (flat(cu_seqlens=tensor([0, 2, 2**62], dtype="I64")), "/cu_seqlens/2", "shape_mismatch", "must be 5"),
        (flat(cu_seqlens=tensor([-(2**63), 2**63 - 1, 5], dtype="I64")), "/cu_seqlens/2", "shape_mismatch", "never fall"),
        (flat(cu_seqlens=tensor([0, -2, 5], dtype="I64")), "/cu_seqlens/1", "shape_mismatch", "it may never fall"),
        (flat(old_log_probs=tensor([-1.0] * 4)), "/old_log_probs", "shape_mismatch", "has the shape [4], log_probs has [5]"),
        (flat(old_log_probs=tensor([-1.0] * 5, 1, 5)), "/old_log_probs", "shape_mismatch", "has the shape [1, 5]"),
        (flat(advantages=tensor([1.0] * 3)), "/advantages", "shape_mismatch", "it is [2], one a sequence, or [5]"),
        (flat(advantages=tensor([1.0] * 2, 2, 1)), "/advantages", "shape_mismatch", "has the shape [2, 1]"),
        (flat(log_probs=tensor([1.0], 1, 1, 1)), "/log_probs", "shape_mismatch", "or padded [B, T]"),
        (padded(cu_seqlens=tensor([0, 3], dtype="I64")), "/cu_seqlens", "unknown_key", "goes with flat tensors"),
        (padded(response_mask=tensor([1, 1], dtype="U8")), "/response_mask", "shape_mismatch", "has the shape [2]"),
        (padded(response_mask=tensor([1] * 6, 3, 2, dtype="U8")), "/response_mask", "shape_mismatch", "log_probs has [2, 3]"),
        (padded(advantages=tensor([1.0] * 3)), "/advantages", "shape_mismatch", "it is [2], one a sequence, or [2, 3]"),
        (padded(rewards=tensor([1.0] * 3)), "/rewards", "shape_mismatch", "[2] or [2, R]"),
        (padded(group_ids=tensor([1.0, 2.0])), "/group_ids", "dtype_not_taken", "taken are I64, I32"),
        (padded(rewards=tensor([1, 2], dtype="I64")), "/rewards", "dtype_not_taken", "taken are F64, F32, BF16"),
        (padded(logprobs=tensor([1.0])), "/logprobs", "unknown_key", "did you mean 'log_probs'?"),
    ],
)
def test_batches_of_tensors_that_cannot_be(batch, pointer, code, says):
    found = error(check_tensors(batch))
    assert found[:2] == (f"/batch{pointer}", code)
    assert says in found[2]


def test_half_precision_is_refused_by_name():
    half = Tensor("F16", (5,), memoryview(bytes(10)))
    assert error(check_tensors(flat(log_probs=half)))[2] == "has the dtype F16; taken are F64, F32, BF16"


def test_tensors_whose_advantages_could_mean_two_things_are_refused():
    two = tensor([-1.0, -2.0])
    batch = flat(log_probs=two, old_log_probs=two, cu_seqlens=tensor([0, 0, 2], dtype="I64"), advantages=tensor([1.0, 2.0]))
    assert "some sequences are empty" in error(check_tensors(batch))[2]
    assert check_tensors({**batch, "cu_seqlens": tensor([0, 1, 2], dtype="I64")}).items[0]["layout"] == "ragged"


def test_a_batch_that_would_fill_the_worker_s_memory_is_refused():
    rows, longest = 4, shapes.MAX_CELLS // 4
    ends = [0, *[longest - 1] * (rows - 1), longest - 1 + 2]  # almost all of it is one long row, and three empty ones
    some = Tensor("F32", (longest + 1,), memoryview(bytes(4 * (longest + 1))))
    batch = flat(log_probs=some, old_log_probs=some, advantages=tensor([1.0] * rows), cu_seqlens=tensor(ends, dtype="I64"))
    assert check_tensors(batch).items[0]["layout"] == "ragged"
    ends[1:-1] = [0] * (rows - 1)
    batch["cu_seqlens"] = tensor(ends, dtype="I64")
    pointer, code, says = error(check_tensors(batch))
    assert (pointer, code) == ("/batch/log_probs", "too_large")
    assert "split the batch" in says


def test_sequences_that_hold_nothing_are_counted_too():
    ends = Tensor("I32", (shapes.MAX_SEQUENCES + 1,), memoryview(bytes(4 * (shapes.MAX_SEQUENCES + 1))))
    assert error(check_tensors({"log_probs": tensor([]), "cu_seqlens": ends}, "cross_entropy"))[1] == "too_large"
    assert error(check_tensors({"log_probs": tensor([], 2**30, 0)}, "cross_entropy"))[:2] == ("/batch/log_probs", "too_large")


# ---------------------------------------------------------------- which tensor belongs to which item


@pytest.mark.parametrize(
    "name", ["log_probs", "1/log_probs", "00/log_probs", "-1/log_probs", "/log_probs", "0/", "x/y", "", "0"]
)
def test_a_tensor_of_no_item_is_refused(name):
    with pytest.raises(InvalidRequest) as caught:
        requests.check({"items": [item()]}, {name: tensor([1.0])})
    assert caught.value.errors[0].code == "unknown_tensor"


def test_the_header_must_hold_the_request():
    with pytest.raises(InvalidRequest, match="must hold `request`"):
        requests.decoded(encode({}, {"requests": "{}"}))


def test_a_header_that_lies_is_refused_where_the_tensor_would_stand():
    raw = bytearray(encode({"3/log_probs": tensor([1.0, 2.0])}, {"request": "{}"}))
    at = raw.index(b'"shape":[2]')
    raw[at : at + 11] = b'"shape":[3]'
    with pytest.raises(BadTensors) as caught:
        requests.decoded(bytes(raw))
    (wrong,) = caught.value.errors
    assert (wrong.pointer, wrong.code) == ("/items/3/batch/log_probs", "malformed_safetensors")


def test_a_batch_beside_the_tensors_is_refused():
    found = error(requests.check({"items": [item()]}, {f"0/{name}": one for name, one in flat().items()}))
    assert found[:2] == ("/batch", "unknown_key")


# ---------------------------------------------------------------- what the objective needs


def missing(objective, **batch):
    entry = check({"objective": objective, "batch": batch}).items[0]
    if "error" not in entry:
        return []
    said = entry.get("errors", [entry["error"]])
    assert {one["code"] for one in said} == {"missing_tensor"}, said
    return [one["pointer"].removeprefix("/items/0/batch/") for one in said]


ROWS = [[-1.0, -2.0], [-1.0]]


def test_missing_tensors_are_named():
    assert missing("gspo", log_probs=ROWS) == ["old_log_probs", "advantages"]
    assert missing("grpo", log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["ref_log_probs"]
    assert missing("dppo", log_probs=ROWS, advantages=[1, 2]) == ["rollout_log_probs"]
    assert missing({"preset": "gspo", "ratio": "segment"}, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == [
        "segment_ids"
    ]
    assert missing(
        {"preset": "gspo", "correct": {"action": "truncate"}}, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]
    ) == ["rollout_log_probs"]
    top = {"preset": "gspo", "select": {"top_entropy": 0.2}}
    assert missing(top, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["entropy"]
    assert missing(top, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2], weights=ROWS) == []


def test_what_a_missing_tensor_is_for_is_said():
    entry = check({"objective": "grpo", "batch": {"log_probs": ROWS, "advantages": [1, 2]}}).items[0]
    assert [one["detail"] for one in entry["errors"]] == [
        "is missing: anchor old: the ratio's denominator",
        "is missing: kl.place loss compares with it (kl: none switches that off)",
    ]


def test_a_key_of_another_surrogate_is_said_to_be_its():
    entry = check({"objective": {"preset": "grpo", "surrogate": {"weight_max": 5}}, "batch": {"log_probs": ROWS}}).items[0]
    assert "belongs to /objective/surrogate/weight_max of kind cispo" in entry["error"]["detail"]


def test_advantages_may_be_made_of_rewards():
    assert missing("gspo", log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0]) == ["group_ids"]
    assert missing("gspo", log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0], group_ids=[0, 0]) == []
    whole = {"preset": "gspo", "advantage": {"centre": "none", "scale": "batch_std"}}
    assert missing(whole, log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0]) == []
    # A KL in the reward acts where rewards are, and nowhere else.
    assert missing("rloo", log_probs=ROWS, advantages=[1, 2]) == []
    assert missing("rloo", log_probs=ROWS, rewards=[1, 0], group_ids=[0, 0]) == ["old_log_probs", "ref_log_probs"]


def test_plain_cross_entropy_needs_log_probs_alone():
    assert missing("cross_entropy", log_probs=ROWS) == []
    assert missing("rloo", log_probs=ROWS) == ["advantages"]


def test_means_over_groups_need_groups():
    prompt = {"preset": "gspo", "aggregate": "prompt"}
    assert missing(prompt, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["group_ids"]
    assert missing(prompt, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2], weights=ROWS) == []


def test_a_selection_without_its_facts_is_switched_off_with_a_warning():
    entry = check({**item(), "objective": "dapo"}).items[0]
    assert entry["objective"]["select"] == {"truncated": False, "zero_variance": False, "top_entropy": None}
    assert [text.split()[0] for text in entry["warnings"]] == ["select.truncated", "select.zero_variance"]
    facts = {"truncated": [0, 1], "rewards": [1, 0], "group_ids": [0, 0]}
    entry = check({**item(**facts), "objective": "dapo"}).items[0]
    assert entry["objective"]["select"] == {"truncated": True, "zero_variance": True, "top_entropy": None}
    assert entry["warnings"] == []
    entry = check({**item(**facts, weights=[[1, 1], [1, 1, 1]]), "objective": "dapo"}).items[0]
    assert not any(entry["objective"]["select"].values())  # the weights are those of a step that was selected already


def test_what_is_legal_and_not_meant_is_said_in_the_answer():
    wide = {**item(), "objective": {"preset": "gspo", "surrogate": {"clip_low": 0.2, "clip_high": 0.2}}}
    assert any("hardly ever acts" in text for text in check(wide).items[0]["warnings"])


def test_a_divisor_that_depends_on_the_batch_and_a_kl_without_effect_are_warned_of():
    batch = {"log_probs": ROWS, "old_log_probs": ROWS, "advantages": [1, 2]}
    (text,) = check({"objective": "dr_grpo", "batch": batch}).items[0]["warnings"]
    assert "aggregate.constant" in text
    fixed = {"preset": "dr_grpo", "aggregate": {"constant": 1024}}
    assert check({"objective": fixed, "batch": batch}).items[0]["warnings"] == []
    assert check({"objective": "dr_grpo", "batch": batch | {"weights": ROWS}}).items[0]["warnings"] == []
    (text,) = check({"objective": "ppo", "batch": batch}).items[0]["warnings"]
    assert "kl.place reward changes nothing here" in text
    assert check({"objective": {"preset": "ppo", "kl": "none"}, "batch": batch}).items[0]["warnings"] == []


# ---------------------------------------------------------------- long JSON


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[[], [[]], {}]",
        '{"a": [1, 2.5, -3e2, 1E3], "b": [[1], [2, 3]], "c": [true, null, "x]y["], "d": {"e": [[[0]]]}}',
        " [ 1 , [ 2 , { } ] ] ",
        "[NaN, Infinity, -Infinity, 1]",
        "[1e999, -1e999, 123456789012345678901234567890]",
        '"text"',
        "12",
    ],
)
def test_long_json_is_read_as_the_standard_library_does(text):
    assert str(parse_arrays(text.encode())) == str(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        *("[1,,2]", "[1", "[", "[[1]", "[1 2]", "[1,]", "[01]", "[nan]", "[1]]"),
        *('{"a": [1}', '["a', "[+1]", "[.5]", "[1.]", "[,]", "{1: 2}"),
    ],
)
def test_what_is_not_json_is_refused_where_it_goes_wrong(text):
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    with pytest.raises(Malformed) as ours:
        parse_arrays(text.encode())
    assert ours.value.extra == {"line": theirs.value.lineno, "column": theirs.value.colno}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty_body"),
        (b"\xff", "malformed_body"),
        (b"[" * 100_000, "too_deep"),
        (b'{"a":' * 100_000, "too_deep"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'["\\ud800"]', "not_storable"),
        (b'{"\\udfff": 1}', "not_storable"),
        (b"[" + b"1" * 5000 + b", NaN]", "malformed_body"),
    ],
)
def test_json_that_nobody_should_send(raw, code):
    with pytest.raises(Malformed) as caught:
        parse_arrays(raw)
    assert caught.value.code == code


def test_few_bytes_cannot_fill_the_memory(monkeypatch):
    monkeypatch.setattr("service.edge.arrays.MAX_PARTS", 1000)
    for small in (b"[],", b"{},", b'"a",'):
        with pytest.raises(BodyTooLarge, match=r"application/vnd\.safetensors"):
            parse_arrays(b"[" + small * 1000 + b"0]")


# ---------------------------------------------------------------- orders and answers


def test_an_order_is_read_as_it_was_written():
    checked = requests.check(LOSS_REQUEST)
    order = Order("loss_1", "team", 12.5, False, checked.items, checked.tensors)
    again = Order.decode(order.encode())
    assert (again.id, again.project, again.deadline, again.all_or_nothing) == ("loss_1", "team", 12.5, False)
    assert again.items == order.items
    assert {name: numbers(one) for name, one in again.tensors.items()} == {
        name: numbers(one) for name, one in order.tensors.items()
    }


def test_an_answer_in_json_has_the_rows_that_were_sent():
    data = [
        {"index": 0, "status": "ok", "loss": 0.5, "metrics": {"policy/loss": 0.5}},
        {"index": 1, "status": "error", "error": {"code": "x", "pointer": "/items/1", "detail": "y"}},
        {"index": 2, "status": "ok", "loss": 1.5, "metrics": {}},
    ]
    tensors = {
        "0/gradients/log_probs": tensor([1.0, NAN, INF, -INF, 0.25], dtype="F64"),
        "0/clipped": tensor([True, False, False, True, True], dtype="BOOL"),
        "0/cu_seqlens": tensor([0, 2, 2, 5], dtype="I64"),
        "2/ratio": tensor([1.0, 2.0, 3.0, 1e308], 2, 2, dtype="F64"),
        "2/token_loss": tensor([1e308, 1e308, -1e308, 0.5], 2, 2, dtype="F64"),
    }
    answer = Answer.decode(answered("ok", data, tensors))
    assert answer.outcome == "ok"
    assert orjson.loads(as_json(answer)) == {
        "object": "list",
        "data": [
            {
                **data[0],
                "gradients": {"log_probs": [[1.0, "NaN"], [], ["Infinity", "-Infinity", 0.25]]},
                "clipped": [[True, False], [], [False, True, True]],
            },
            data[1],
            {**data[2], "ratio": [[1.0, 2.0], [3.0, 1e308]], "token_loss": [[1e308, 1e308], [-1e308, 0.5]]},
        ],
    }


def test_an_answer_of_an_empty_batch_has_no_rows():
    data = [{"index": 0, "status": "ok", "loss": 0.0, "metrics": {}}]
    tensors = {"0/ratio": tensor([], dtype="F32"), "0/cu_seqlens": tensor([0], dtype="I64")}
    assert orjson.loads(as_json(Answer.decode(answered("ok", data, tensors))))["data"][0]["ratio"] == []
    tensors = {"0/ratio": tensor([], 2, 0, dtype="F32")}
    assert orjson.loads(as_json(Answer.decode(answered("ok", data, tensors))))["data"][0]["ratio"] == [[], []]


def test_an_answer_that_did_not_come_says_why():
    answer = Answer.decode(unavailable("loss_worker_died", "it died"))
    assert answer.outcome == "unavailable"
    assert answer.problem == {"code": "loss_worker_died", "detail": "it died", "retryable": True}


def test_arrays_are_taken_without_a_copy():
    values = array("d", [1.0, 2.0])
    one = numbers_of_json.tensor(values)
    values[0] = 7.0
    assert numbers(one) == [7.0, 2.0]
