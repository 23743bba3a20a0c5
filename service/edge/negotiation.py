"""The caller's preferences: the format of the answer (Accept), and how long to wait for it (Prefer: wait, RFC 7240)."""

import re
from collections.abc import Sequence

from fastapi import Request

from service.errors import NotAcceptable

MAX_WAIT_S = 60
MAX_RANGES = 50  # media ranges read from Accept; further ones are ignored
_WAIT = re.compile(r'(?:^|[,;])\s*wait\s*=\s*"?(\d{1,9})"?\s*(?=[,;]|$)', re.IGNORECASE)


def accepted(request: Request, offered: Sequence[str]) -> str:
    """The media type to answer in; the first of `offered` without a preference. Raises NotAcceptable if none is accepted."""
    wanted = ",".join(request.headers.getlist("accept"))
    if not wanted.strip():
        return offered[0]
    ranges = [_range(media_type) for media_type in wanted.split(",", MAX_RANGES)[:MAX_RANGES]]
    best = max(offered, key=lambda media_type: _quality(media_type, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"Accept is {wanted[:200]!r}; answers come as {' or '.join(offered)}")
    return best


def _range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    return name, float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The quality of the most specific range that matches `offer`; 0 means not acceptable."""
    qualities = dict(ranges)
    return next((qualities[pattern] for pattern in (offer, f"{offer.partition('/')[0]}/*", "*/*") if pattern in qualities), 0.0)


def wait_s(request: Request) -> float:
    """Seconds that the caller is willing to wait, at most MAX_WAIT_S; 0 if it does not ask, or not in a valid form."""
    match = _WAIT.search(",".join(request.headers.getlist("prefer")))
    return float(min(int(match[1]), MAX_WAIT_S)) if match else 0.0
