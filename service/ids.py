"""Identifiers: a prefix that names the kind, and a ULID, so that they sort by time."""

from datetime import UTC, datetime
from typing import Literal

from ulid import ULID

Prefix = Literal["aud", "chg", "job", "ckpt", "ds", "key", "loss", "msg", "op", "req", "tinker", "whk", "wrk"]


def new_id(prefix: Prefix) -> str:
    return f"{prefix}_{str(ULID()).lower()}"


def utcnow() -> datetime:
    """Aware UTC now, as this machine has it. What several machines compare goes by `service.store.clock`."""
    return datetime.now(UTC)
