"""Templates over a row's columns: `{column}`, with `{{` and `}}` for braces. Plain names only: nothing is evaluated."""

import json
import re
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator, Field

MAX_LENGTH = 64 * 2**10  # characters
# Possessive, and never from within a number: of thousands of digits, each is looked at once.
JSON_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|(?<![\d.])-?\d++(?:\.\d++)?[eE][+-]?\d+')
BRACES = "write {{ and }} for braces that shall stand in the text"


@lru_cache(maxsize=64)  # of the longest, a few megabytes each
def parts_of(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of text and the column that follows it (None at the end). Raises ValueError if it is not a template."""
    parts: list[tuple[str, str | None]] = []
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            if name is not None and (spec or conversion or not name or any(sign in name for sign in ".[]")):
                inside = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise ValueError(f"a template takes {{column}} only, got {{{inside}}}")
            parts.append((text, name))
    except ValueError as error:
        raise ValueError(f"{error}; {BRACES}") from None
    return tuple(parts)


def columns_of(template: str) -> list[str]:
    """The columns that the template names, in order. Raises ValueError if it is not a template."""
    return [name for _, name in parts_of(template) if name is not None]


def check(template: str) -> str:
    parts_of(template)
    return template


def render(template: str, row: dict[str, Any]) -> str:
    """Fill in a row. Strings are inserted unchanged, everything else as JSON with plain decimal numbers.
    Raises KeyError for an absent column."""
    return "".join(text + ("" if name is None else _shown(row[name])) for text, name in parts_of(template))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return JSON_TOKENS.sub(_in_decimals, json.dumps(value, ensure_ascii=False, default=str))


def _in_decimals(token: re.Match[str]) -> str:
    """A number without an exponent, because graders might read 1e-05 as 1; a string unchanged."""
    return token[0] if token[0].startswith('"') else format(Decimal(token[0]), "f")


Template = Annotated[str, Field(max_length=MAX_LENGTH), AfterValidator(check)]
