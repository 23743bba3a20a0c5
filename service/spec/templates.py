"""Templates over a row's columns: `{column}`, with `{{` and `}}` for braces. Plain names only: nothing is evaluated."""

import json
from functools import lru_cache
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator

BRACES = "write {{ and }} for braces that shall stand in the text"


@lru_cache(maxsize=256)
def parts_of(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of text and the column that follows it (None at the end). Raises ValueError when it is not a template."""
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
    """The columns that the template names, in order. Raises ValueError when it is not a template."""
    return [name for _, name in parts_of(template) if name is not None]


def check(template: str) -> str:
    parts_of(template)
    return template


def render(template: str, row: dict[str, Any]) -> str:
    """Fill in a row. Strings stand as they are, everything else as JSON. Raises KeyError for an absent column."""
    return "".join(text + ("" if name is None else _shown(row[name])) for text, name in parts_of(template))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


Template = Annotated[str, AfterValidator(check)]
