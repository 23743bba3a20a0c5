"""What a job tells: events, metrics, rollouts."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from time import monotonic, sleep

import httpx

from ratchet_client import events
from ratchet_client.errors import RatchetApiError, RatchetConnectionError
from ratchet_client.resources.base import part
from ratchet_client.resources.jobs import Jobs
from ratchet_client.transport import is_passing, pause_s
from ratchet_client.types import FINAL, Advice, Event, Metrics, Page, Rollout

STREAM_SILENCE_S = 60.0  # the service sends a keep-alive far more often


class Progress(Jobs):
    def list_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> Page[Event]:
        """Oldest first."""
        return self._get(f"/v1/jobs/{part(job_id)}/events", {"after": after, "limit": limit})

    def follow(self, job_id: str, *, after: int = 0, reconnect_for_s: float = 120.0) -> Iterator[Event]:
        """A job's events as they happen, from `after` on, until the job is over.

        A broken stream is taken up again behind the last event, so none is lost or repeated. Raises
        RatchetConnectionError when the service cannot be reached for `reconnect_for_s`.
        """
        failures, alive_at = 0, monotonic()
        while True:
            try:
                for event in self._stream(job_id, after):
                    after, failures, alive_at = event["seq"], 0, monotonic()
                    yield event
                job = self.get_job(job_id)
                if job["status"] in FINAL and job["last_event"] <= after:
                    return
                retry_after_s = None
            except RatchetApiError as error:
                if not is_passing(error):
                    raise
                retry_after_s = error.retry_after_s
            except (RatchetConnectionError, httpx.TransportError) as error:
                if monotonic() - alive_at > reconnect_for_s:
                    raise RatchetConnectionError(f"lost the events of {job_id}: {error}") from error
                retry_after_s = None
            sleep(pause_s(failures, retry_after_s))
            failures += 1

    def metrics(
        self,
        job_id: str,
        names: Iterable[str] = (),
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        newest: int | None = None,
    ) -> Metrics:
        """Curves as columns. Above `points` a curve is thinned out, with the extremes kept as min and max. `newest`: only the
        last so many points of each curve."""
        steps = {"from_step": from_step, "to_step": to_step}
        params = {"name": list(names) or None, **steps, "points": points, "newest": newest}
        return self._get(f"/v1/jobs/{part(job_id)}/metrics", params)

    def advice(self, job_id: str) -> list[Advice]:
        """What stands out in the job's curves, the warnings first."""
        answer: Page[Advice] = self._get(f"/v1/jobs/{part(job_id)}/advice")
        return answer["data"]

    def list_rollouts(
        self,
        job_id: str,
        *,
        split: str | None = None,
        step: int | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Page[Rollout]:
        params = {"split": split, "step": step, "after": after, "limit": limit}
        return self._get(f"/v1/jobs/{part(job_id)}/rollouts", params)

    def _stream(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        path = f"/v1/jobs/{part(job_id)}/events"
        response = self._transport.request("GET", path, headers=headers, timeout_s=STREAM_SILENCE_S, stream=True)
        with closing(response):
            for sent in events.parse(response.iter_bytes()):
                yield json.loads(sent.data)
