"""The real client of the Tinker wire against `ratchet up`: Redis, a worker with torch, the API, SQLite."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tinker

from ratchet_client.discovery import find

RATCHET_UP = [sys.executable, "-P", "-m", "service.cli", "up", "--port", "0", "--data-dir"]
START_S = 90


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    data_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": self.key, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tinker_sdk")
    data_dir, log = folder / "data", folder / "up.log"
    with log.open("wb") as file:
        up = subprocess.Popen([*RATCHET_UP, str(data_dir)], stdout=file, stderr=file, cwd=folder, start_new_session=True)
    deadline = time.monotonic() + START_S
    while "is ready at" not in log.read_text():
        assert up.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    url, key = find(data_dir=data_dir)
    with pytest.MonkeyPatch.context() as patch:
        server = Server(url, key, data_dir)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    os.kill(up.pid, signal.SIGTERM)
    up.wait(60)


@pytest.fixture(scope="package")
def service(server: Server) -> Iterator[tinker.ServiceClient]:
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
