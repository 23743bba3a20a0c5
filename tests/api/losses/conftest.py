"""Loss requests over HTTP, as far as the API decides: a stand-in on the real Redis takes the orders and answers them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from chaos.standin import worker
from losses_over_http import PREFIX
from service.relay.orders import Order


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Nothing in here is stored: one kind of database is enough."""
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@pytest.fixture
def standin(api) -> Iterator[list[Order]]:
    with worker(api.settings) as seen:
        yield seen


@pytest.fixture
def store(api) -> Iterator[Any]:
    """The queue's Redis, empty before and after."""
    client = redis.Redis.from_url(api.settings.redis_url.get_secret_value(), socket_timeout=3)

    def empty() -> None:
        for key in client.scan_iter(f"{PREFIX}*"):
            client.delete(key)

    empty()
    yield client
    empty()
    client.close()
