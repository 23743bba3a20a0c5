"""The real client of the Tinker wire against the whole service: Redis, a worker with torch, the API, SQLite."""

from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from clients.conftest import Whole


@pytest.fixture(scope="package")
def server(whole: Any) -> Iterator[Whole]:
    with whole() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_BASE_URL", running.url)
        patch.setenv("TINKER_API_KEY", running.key)
        patch.setenv("TINKER_TELEMETRY", "0")
        yield running


@pytest.fixture(scope="package")
def service(server: None) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(user_metadata={"made": "by a test"})
    yield client
    client.close("success").result()


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()


@pytest.fixture(scope="package")
def untrained(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """For tests that change no weight."""
    return service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()
