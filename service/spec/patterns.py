"""Checks regular expressions and JSON Schemas that callers send, before anything runs them.

Checking must itself be harmless. The spec's models apply the bounds on sizes. The checks that may take much time or memory run
in the sandbox (`service.rewards.texts`). `regex` expands fixed repeats while it compiles, so `(a{9999}){9999}` would take all
memory. Matching is bounded elsewhere, by time.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import regex
from jsonschema import SchemaError
from jsonschema.validators import validator_for

from service.spec.schemas import check_dialect, check_inside

MAX_UNROLLED = 2_000_000  # nodes of all patterns of a spec; about half a second and 500 MB


def check_size(pattern: str) -> str:
    """The pattern, if it is not too large to be compiled. Raises ValueError."""
    if _unrolled(pattern) > MAX_UNROLLED:
        repeats = prod(_repeats(pattern))
        raise ValueError(f"its fixed repeats may multiply to {repeats}, which is too large; use * or +, or smaller counts")
    return pattern


def check_sizes(patterns: Iterable[str]) -> None:
    """Raises ValueError if the patterns of one spec are too large together."""
    if (unrolled := sum(map(_unrolled, patterns))) > MAX_UNROLLED:
        raise ValueError(
            f"the patterns of all graders may come to {unrolled} characters with their fixed repeats written out, "
            f"at most {MAX_UNROLLED} are taken; use * or +, or smaller counts"
        )


def _unrolled(pattern: str) -> int:
    """An upper bound of the pattern's length with its fixed repeats expanded, as if all of them were nested. The exact length
    would need a parser, which a crafted pattern could mislead."""
    return len(pattern) * prod(_repeats(pattern))


def _repeats(pattern: str) -> list[int]:
    return [max(1, int(count[:9])) for count in re.findall(r"\{(\d+)", pattern)]


def check_pattern(pattern: str) -> str:
    """The pattern, if it is a regular expression. Raises ValueError. For the sandbox: a compiled pattern stays in memory."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None
    return pattern


def check_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, if it is valid and refers to nothing outside itself. Raises ValueError. For the sandbox: it may take long."""
    try:
        validator_for(schema).check_schema(schema)
        outside = next((reference for reference in _references(schema) if not reference.startswith("#")), None)
    except SchemaError as error:
        if error.validator == "format" and error.validator_value == "regex" and isinstance(error.instance, str):
            check_dialect(error.instance)
        raise ValueError(f"not a JSON Schema: {error.message} at /{'/'.join(map(str, error.absolute_path))}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if outside is not None:
        raise ValueError(f"it refers to {outside!r}; only references inside the schema (#/...) are followed")
    try:
        check_inside(schema)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return schema


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(inner, str):
                yield inner
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
