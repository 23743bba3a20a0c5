"""Which Ratchet a command talks to."""

from dataclasses import dataclass
from pathlib import Path

import typer

from ratchet_client import Ratchet
from ratchet_client.discovery import find

MAX_RETRIES = 3  # a person waits: a dead service should be said within seconds


@dataclass(frozen=True)
class Target:
    """What the options before the command's name said."""

    url: str | None = None
    data_dir: Path | None = None


def connect(context: typer.Context) -> Ratchet:
    """The service that was named, else the one that is found. Raises RatchetNotFound."""
    target = context.find_object(Target) or Target()
    base_url, api_key = find(target.url, data_dir=target.data_dir)
    return Ratchet(base_url, api_key, max_retries=MAX_RETRIES)
