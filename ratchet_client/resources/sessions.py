"""Training sessions: made, read, driven by operations."""

import asyncio
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

from ratchet_client.resources.base import part
from ratchet_client.resources.jobs import Jobs, Spec
from ratchet_client.session import AsyncSession, Session
from ratchet_client.types import Job, JobSummary, OperationPage, OperationView, Page, Status

RECONNECT_FOR_S = 300.0


class Sessions(Jobs):
    """As jobs, sessions are also followed, paused, resumed and cancelled."""

    def session(
        self,
        session_id: str | None = None,
        *,
        idempotency_key: str | None = None,
        reconnect_for_s: float = RECONNECT_FOR_S,
        **spec: Any,
    ) -> Session:
        """Open a session by its id, or make one: `model={"source": ...}`, and what else its spec may hold (name, seed, ...).

        A session that is opened again goes on behind the last operation that it got.
        """
        return Session(self._opened(session_id, spec, idempotency_key, reconnect_for_s))

    async def async_session(
        self,
        session_id: str | None = None,
        *,
        idempotency_key: str | None = None,
        reconnect_for_s: float = RECONNECT_FOR_S,
        **spec: Any,
    ) -> AsyncSession:
        """`session` for an event loop."""
        return await asyncio.to_thread(self._opened, session_id, spec, idempotency_key, reconnect_for_s)

    def _opened(
        self, session_id: str | None, spec: dict[str, Any], idempotency_key: str | None, reconnect_for_s: float
    ) -> AsyncSession:
        if (session_id is None) == (not spec):
            raise TypeError('give either a session\'s id, or the spec of a new one: session(model={"source": "tiny"})')
        if session_id is None:
            session_id = self.create_session(spec, idempotency_key=idempotency_key)["id"]
        next_seq = self.list_operations(session_id, limit=1)["next_seq"]
        return AsyncSession(self._transport.asynchronous(), session_id, next_seq, reconnect_for_s=reconnect_for_s)

    def create_session(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Make a session: a dictionary, or the text of a JSON or YAML file."""
        return self._send_spec("/v1/sessions", spec, idempotency_key)

    def list_sessions(
        self,
        *,
        status: Status | None = None,
        tag: str | None = None,
        name: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Page[JobSummary]:
        """Newest first. `name` is a part of the name, its case ignored."""
        return self._get("/v1/sessions", {"status": status, "tag": tag, "name": name, "after": after, "limit": limit})

    def get_session(self, session_id: str) -> Job:
        return self._get(f"/v1/sessions/{part(session_id)}")

    def append_operation(self, session_id: str, operation: Mapping[str, Any], *, wait_s: float = 0.0) -> OperationView:
        """Send an operation, its `seq` included, and wait for its answer for at most `wait_s`. Sending it again is harmless."""
        return self._append(session_id, dict(operation), wait_s)

    def append_operations(
        self, session_id: str, operations: Iterable[Mapping[str, Any]], *, wait_s: float = 0.0
    ) -> list[OperationView]:
        """Several at once: all are logged, or none."""
        return self._append(session_id, {"operations": [dict(one) for one in operations]}, wait_s)["data"]

    def get_operation(self, session_id: str, operation: str | int, *, wait_s: float = 0.0) -> OperationView:
        """An operation by its id or its seq, answered as soon as it is done, or after `wait_s`."""
        path = f"/v1/sessions/{part(session_id)}/operations/{part(str(operation))}"
        return self._transport.json("GET", path, **self._waiting(wait_s))

    def list_operations(
        self,
        session_id: str,
        *,
        after: int | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        before: str | None = None,
    ) -> OperationPage:
        """In their order, without results; `after` is a seq. Newest first they are those of samplers, too, and end before the
        operation with the id `before`."""
        order = "newest_first" if newest_first else None
        query = {"after": after, "limit": limit, "order": order, "before": before}
        return self._get(f"/v1/sessions/{part(session_id)}/operations", query)

    def _append(self, session_id: str, body: dict[str, Any], wait_s: float) -> Any:
        path = f"/v1/sessions/{part(session_id)}/operations"
        return self._transport.json("POST", path, json=body, **self._waiting(wait_s))

    def _waiting(self, wait_s: float) -> dict[str, Any]:
        headers = {"Prefer": f"wait={ceil(wait_s)}"} if wait_s > 0 else {}
        return {"headers": headers, "timeout_s": self._transport.timeout_s + wait_s}
