"""Numbers and shapes of a batch, in JSON and in tensors."""

import pytest

from loss_batches import check, check_tensors, error, errors, flat, item, padded, tensor
from service.errors import InvalidRequest
from service.losses import request as requests
from service.losses import shapes
from service.relay.tensors import BadTensors, Tensor, encode

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
        ({"advantages": [1.0]}, "/advantages", "shape_mismatch", "has 1 value for 2 sequences"),
        ({"advantages": [1.0, [1.0]]}, "/advantages/1", "invalid", "must be a number, got an array of 1 item"),
        ({"advantages": [[1.0, 2.0], [1.0]]}, "/advantages/1", "shape_mismatch", "has 1 token, log_probs has 3"),
        (
            {"rewards": [1.0, 2.0, 3.0]},
            "/rewards",
            "shape_mismatch",
            "has the shape [3]; one value a sequence is [2] or",
        ),
        ({"rewards": [[1.0, 2.0], [3.0]]}, "/rewards/1", "shape_mismatch", "has 1 reward, the sequences before have 2"),
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
