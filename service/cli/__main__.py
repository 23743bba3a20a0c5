"""`python -m service.cli` is the `ratchet` command."""

from service.cli import app

app()
