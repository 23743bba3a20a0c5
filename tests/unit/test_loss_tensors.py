"""The reader of safetensors that trusts nothing, held against the library it takes the place of."""

import json
import os
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load as load_numpy
from safetensors.numpy import save as save_numpy

from service.relay.tensors import ITEM_BYTES, MAX_HEADER_BYTES, BadTensors, Tensor, decode, encode

EXAMPLES = os.environ.get("RATCHET_TEST_FUZZ_EXAMPLES")  # for long runs, each with other examples
fuzz = settings(
    max_examples=int(EXAMPLES or 300),
    derandomize=EXAMPLES is None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def file(header, data=b"", *, length=None, pad=b""):
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + pad) if length is None else length) + text + pad + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def refused(raw):
    with pytest.raises(BadTensors) as caught:
        decode(raw)
    assert caught.value.code == "malformed_safetensors"
    return caught.value


# ---------------------------------------------------------------- what is sound


def test_what_the_library_writes_is_read_without_a_copy():
    arrays = {
        "0/log_probs": np.array([[-1.5, -2.0], [0.25, -np.inf]], dtype=np.float32),
        "0/group_ids": np.arange(3, dtype=np.int64),
        "0/response_mask": np.array([[True, False]]),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    raw = save_numpy(arrays, metadata={"request": '{"items": []}', "ä": "ö"})
    tensors, metadata = decode(raw)
    assert metadata == {"request": '{"items": []}', "ä": "ö"}
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        assert len(tensors[name]) == array.size
        assert bytes(tensors[name].data) == array.tobytes()
        assert tensors[name].data.obj is raw


def test_what_is_written_the_library_reads():
    tensors = {
        "flags": Tensor("BOOL", (3,), memoryview(b"\1\0\1")),
        "numbers": Tensor("F64", (1, 2), memoryview(struct.pack("<2d", 1.5, -2.0))),
        "nothing": Tensor("I64", (0,), memoryview(b"")),
    }
    raw = encode(tensors, {"response": "{}"})
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0  # the data begins aligned, and the widest tensors come first
    loaded = load_numpy(raw)
    assert loaded["numbers"].tolist() == [[1.5, -2.0]]
    assert loaded["flags"].tolist() == [True, False, True]
    assert loaded["nothing"].shape == (0,)
    again, metadata = decode(raw)
    assert metadata == {"response": "{}"}
    assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in again.items()} == {
        name: (t.dtype, t.shape, bytes(t.data)) for name, t in tensors.items()
    }


def test_narrow_tensors_never_push_wide_ones_off_their_alignment():
    tensors = {name: Tensor(name, (1,), memoryview(bytes(size))) for name, size in sorted(ITEM_BYTES.items())}
    raw = encode(tensors, {})
    data_at = 8 + struct.unpack("<Q", raw[:8])[0]
    assert data_at % 8 == 0
    header = json.loads(raw[8:data_at])
    assert all(header[name]["data_offsets"][0] % size == 0 for name, size in ITEM_BYTES.items())


def test_a_file_without_tensors_or_metadata_is_sound():
    assert decode(encode({}, {})) == ({}, {})
    assert decode(file({"__metadata__": {"a": "b"}}, pad=b"   ")) == ({}, {"a": "b"})


# ---------------------------------------------------------------- headers that lie


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "begins with 8 bytes"),
        (b"\1\2\3", "3 bytes came"),
        (struct.pack("<Q", 100) + b"{}", "given as 100 bytes, but only 2 follow"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", f"at most {MAX_HEADER_BYTES} bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1), f"at most {MAX_HEADER_BYTES} bytes"),
        (struct.pack("<Q", 0), "must be a JSON object"),
        (file(b"[]"), "must be a JSON object"),
        (file(b" {}"), "begin with {"),
        (file(b"\xef\xbb\xbf{}"), "begin with {"),
        (file(b"{]"), "the header is not JSON"),
        (file(b"{} {}"), "the header is not JSON: Extra data"),
        (file(b'{"a\xff": 1}'), "the header is not UTF-8: byte 0xff"),
        (file(b'{"a": ' + b"[" * 100_000), "nested too deep"),
        (file(b'{"a": NaN}'), "the header is not JSON: NaN"),
        (file(b'{"a": {}, "a": {}}'), "the key 'a' twice"),
        (file(b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [], "data_offsets": [0, 8]}}', bytes(8)), "'dtype' twice"),
        (file({"__metadata__": []}), "must be an object whose values are texts"),
        (file({"__metadata__": None}), "must be an object whose values are texts"),
        (file({"__metadata__": {"request": {"items": []}}}), "must be an object whose values are texts"),
        (file(b'{"__metadata__": {"a": "\\ud800"}}'), "a lone surrogate"),
        (file(b'{"\\ud800": {}}'), "a lone surrogate"),
        (file({}, b"x"), "1 bytes follow behind the last tensor"),
    ],
)
def test_headers_that_are_none(raw, says):
    error = refused(raw)
    assert says in error.detail
    assert error.tensor is None


