"""What is said at once about a JSON Schema that could never grade an answer."""

from typing import Any

import pytest

from service.spec.patterns import check_json_schema

DRAFT_7 = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/x"},
        {"properties": {"a": {"$ref": "#/definitions/A"}}},
        {"$ref": "#anchor"},
        {"$schema": DRAFT_7, "definitions": {"a": {"type": "string"}}, "$ref": "#/definitions/b"},
        {"components": {"A": {"items": {"$ref": "#/components/B"}}}, "$ref": "#/components/A"},
    ],
)
def test_a_reference_to_nothing_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="points to nothing in the schema"):
        check_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#"}, {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}],
)
def test_references_that_go_round_in_a_circle_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="form a circle"):
        check_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$anchor": "here", "type": "string"}}, "$ref": "#here"},
        {"properties": {"child": {"$ref": "#"}}},
        {"$schema": DRAFT_7, "$ref": "#/definitions/a", "definitions": {"a": {"items": {"$ref": "#/definitions/a"}}}},
        {"$ref": "#/%24defs/a", "$defs": {"a": {}}},
        {"items": {"$ref": "#/prefixItems/0"}, "prefixItems": [True]},
        {"const": {"pattern": "(?<n>", "$ref": "#/none"}},
        {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
    ],
)
def test_references_that_lead_somewhere_are_taken(schema: dict[str, Any]) -> None:
    assert check_json_schema(schema) == schema


@pytest.mark.parametrize("pattern", [r"(?<year>\d{4})", r"\p{L}+", r"\u{1F600}", "/^a$/i", r"\cA", "[^]"])
def test_a_pattern_in_javascripts_dialect_is_refused_with_the_reason(pattern: str) -> None:
    for schema in (
        {"pattern": pattern},
        {"patternProperties": {pattern: {}}},
        {"$defs": {"a": {"items": {"pattern": pattern}}}},
    ):
        with pytest.raises(ValueError, match="is none in Python's dialect"):
            check_json_schema(schema)


@pytest.mark.parametrize("pattern", [r"^\d{4}$", "(?P<year>[0-9]+)", "^/api/", "a/b", r"\u00e9", "(?i)yes"])
def test_patterns_of_both_dialects_are_taken(pattern: str) -> None:
    assert check_json_schema({"pattern": pattern}) == {"pattern": pattern}
