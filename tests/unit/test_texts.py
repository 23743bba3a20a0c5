"""Patterns and JSON Schemas of callers: how large they may be, and that only the sandbox compiles them."""

import time
from typing import Any

import jsonschema.validators
import pytest
import regex

from service.errors import InvalidRequest, JobFailed, Unavailable
from service.rewards import texts
from service.rewards.sandbox import Sandbox
from service.spec.patterns import MAX_UNROLLED
from service.spec.reward import RewardSpec
from service.spec.schemas import MAX_BYTES, MAX_DEPTH, MAX_ENUM, check_bounds
from service.validation import parse

DRAFT_4, DRAFT_7 = "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"


def reward(*graders: dict[str, Any]) -> RewardSpec:
    return parse(RewardSpec, {"graders": [{"name": f"g{number}", **one} for number, one in enumerate(graders)]})


def matching(pattern: str, **more: Any) -> dict[str, Any]:
    return {"kind": "regex", "pattern": pattern, **more}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


# ---------------------------------------------------------------- bounds, before anything is done


@pytest.mark.parametrize(
    ("fits", "too_much", "said"),
    [
        (nested(MAX_DEPTH), nested(MAX_DEPTH + 1), "nested more than 32 levels"),
        ({"title": "x" * (MAX_BYTES - 20)}, {"title": "x" * MAX_BYTES}, "at most 65536 are accepted"),
        ({"enum": [*range(MAX_ENUM)]}, {"anyOf": [{"enum": [*range(MAX_ENUM)]}, {"enum": ["x"]}]}, "have 2001 values in all"),
        ({"$schema": DRAFT_7}, {"$schema": DRAFT_4}, "taken are the drafts https://json-schema.org/draft/2020-12/schema, "),
        ({"$schema": "https://json-schema.org/draft/2019-09/schema"}, {"$schema": 7}, "its $schema is '7'"),
    ],
)
def test_a_schema_is_bounded(fits: dict[str, Any], too_much: dict[str, Any], said: str) -> None:
    assert check_bounds(fits) == fits
    with pytest.raises(InvalidRequest, match="schema") as refused:
        reward({"kind": "json_schema", "schema": too_much})
    assert refused.value.errors[0].pointer == "/graders/0/schema" and said in refused.value.errors[0].detail


def test_the_patterns_of_a_spec_have_one_budget() -> None:
    half = f"a{{{MAX_UNROLLED // 10}}}"
    assert reward(matching(half))
    with pytest.raises(InvalidRequest, match="the patterns of all graders"):
        reward(matching(half), {"kind": "exact", "reference": "1", "extract": half})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$schema": DRAFT_4}}},
        {"allOf": [{"$schema": DRAFT_4}]},
        {"$defs": {"x": {"items": {"$schema": 4}}}},
    ],
)
def test_a_schema_inside_is_of_no_old_draft_either(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="taken are the drafts"):
        reward({"kind": "json_schema", "schema": schema})
    reward({"kind": "json_schema", "schema": {"properties": {"$schema": {"type": "string"}}, "const": {"$schema": 4}}})


# ---------------------------------------------------------------- in the sandbox


def test_what_is_wrong_is_said_of_each_where_it_stands() -> None:
    wrong = texts.wrong_texts(
        reward(
            matching(r"\d+", extract="(-"),
            {"kind": "json_schema", "schema": {"type": "strin"}},
            {"kind": "exact", "reference": "1", "extract": "#"},
            {"kind": "json_schema", "schema": {"pattern": r"\p{L}"}},
        )
    )
    assert [error.pointer for error in wrong] == [
        "/reward/graders/0/extract",
        "/reward/graders/1/schema",
        "/reward/graders/3/schema",
    ]
    assert [error.detail.split(":")[0] for error in wrong[:2]] == ["not a regular expression", "not a JSON Schema"]
    assert "is none in Python's dialect" in wrong[2].detail
    assert wrong[0].got == "(-"


def test_nothing_of_a_pattern_or_schema_stays_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*_: Any, **__: Any) -> None:
        raise AssertionError("it was compiled in this process")

    monkeypatch.setattr(regex, "compile", here)
    monkeypatch.setattr(jsonschema.validators, "validator_for", here)
    monkeypatch.setattr("service.spec.patterns.validator_for", here)
    asked = reward(matching("[a"), matching("[b]"), {"kind": "json_schema", "schema": {"pattern": "c"}})
    assert [error.pointer for error in texts.wrong_texts(asked)] == ["/reward/graders/0/pattern"]


def test_what_takes_too_much_memory_is_refused_and_the_next_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MEMORY_BYTES", 64 * 2**20)  # it begins with 30
    [error] = texts.wrong_texts(reward(matching("a{200000}"), matching("b")))
    assert error.pointer == "/reward/graders/0/pattern"
    assert error.detail.startswith("cannot be checked within 5 s and 64 MiB")


def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time together is bounded, too: what had no turn is refused with the rest."""
    monkeypatch.setattr(texts, "WITHIN_S", 0.001)
    began = time.monotonic()
    wrong = texts.wrong_texts(reward(*[matching("a{100000}") for _ in range(2)]))
    assert len(wrong) == 2 and all("cannot be checked within 0.001 s" in error.detail for error in wrong)
    assert time.monotonic() - began < 10


def test_a_spec_without_patterns_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(self: Sandbox) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Sandbox, "_start", starts)
    assert texts.wrong_texts(reward({"kind": "exact", "reference": "1"})) == []
    assert texts.wrong_texts(None) == []


def test_where_the_sandbox_does_not_start_nothing_is_taken_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Sandbox) -> None:
        raise JobFailed("grader_unavailable", "its process did not start")

    monkeypatch.setattr(Sandbox, "_start", fails)
    with pytest.raises(Unavailable, match="cannot be checked just now: its process did not start"):
        texts.wrong_texts(reward(matching("a")))