@pytest.mark.parametrize(
    ("header", "size", "says"),
    [
        ({"a": 1}, 0, "must be an object with exactly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly data_offsets, dtype, shape"),
        ({"a": entry(strides=[1])}, 8, "exactly data_offsets, dtype, shape"),
        ({"a": entry("F31")}, 8, "did you mean 'F32'?"),
        ({"a": entry("f32")}, 8, "has the dtype 'f32'; known are BOOL"),
        ({"a": entry(None)}, 8, "has the dtype None"),
        ({"a": entry(["F32"])}, 8, "dtype"),
        ({"a": {**entry(), "shape": 2}}, 8, "a shape of at most"),
        ({"a": entry(shape=(-2,))}, 8, "none negative"),
        ({"a": entry(shape=(-1, -2))}, 8, "none negative"),
        ({"a": entry(shape=(2.0,))}, 8, "whole numbers"),
        ({"a": entry(shape=(True, 2))}, 8, "whole numbers"),
        ({"a": entry(shape=("2",))}, 8, "whole numbers"),
        ({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, 4, "at most 8"),
        ({"a": entry(shape=(2**62, 4))}, 8, "more than can be"),
        ({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, 0, "more than can be"),
        ({"a": entry(shape=(10**30,))}, 8, "whole numbers"),
        ({"a": entry(shape=(3,))}, 8, "has 8 bytes of data, but F32 of shape [3] takes 12"),
        ({"a": entry("F64")}, 8, "has 8 bytes of data, but F64 of shape [2] takes 16"),
        ({"a": entry(offsets=(0,))}, 8, "two data_offsets"),
        ({"a": entry(offsets=(0, 8, 16))}, 8, "two data_offsets"),
        ({"a": entry(offsets=(-8, 0))}, 8, "none negative"),
        ({"a": entry(offsets=(False, 8))}, 8, "two data_offsets"),
        ({"a": entry(offsets=(0, 1e1))}, 8, "two data_offsets"),
        ({"a": entry(offsets=(8, 0))}, 8, "ends at byte 0, before it begins at 8"),
        ({"a": entry(offsets=(0, 8))}, 4, "ends at byte 8 of the data, which has 4"),
        ({"a": entry(offsets=(2**60, 2**60 + 8))}, 8, "leaves a hole behind byte 0"),
        ({"b": entry(), "a": entry(offsets=(12, 20))}, 20, "begins at byte 12 of the data and leaves a hole behind byte 8"),
        ({"b": entry(), "a": entry(offsets=(4, 12))}, 12, "overlaps the one before it, which ends at 8"),
        ({"A": entry(), "a": entry()}, 8, "overlaps"),
    ],
)
def test_the_tensor_that_is_wrong_is_named(header, size, says):
    error = refused(file(header, bytes(size)))
    assert says in error.detail
    assert error.tensor == "a"
    assert "the tensor 'a'" in error.detail


def test_minus_zero_is_no_offset():
    error = refused(file(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', b"x"))
    assert "two data_offsets" in error.detail


def test_an_endless_name_is_shortened_in_the_message():
    error = refused(file({"x" * 10_000: 1}))
    assert len(error.detail) < 300


# ---------------------------------------------------------------- against the library

DTYPES = st.sampled_from(sorted(ITEM_BYTES))
NAMES = st.text(st.characters(codec="utf-8"), min_size=0, max_size=12)


@st.composite
def sound_files(draw):
    tensors = {}
    for name in draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=4, unique=True)):
        dtype, shape = draw(DTYPES), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        tensors[name] = Tensor(dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))
    return encode(tensors, draw(st.dictionaries(NAMES, NAMES, max_size=2)))


WORDS = [b"%c" % byte for byte in b'01-[]{},:"\0\xff'] + [b"9" * 25, b"null", b"true", b"1e3", b"\\ud800"]


@st.composite
def damaged_files(draw):
    """A sound file with a few of its bytes changed, cut out or put in, mostly in the header."""
    raw = bytearray(draw(sound_files()))
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(raw), header_end + 4) if draw(st.booleans()) else len(raw)))
        end = min(len(raw), at + draw(st.integers(0, 3)))
        raw[at:end] = draw(st.one_of(st.binary(max_size=3), st.sampled_from(WORDS)))
    if draw(st.booleans()) and len(raw) >= 8:  # the length says the truth again, so that the header itself is looked at
        raw[:8] = struct.pack("<Q", max(0, draw(st.sampled_from([header_end - 8, len(raw) - 8]))))
    return bytes(raw)


@fuzz
@given(st.one_of(damaged_files(), st.binary(max_size=200)))
@example(file({"a": entry("U8", (2**63, 2, 0), (0, 0))}))
def test_what_we_take_the_library_takes_with_the_same_values(raw):
    try:
        tensors, _ = decode(raw)
    except BadTensors:
        return
    theirs = dict(deserialize(raw))  # raises SafetensorError
    assert set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert tuple(theirs[name]["shape"]) == tensor.shape
        assert theirs[name]["dtype"] == tensor.dtype
        assert bytes(theirs[name]["data"]) == bytes(tensor.data)


@fuzz
@given(sound_files())
def test_sound_files_are_taken_by_both(raw):
    tensors, metadata = decode(raw)
    assert set(dict(deserialize(raw))) == set(tensors)
    assert encode(tensors, metadata) == raw


def test_the_library_refuses_too_what_is_damaged():
    """So that the comparison above can fail: most damage is not taken by either."""
    with pytest.raises(SafetensorError):
        deserialize(file({"a": entry(shape=(3,))}, bytes(8)))
