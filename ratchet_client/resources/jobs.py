"""Jobs: created, read, steered, deleted."""

import json
from collections.abc import Mapping
from time import monotonic
from typing import Any, Literal

from ratchet_client.resources.base import Resource, given, part
from ratchet_client.types import FINAL, Job, JobSummary, Page, Status, Validation

Spec = Mapping[str, Any] | str | bytes

LONG_POLL_S = 30.0


class Jobs(Resource):
    def create_job(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Submit a job: a dictionary, or the text of a JSON or YAML file."""
        return self._send_spec("/v1/jobs", spec, idempotency_key)

    def validate_job(self, spec: Spec) -> Validation:
        """A dry run: everything that is checked before the queue, and nothing created."""
        return self._send_spec("/v1/jobs:validate", spec, None)

    def list_jobs(
        self,
        *,
        status: Status | None = None,
        kind: str | None = None,
        tag: str | None = None,
        name: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Page[JobSummary]:
        """Newest first. `name` is a part of the name, its case ignored."""
        filters = {"status": status, "kind": kind, "tag": tag, "name": name, "after": after, "limit": limit}
        return self._get("/v1/jobs", filters)

    def get_job(self, job_id: str, *, wait_s: float | None = None, after_event: int | None = None) -> Job:
        """Read a job; with `wait_s`, answered as soon as its last_event passes `after_event`, or when the time is up."""
        params = {"wait_s": wait_s, "after_event": after_event}
        return self._get(f"/v1/jobs/{part(job_id)}", params, timeout_s=self._transport.timeout_s + (wait_s or 0.0))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Block until the job is final. Raises TimeoutError when that takes longer than `timeout_s`."""
        until = None if timeout_s is None else monotonic() + timeout_s
        job = self.get_job(job_id)
        while job["status"] not in FINAL:
            left_s = LONG_POLL_S if until is None else min(LONG_POLL_S, until - monotonic())
            if left_s <= 0:
                raise TimeoutError(f"{job_id} is still {job['status']} after {timeout_s} s")
            job = self.get_job(job_id, wait_s=left_s, after_event=job["last_event"])
        return job

    def pause_job(self, job_id: str, *, grace_seconds: float | None = None) -> Job:
        """Stop at the next step, with a checkpoint; `resume_job` goes on from there.

        A worker that needs longer than `grace_seconds` is killed, and the job rests at the checkpoint before.
        """
        return self._act(job_id, "pause", json=given(grace_seconds=grace_seconds))

    def resume_job(self, job_id: str, *, budget: Mapping[str, float | None] | None = None) -> Job:
        """Go on with a paused job. `budget` (tokens, worker_s; None: without bound) replaces the parts that it names."""
        return self._act(job_id, "resume", json=given(budget=None if budget is None else dict(budget)))

    def cancel_job(
        self,
        job_id: str,
        *,
        final_checkpoint: Literal["save", "none"] | None = None,
        grace_seconds: float | None = None,
    ) -> Job:
        """End the job. `final_checkpoint`: whether what was learnt since the last one is saved first (default: none).

        A worker that needs longer than `grace_seconds` (default: 60) is killed.
        """
        return self._act(job_id, "cancel", json=given(final_checkpoint=final_checkpoint, grace_seconds=grace_seconds))

    def fork_job(
        self,
        job_id: str,
        *,
        from_checkpoint: str | None = None,
        spec: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job that starts from a checkpoint of this one (the newest, unless named), with parts of the spec changed."""
        body = given(from_checkpoint=from_checkpoint, spec=dict(spec) if spec is not None else None)
        return self._act(job_id, "fork", json=body, idempotency_key=idempotency_key)

    def delete_job(self, job_id: str) -> None:
        """Delete a job that is over, with its events, metrics and rollouts. Its checkpoints stay."""
        self._transport.request("DELETE", f"/v1/jobs/{part(job_id)}")

    def _act(self, job_id: str, action: str, *, json: Any = None, idempotency_key: str | None = None) -> Job:
        path = f"/v1/jobs/{part(job_id)}/{action}"
        return self._transport.json("POST", path, json=json, idempotency_key=idempotency_key)

    def _send_spec(self, path: str, spec: Spec, idempotency_key: str | None) -> Any:
        if isinstance(spec, Mapping):
            return self._transport.json("POST", path, json=dict(spec), idempotency_key=idempotency_key)
        text = spec.encode() if isinstance(spec, str) else spec
        kind = "application/json" if _is_json(text) else "application/yaml"
        return self._transport.json(
            "POST", path, content=lambda: text, headers={"Content-Type": kind}, idempotency_key=idempotency_key
        )


def _is_json(text: bytes) -> bool:
    """Almost all JSON is YAML, too, but the service takes longer JSON, and parses it faster."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
