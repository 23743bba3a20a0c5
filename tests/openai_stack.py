"""What OpenAI's package talks to: the whole service with a small chat model."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
from openai import OpenAI
from policy_chats import chat_model


class Stack:
    def __init__(self, whole: Any) -> None:
        self.url, self.key, self.log, self.settings = whole.url, whole.key, whole.log, whole.settings
        chat_model(self.settings.local_models_dir / "sailor")
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {whole.key}"}, timeout=120)

    def client(self, key: str | None = None, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, **{"timeout": 120, "max_retries": 0, **options})

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


@contextmanager
def openai_stack(whole: Callable[..., AbstractContextManager[Any]], **settings: Any) -> Iterator[Stack]:
    with whole(settings, RATCHET_SESSION_IDLE_S="1", RATCHET_SESSION_SLICE_S="1") as running:
        yield Stack(running)
