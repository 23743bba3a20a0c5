"""The `ratchet` command. It speaks HTTP through ratchet_client, like any other program."""

from service.cli.main import app

__all__ = ["app"]
