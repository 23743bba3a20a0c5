"""The service that a command talks to."""

from dataclasses import dataclass
from pathlib import Path

import typer

from ratchet_client import Ratchet
from ratchet_client.discovery import find

MAX_RETRIES = 3  # a person waits, so report a dead service within seconds


@dataclass(frozen=True)
class Target:
    """The options before the command's name."""

    url: str | None = None
    data_dir: Path | None = None


def connect(context: typer.Context) -> Ratchet:
    """A client for the service that was named, else for the one that is found. Raises RatchetNotFound."""
    target = context.find_object(Target) or Target()
    base_url, api_key = find(target.url, data_dir=target.data_dir)
    return Ratchet(base_url, api_key, max_retries=MAX_RETRIES)
