"""Finds what can never work in a JSON Schema before anything is graded: unresolvable references, patterns in another dialect.
Also bounds the schema's size."""

import json
import re
from collections.abc import Iterator
from typing import Any

from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, UnknownDialect, specification_with

PATTERN_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)
LITERAL = re.compile(r"/(?:\^.*|.*\$)/[dgimsuvy]*", re.DOTALL)  # a pattern written as a literal of JavaScript
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # keywords that hold schemas by name
MAX_BYTES, MAX_DEPTH = 64 * 2**10, 32
MAX_ENUM = 2000  # values in all lists of `enum`
DRAFTS = {  # older drafts are refused: checking them compares all values of an enum pairwise
    "https://json-schema.org/draft/2020-12/schema": "2020-12",
    "https://json-schema.org/draft/2019-09/schema": "2019-09",
    "http://json-schema.org/draft-07/schema": "7",
}
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # keywords that hold schemas by name
DATA = ("const", "enum", "default", "examples")  # keywords that hold values and no schemas


def check_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, if it is neither too large nor of too old a draft. Raises ValueError that says what is allowed."""
    if _is_deeper(schema, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    for draft in _drafts(schema):
        if not isinstance(draft, str) or draft.removesuffix("#") not in DRAFTS:
            taken = f"taken are the drafts {', '.join(DRAFTS)}; none means the first"
            raise ValueError(f"its $schema is {str(draft)[:80]!r}; {taken}")
    if (size := len(json.dumps(schema, ensure_ascii=False).encode())) > MAX_BYTES:
        raise ValueError(f"it has {size} bytes as JSON; at most {MAX_BYTES} are accepted")
    if (values := _enum_values(schema)) > MAX_ENUM:
        raise ValueError(f"its enums have {values} values in all; at most {MAX_ENUM} are accepted; use a pattern instead")
    return schema


def _drafts(value: Any) -> Iterator[Any]:
    """The values of `$schema` in this schema and those inside it. Keywords that hold data are not searched."""
    if isinstance(value, dict):
        yield from ([value["$schema"]] if "$schema" in value else [])
        for name, below in value.items():
            if name in NAMED and isinstance(below, dict):
                yield from _drafts(list(below.values()))
            elif name not in DATA:
                yield from _drafts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _drafts(below)


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_is_deeper(below, levels - 1) for below in (value.values() if isinstance(value, dict) else value))


def _enum_values(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_enum_values, value))
    if not isinstance(value, dict):
        return 0
    own = len(value["enum"]) if isinstance(value.get("enum"), list) else 0
    return own + sum(map(_enum_values, value.values()))


def check_inside(schema: dict[str, Any]) -> None:
    """Raises ValueError for a $ref that points to nothing or into a cycle, and for a pattern that is invalid in Python."""
    try:
        specification = specification_with(schema["$schema"]) if isinstance(schema.get("$schema"), str) else DRAFT202012
    except UnknownDialect:
        specification = DRAFT202012
    root = specification.create_resource(schema)
    applied: dict[int, list[int]] = {}
    _check(root, Registry().resolver_with_root(root), specification, applied)
    if _has_circle(applied):
        raise ValueError("its references form a circle that never looks into the value")


def _check(resource: Resource[Any], resolver: Any, specification: Any, applied: dict[int, list[int]]) -> None:
    """Fills `applied`: for each schema's id, the ids of the schemas that it applies to its own value (not to a part of it)."""
    schema = resource.contents
    if isinstance(schema, bool) or id(schema) in applied:
        return
    if not isinstance(schema, dict):
        raise ValueError("one of its $refs points to something that is not a schema")
    same = applied[id(schema)] = [id(part) for part in _applied_to_the_same(schema)]
    for pattern in _patterns(schema):
        check_dialect(pattern)
    for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
        if isinstance(reference := schema.get(keyword), str):
            try:
                found = resolver.lookup(reference)
            except (Unresolvable, ValueError, TypeError, KeyError):
                raise ValueError(f"its {keyword} {reference!r} points to nothing in the schema") from None
            if keyword == "$ref":
                same.append(id(found.contents))
            _check(specification.create_resource(found.contents), found.resolver, specification, applied)
    for part in resource.subresources():
        _check(part, resolver.in_subresource(part), specification, applied)


def _has_circle(follows: dict[int, list[int]]) -> bool:
    left = {node: {after for after in then if after in follows} for node, then in follows.items()}
    while ends := {node for node, then in left.items() if not then}:
        left = {node: then - ends for node, then in left.items() if node not in ends}
    return bool(left)


def _applied_to_the_same(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from schema.get(keyword) or ()
    for keyword in ("not", "if", "then", "else"):
        if keyword in schema:
            yield schema[keyword]


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    if isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    if isinstance(properties := schema.get("patternProperties"), dict):
        yield from properties


def check_dialect(pattern: str) -> None:
    """Raises ValueError for a pattern in JavaScript's dialect, which JSON Schema's own documents use."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        reason = str(error)
    except RecursionError:
        reason = "its groups are nested too deeply"
    else:
        if not LITERAL.fullmatch(pattern):
            return
        reason = "the slashes around it would have to stand in the text"
    raise ValueError(
        f"the pattern {pattern[:80]!r} is none in Python's dialect, in which patterns are read here: {reason}"
        " (JavaScript's (?<name>...), \\p{...}, \\u{...} and /.../ are not Python's)"
    )


def ending_at_the_end(schema: Any) -> Any:
    """The schema with each `$` in its patterns replaced by `\\Z`: Python's `$` also matches before a newline at the end."""
    if isinstance(schema, list):
        return [ending_at_the_end(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _ending(key, value) for key, value in schema.items()}


def _ending(keyword: str, value: Any) -> Any:
    if keyword in DATA:
        return value
    if keyword == "pattern" and isinstance(value, str):
        return _at_the_end(value)
    if keyword in BY_NAME and isinstance(value, dict):
        name_of = _at_the_end if keyword == "patternProperties" else str
        return {name_of(name): ending_at_the_end(part) for name, part in value.items()}
    return ending_at_the_end(value)


def _at_the_end(pattern: str) -> str:
    if re.compile(pattern).flags & re.MULTILINE:
        return pattern
    return PATTERN_PARTS.sub(lambda part: r"\Z" if part[0] == "$" else part[0], pattern)
