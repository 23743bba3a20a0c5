"""A typed client for Ratchet.

from ratchet_client import Ratchet

with Ratchet() as ratchet:  # RATCHET_URL and RATCHET_API_KEY, else the local `ratchet up`
    dataset = ratchet.create_dataset("rows.jsonl", name="rows")
    job = ratchet.create_job({"kind": "rl", "data": {"train": {"source": "dataset", "id": dataset["id"]}, ...}, ...})
    for event in ratchet.follow(job["id"]):
        print(event["type"], event["data"])
"""

from ratchet_client.client import Ratchet
from ratchet_client.errors import (
    RatchetApiError,
    RatchetArchiveError,
    RatchetConnectionError,
    RatchetError,
    RatchetLossPending,
    RatchetNotFound,
)
from ratchet_client.types import FINAL

__all__ = [
    "FINAL",
    "Ratchet",
    "RatchetApiError",
    "RatchetArchiveError",
    "RatchetConnectionError",
    "RatchetError",
    "RatchetLossPending",
    "RatchetNotFound",
]
