"""Strict JSON for foreign documents: no duplicate keys, no lone surrogates. Each caller words the error for its documents."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from service.errors import Portable

MAX_VALUES = 2**18  # a few bytes of each take a hundred in memory, and a parser in C lets nobody else run meanwhile
LONE_SURROGATE = "half of a character (a lone surrogate)"
Reason = Literal["encoding", "syntax", "too_deep", "number", "key_twice", "constant", "too_many"]


class BadJson(Portable):
    """Why a text is refused.

    `what` is the byte that is not UTF-8 (two hex digits), the parser's message, the duplicate key, or the constant. `at` counts
    from 0, `line` and `column` from 1: in bytes if the encoding is wrong, else in characters.
    """

    def __init__(self, reason: Reason, what: str = "", *, at: int = 0, line: int = 1, column: int = 1) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason: Reason = reason
        self.what, self.at, self.line, self.column = what, at, line, column


def read(raw: bytes, loads: Callable[[str], Any], max_values: int | None = None) -> Any:
    """What `loads` makes of the text. Raises BadJson, before anything is made of more than `max_values` values; what the hooks
    of `loads` raise beside it goes through."""
    if max_values is not None and raw.count(b",") >= max_values and _commas_outside_texts(raw) >= max_values:
        raise BadJson("too_many", str(max_values))
    text = decoded(raw)
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        raise BadJson("syntax", error.msg, at=error.pos, line=error.lineno, column=error.colno) from None
    except RecursionError:
        raise BadJson("too_deep") from None
    except ValueError as error:  # Python converts no integer of more than 4300 digits
        raise BadJson("number", str(error)) from None


def _commas_outside_texts(raw: bytes) -> int:
    """One less than there are values. Walked in Python, so that others get their turn."""
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    count, end = 0, 0
    while (begin := bare.find(b'"', end)) >= 0:
        count += bare.count(b",", end, begin)
        end = bare.find(b'"', begin + 1) + 1
        if not end:  # the text has no end: there is nothing behind it
            return count
    return count + bare.count(b",", end)


def decoded(raw: bytes) -> str:
    """UTF-8 as text. Raises BadJson with the place of the first wrong byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise BadJson("encoding", f"{raw[error.start]:02x}", at=error.start, line=line, column=column) from None


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: the object. Raises BadJson for a duplicate key."""
    members = dict(pairs)
    if len(members) != len(pairs):
        times = Counter(key for key, _ in pairs)
        raise BadJson("key_twice", next(key for key in times if times[key] > 1))
    return members


def no_constant(name: str) -> Any:
    """For `parse_constant`: raises BadJson, because NaN and the infinities, which Python writes, are not JSON."""
    raise BadJson("constant", name)


def has_lone_surrogate(text: str) -> bool:
    """Whether the text has a lone surrogate, which JSON's escapes can express and UTF-8 cannot."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
