"""A typed client for Ratchet.

from ratchet_client import Ratchet

with Ratchet() as ratchet:  # RATCHET_URL and RATCHET_API_KEY, else the local `ratchet up`
    dataset = ratchet.create_dataset("rows.jsonl", name="rows")
    job = ratchet.create_job({"kind": "rl", "data": {"train": {"source": "dataset", "id": dataset["id"]}, ...}, ...})
    for event in ratchet.follow(job["id"]):
        print(event["type"], event["data"])

A loop of your own: `ratchet.session(model={"source": ...})`, see `ratchet_client.session`.
"""

from ratchet_client.client import Ratchet
from ratchet_client.errors import (
    RatchetApiError,
    RatchetArchiveError,
    RatchetConnectionError,
    RatchetError,
    RatchetLossPending,
    RatchetNotFound,
    RatchetOperationError,
)
from ratchet_client.operations import Answer, Forward, Group
from ratchet_client.session import AsyncHandle, AsyncSession, Handle, Session
from ratchet_client.types import FINAL

__all__ = [
    "FINAL",
    "Answer",
    "AsyncHandle",
    "AsyncSession",
    "Forward",
    "Group",
    "Handle",
    "Ratchet",
    "RatchetApiError",
    "RatchetArchiveError",
    "RatchetConnectionError",
    "RatchetError",
    "RatchetLossPending",
    "RatchetNotFound",
    "RatchetOperationError",
    "Session",
]
