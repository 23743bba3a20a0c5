"""The API in this process and a worker in another, with a small chat model: what OpenAI's package talks to."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI
from policy_chats import chat_model
from pydantic import SecretStr

from service.app import create_app
from service.settings import Settings

KEY = "tml-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"


class Stack:
    """The API in this process, and a worker in another."""

    def __init__(self, folder: Path, template: Path, redis_url: str, **settings: Any) -> None:
        data = folder / "data"
        (data / "models").mkdir(parents=True)
        shutil.copyfile(template, data / "ratchet.db")
        chat_model(data / "models" / "sailor")
        self.settings = Settings(
            environment="development", data_dir=data, redis_url=SecretStr(redis_url), bootstrap_key=SecretStr(KEY), **settings
        )
        self.log = folder / "worker.log"
        listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(create_app(self.settings), log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not self._server.started:
            assert self._thread.is_alive(), "the API did not start"
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        variables = {
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": str(data),
            "RATCHET_REDIS_URL": redis_url,
            "RATCHET_RECONCILE_EVERY_S": "1",
            "RATCHET_SESSION_IDLE_S": "1",
            "RATCHET_SESSION_SLICE_S": "1",
            "RATCHET_DEVICE": "cpu",
        }
        argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle"]
        with self.log.open("wb") as log:
            self._worker = subprocess.Popen(argv, env={**os.environ, **variables}, stdout=log, stderr=log)

    def client(self, key: str = KEY, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"timeout": 120, "max_retries": 0, **options})

    def do(self, session: str, seq: int, **body: Any) -> dict[str, Any]:
        """An operation of a session, to its end."""
        url = f"/v1/sessions/{session}/operations"
        deadline = time.monotonic() + 240
        while (found := self.http.post(url, json={"seq": seq, **body}, headers={"Prefer": "wait=60"}).json()).get(
            "status"
        ) == "waiting":
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
        assert found.get("status") == "done", f"{found}\n{self.log.read_text()[-3000:]}"
        return found["result"]

    def stop(self) -> None:
        self._worker.send_signal(signal.SIGTERM)
        try:
            self._worker.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._server.should_exit = True
        self._thread.join(20)
