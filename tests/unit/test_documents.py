"""JSON and YAML as callers may send them."""

from typing import Any

import pytest

from service.edge import documents
from service.edge.documents import MAX_DEPTH, canonical, parse_json, parse_yaml
from service.errors import BodyTooLarge, InvalidRequest, Malformed
from service.spec.storable import MAX_KEY_LENGTH, not_storable


def test_yaml_means_what_it_looks_like():
    text = b"""
rate: 1e-5
small: 3.0E-4
half: .5
count: 12
negative: -3
octal: 010
hex: 0x1f
date: 2024-01-01
time: 12:30
answer: no
yes: true
nothing: ~
empty:
quoted: "1"
list: [a, {b: 1}]
text: |
  two
  lines
"""
    assert parse_yaml(text) == {
        "rate": 1e-5,
        "small": 3e-4,
        "half": 0.5,
        "count": 12,
        "negative": -3,
        "octal": "010",
        "hex": "0x1f",
        "date": "2024-01-01",
        "time": "12:30",
        "answer": "no",
        "yes": True,
        "nothing": None,
        "empty": None,
        "quoted": "1",
        "list": ["a", {"b": 1}],
        "text": "two\nlines\n",
    }


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        (b"a: 1\nb: [1, 2\n", 3, 1),
        (b"a: b: c\n", 1, 5),
        (b"a: 1\na: 2\n", 2, 1),
        (b"x:\n  y: 1\n  y: 2\n", 3, 3),
        (b"1: one\n", 1, 1),
        (b"? [a]\n: b\n", 1, 3),
        (b"a: &x 1\nb: *x\n", 2, 4),
        (b"a: !!binary aGk=\n", 1, 4),
        (b"a: !!bool maybe\n", 1, 4),
        (b"a: 1\n---\nb: 2\n", 2, 1),
        (b"a: 1\nb: \xff\n", 2, 4),
    ],
)
def test_broken_yaml_says_line_and_column(text, line, column):
    with pytest.raises(Malformed) as refused:
        parse_yaml(text)
    assert refused.value.extra == {"line": line, "column": column}
    assert f"line {line}, column {column}" in refused.value.detail


def test_a_bomb_of_aliases_is_refused_before_it_is_built():
    bomb = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60))
    with pytest.raises(Malformed, match="aliases"):
        parse_yaml(bomb)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2)])
def test_bottomless_nesting_is_refused(text):
    for parse in (parse_json, parse_yaml):
        with pytest.raises(Malformed):
            parse(text)


def test_depth_up_to_the_limit_is_taken():
    text = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(text) == parse_yaml(text)


@pytest.mark.parametrize("text", [b"[NaN]", b"[Infinity]", b"[-1e999]", b'["\\u0000"]', b'["\\udc00"]', b'{"\\u0000": 1}'])
def test_values_that_no_store_can_hold_are_refused(text):
    with pytest.raises(InvalidRequest):
        parse_json(text)


@pytest.mark.parametrize("text", [b"[.nan]", b"[.inf]", b'["\\0"]'])
def test_values_that_no_store_can_hold_are_refused_in_yaml(text):
    with pytest.raises(InvalidRequest):
        parse_yaml(text)


def test_numbers_of_thousands_of_digits_are_refused():
    for parse in (parse_json, parse_yaml):
        with pytest.raises(Malformed, match="4300 digits"):
            parse(b"1" * 5000)


def test_a_body_holds_so_many_values_and_commas_in_texts_are_none(monkeypatch):
    monkeypatch.setattr(documents, "MAX_VALUES", 4)
    assert parse_json(rb'{"a, b": [1, "\\", ",,,\",,,", 2]}') == {"a, b": [1, "\\", ',,,",,,', 2]}
    for more in (b"[1,2,3,4,5]", rb'["a", 2, 3, 4, ",\\", 6]', b"[{},{},{},{},{}]", b'[1,2,3,4,5,"without an end'):
        with pytest.raises(BodyTooLarge, match="may hold 4 values"):
            parse_json(more)


def test_an_object_has_so_many_keys(monkeypatch):
    monkeypatch.setattr(documents, "MAX_KEYS", 2)
    assert parse_json(b'[{"a": 1, "b": {"c": 1, "d": 2}}]')
    for parse in (parse_json, parse_yaml):
        with pytest.raises(BodyTooLarge, match="an object may have 2 keys, one has 3"):
            parse(b'{"a": {"b": 1, "c": 2, "d": 3}}')


def test_a_key_is_not_endless():
    assert parse_json(b'{"' + b"k" * 1000 + b'": 1}')
    with pytest.raises(InvalidRequest) as refused:
        parse_json(b'{"a": {"' + b"k" * 1001 + b'": 1}}')
    assert [(error.pointer, error.code) for error in refused.value.errors] == [("/a", "key_too_long")]


def test_a_byte_order_mark_is_no_content():
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xbc"}') == {"a": "ü"}
    assert parse_yaml(b"\xef\xbb\xbfa: 1") == {"a": 1}
    with pytest.raises(Malformed, match=r"line 1, column 2: not UTF-8 \(byte 0xff\)"):
        parse_json(b"\xef\xbb\xbf[\xff]")


def test_the_order_of_keys_and_the_format_do_not_count():
    assert canonical(parse_json(b'{"b": [1, 2.0], "a": "x"}')) == canonical(parse_yaml(b"a: x\nb:\n- 1\n- 2.0\n"))
    assert canonical({"a": 1}) != canonical({"a": "1"})


def nested(depth: int, value: Any = 1) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "codes"),
    [
        ({"a": [1, 2.5, "ä", None, True, {"b": []}], "": "é" * 2000}, []),
        (nested(MAX_DEPTH), []),
        (nested(MAX_DEPTH + 1), ["too_deep"]),
        (nested(MAX_DEPTH + 1, "text"), ["too_deep"]),
        (nested(MAX_DEPTH + 1, []), ["too_deep"]),
        ({"a": [{"b": "\0"}, "\ud800", float("nan"), float("-inf")]}, ["not_storable"] * 4),
        (
            {"\0": 1, "\ud800": 1, "k" * (MAX_KEY_LENGTH + 1): 1, "k" * MAX_KEY_LENGTH: 1},
            ["not_storable"] * 2 + ["key_too_long"],
        ),
    ],
)
def test_what_cannot_be_stored_is_found_wherever_it_stands(value, codes):
    assert [error.code for error in not_storable(value)] == codes
