"""Refuses what JSON allows and a store or a call stack does not: the character NUL, lone surrogates, very deep nesting."""

import math
from collections.abc import Iterator
from typing import Any

from service.errors import FieldError
from service.validation import escape
from service.validation.strict_json import LONE_SURROGATE, has_lone_surrogate

MAX_DEPTH = 64
MAX_KEY_LENGTH = 1000  # characters: an error's pointer is made of keys


def not_storable(value: Any, pointer: str = "") -> list[FieldError]:
    """One FieldError for each text with NUL or a lone surrogate, number that is not finite, value that lies too deep, and key
    that is too long."""
    return [] if _fits(value, 0) else list(_walk(value, pointer, 0))


def _fits(value: Any, depth: int) -> bool:
    """Whether `_walk` finds nothing, in a third of its time: most values are well, and the walk's pointers cost most."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        for key, inner in value.items():
            if len(key) > MAX_KEY_LENGTH or _unfit(key) or not _fits(inner, depth + 1):
                return False
        return True
    if isinstance(value, list):
        return all(_fits(inner, depth + 1) for inner in value)
    return _unfit(value) is None


def _walk(value: Any, pointer: str, depth: int) -> Iterator[FieldError]:
    if depth > MAX_DEPTH:
        yield FieldError(pointer, f"is nested more than {MAX_DEPTH} levels deep", "too_deep")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if len(key) > MAX_KEY_LENGTH:
                yield FieldError(
                    pointer, f"a key may have at most {MAX_KEY_LENGTH} characters; this one has {len(key)}", "key_too_long"
                )
            elif reason := _unfit(key):
                yield FieldError(pointer, f"a key holds {reason}", "not_storable")
            else:
                yield from _walk(inner, f"{pointer}/{escape(key)}", depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{pointer}/{index}", depth + 1)
    elif reason := _unfit(value):
        yield FieldError(pointer, f"holds {reason}", "not_storable")


def _unfit(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not a finite number"
    if not isinstance(value, str) or (value.isascii() and "\0" not in value):
        return None
    if "\0" in value:
        return "the character NUL (\\u0000)"
    return LONE_SURROGATE if has_lone_surrogate(value) else None
