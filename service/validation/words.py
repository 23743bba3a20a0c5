"""Values and words for messages: shortened, without secrets, with the word that was probably meant."""

import json
import re
from difflib import get_close_matches
from math import isfinite
from typing import Any

from pydantic import SecretStr

MAX_SHOWN = 80  # characters of a value in a message
MAX_READ = 100 * MAX_SHOWN  # of a longer text the rest is not looked at
SECRET_NAME = re.compile(r"(?i)secret|passw|credential|authorization|api_?key|(access|auth)_?token")
SECRET_TEXT = re.compile(r"tml-[A-Za-z0-9_-]{6,}|(?<=://)[^/\s@]+(?=@)")
HIDDEN = "(not shown)"


def nearest(word: str, legal: list[str]) -> str | None:
    """The legal word that was probably meant."""
    lowered = {option.lower(): option for option in legal}
    close = get_close_matches(word[:MAX_SHOWN].lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def is_very_near(word: str, legal: list[str]) -> bool:
    """Whether it is a legal word misspelt, rather than another one."""
    return bool(get_close_matches(word[:MAX_SHOWN].lower(), [option.lower() for option in legal], n=1, cutoff=0.88))


def did_you_mean(word: str, legal: list[str]) -> str:
    """A clause for the end of a message; empty if no legal word is near."""
    near = nearest(word, legal)
    return f"; did you mean {near!r}?" if near else ""


def shown(value: Any, name: str = "") -> Any:
    """A value for a message: shortened, containers only by their size, secrets never."""
    if SECRET_NAME.search(name) or isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, dict):
        return f"an object with {counted(len(value), 'key')}"
    if isinstance(value, list | tuple | set):
        return f"an array of {counted(len(value), 'item')}"
    if value is None or isinstance(value, bool) or (isinstance(value, float) and isfinite(value)):
        return value
    text = without_secrets(value[:MAX_READ] if isinstance(value, str) else str(value))
    if len(text) > MAX_SHOWN:
        return text[: MAX_SHOWN - 1] + "…"
    return value if isinstance(value, int) else text


def without_secrets(text: str) -> str:
    """The text without API keys and without passwords in URLs."""
    return SECRET_TEXT.sub(HIDDEN, text)


def counted(number: int, thing: str) -> str:
    """The number and the thing, in the plural unless it is one: 1 row, 2 rows."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def quoted(value: Any) -> str:
    """The result of `shown` as JSON."""
    if isinstance(value, str):
        return value if value.startswith(("an object with", "an array of", HIDDEN)) else repr(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
