"""Identifiers: a prefix that names the kind, and a ULID, so that they sort by time."""

from datetime import UTC, datetime
from typing import Literal

from ulid import ULID

Prefix = Literal["aud", "chg", "job", "ckpt", "ds", "key", "loss", "msg", "op", "req", "tinker", "whk", "wrk"]

NAMED: dict[str, str] = {"job": "job", "ckpt": "checkpoint", "ds": "dataset", "key": "key", "whk": "webhook", "op": "operation"}


def new_id(prefix: Prefix) -> str:
    return f"{prefix}_{str(ULID()).lower()}"


def lacking(kind: str, row_id: str) -> str:
    """The message that the project has no such `kind`, which says so if the id is one of another kind."""
    prefix = row_id.partition("_")[0]
    other = NAMED.get(prefix, kind)
    return f"no {kind} {row_id} in this project" + (f"; {prefix}_ begins the ids of {other}s" if other != kind else "")


def utcnow() -> datetime:
    """Aware UTC now, as this machine has it. What several machines compare goes by `service.store.clock`."""
    return datetime.now(UTC)
