"""The client's own reader and writer of safetensors, against the library and the service's."""

import json

import numpy as np
import pytest
from safetensors.numpy import load

from ratchet_client.tensors import Tensor, decode, encode, ragged, tensor
from service.relay.tensors import Tensor as OfService
from service.relay.tensors import decode as decode_as_service
from service.sessions.codec import as_json, pack


def test_what_is_written_is_what_the_library_and_the_service_read() -> None:
    tensors = {
        "short": tensor("I32", [1, 2, 3]),
        "wide": tensor("F32", [1.5, -2.5, 3.5, 0.1], 2),
        "long": tensor("F64", [0.1]),
        **ragged("tokens", "cu_seqlens", [[1, 2], [3]]),
    }
    raw = encode(tensors, '{"kind":"ä"}')
    read = load(raw)
    assert {name: (array.dtype.str, array.tolist()) for name, array in read.items()} == {
        "short": ("<i4", [1, 2, 3]),
        "wide": ("<f4", [[1.5, -2.5], [3.5, np.float32(0.1)]]),
        "long": ("<f8", [0.1]),
        "tokens": ("<i4", [1, 2, 3]),
        "cu_seqlens": ("<i8", [0, 2, 3]),
    }
    of_service, metadata = decode_as_service(raw)
    assert json.loads(metadata["head"]) == {"kind": "ä"} and of_service["wide"].shape == (2, 2)
    assert encode(dict(reversed(tensors.items())), '{"kind":"ä"}') == raw


def test_an_answer_reads_like_its_json_form() -> None:
    log_probs = np.array([-0.1, np.nan, -2.0], "<f4")
    tensors = {
        "cu_seqlens": OfService("I64", (3,), memoryview(np.array([0, 2, 3], "<i8").tobytes())),
        "log_probs": OfService("F32", (3,), memoryview(log_probs.tobytes())),
        "top_ids": OfService("I32", (3, 2), memoryview(np.arange(6, dtype="<i4").tobytes())),
        "advantages": OfService("F64", (2,), memoryview(np.array([0.25, 1.0], "<f8").tobytes())),
    }
    raw = pack({"metrics": {"loss:sum": 1.0}}, tensors)
    assert decode(raw) == as_json(raw)
    assert decode(raw)["log_probs"] == [[float(log_probs[0]), None], [-2.0]]
    assert decode(raw)["top_ids"] == [[[0, 1], [2, 3]], [[4, 5]]]


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0\0\0\0\0\0{", b"\xff" * 20])
def test_other_bytes_are_no_answer(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(raw)


def test_a_tensor_knows_its_rows() -> None:
    assert tensor("F32", [1, 2, 3, 4, 5, 6], 3).shape == (2, 3)
    assert isinstance(tensor("I64", []), Tensor)
