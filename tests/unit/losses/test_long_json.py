"""JSON of many megabytes is read as the standard library reads it, and lets nobody fill the memory."""

import json

import pytest

from service.edge.arrays import parse_arrays
from service.errors import BodyTooLarge, Malformed


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
