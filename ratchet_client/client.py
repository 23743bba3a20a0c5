"""`Ratchet`: every route of the service as a method."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from datetime import date, datetime
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx

from ratchet_client import archive, discovery, events, losses
from ratchet_client.errors import RatchetApiError, RatchetConnectionError
from ratchet_client.transport import Content, Transport, is_passing, pause_s
from ratchet_client.types import (
    FINAL,
    Budget,
    Checkpoint,
    Dataset,
    Event,
    Job,
    JobSummary,
    Key,
    Losses,
    Metrics,
    Model,
    NewKey,
    Page,
    Rollout,
    Scope,
    Status,
    Usage,
    Validation,
)

Spec = Mapping[str, Any] | str | bytes
Rows = Iterable[Mapping[str, Any]]

LONG_POLL_S = 30.0
STREAM_SILENCE_S = 60.0  # the service sends a keep-alive far more often
CHUNK_BYTES = 2**18


class Ratchet:
    """A connection to one Ratchet. Safe to share between threads; use it as a context manager, or `close()` it.

    Without arguments it takes RATCHET_URL and RATCHET_API_KEY, else the local stack that `ratchet up` started.
    What the service refuses is raised as RatchetApiError; connection errors, 429 and 503 are tried again first, under
    the same Idempotency-Key, so that nothing is ever created twice.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, *, timeout_s: float = 60.0, max_retries: int = 5
    ) -> None:
        if base_url is None or api_key is None:
            base_url, api_key = discovery.find(base_url, api_key)
        self._transport = Transport(base_url, api_key, timeout_s=timeout_s, max_retries=max_retries)

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    def close(self) -> None:
        self._transport.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---------------------------------------------------------------- jobs

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
        return self._get(f"/v1/jobs/{_part(job_id)}", params, timeout_s=self._transport.timeout_s + (wait_s or 0.0))

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
        return self._act(job_id, "pause", json=_given(grace_seconds=grace_seconds))

    def resume_job(self, job_id: str, *, budget: Mapping[str, float | None] | None = None) -> Job:
        """Go on with a paused job. `budget` (tokens, worker_s; None: without bound) replaces the parts that it names."""
        return self._act(job_id, "resume", json=_given(budget=None if budget is None else dict(budget)))

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
        return self._act(job_id, "cancel", json=_given(final_checkpoint=final_checkpoint, grace_seconds=grace_seconds))

    def fork_job(
        self,
        job_id: str,
        *,
        from_checkpoint: str | None = None,
        spec: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job that starts from a checkpoint of this one (the newest, unless named), with parts of the spec changed."""
        body = _given(from_checkpoint=from_checkpoint, spec=dict(spec) if spec is not None else None)
        return self._act(job_id, "fork", json=body, idempotency_key=idempotency_key)

    def delete_job(self, job_id: str) -> None:
        """Delete a job that is over, with its events, metrics and rollouts. Its checkpoints stay."""
        self._transport.request("DELETE", f"/v1/jobs/{_part(job_id)}")

    # ---------------------------------------------------------------- what a job tells

    def list_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> Page[Event]:
        """Oldest first."""
        return self._get(f"/v1/jobs/{_part(job_id)}/events", {"after": after, "limit": limit})

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
    ) -> Metrics:
        """Curves as columns. Above `points` a curve is thinned out, with the extremes kept as min and max."""
        params = {"name": list(names) or None, "from_step": from_step, "to_step": to_step, "points": points}
        return self._get(f"/v1/jobs/{_part(job_id)}/metrics", params)

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
        return self._get(f"/v1/jobs/{_part(job_id)}/rollouts", params)

    # ---------------------------------------------------------------- losses

    def losses(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        dtype: str | None = None,
        all_or_nothing: bool = False,
        on_nonfinite: str | None = None,
        wait_s: float = 30.0,
    ) -> Losses:
        """Losses, and gradients where an item's `return` names them, of batches in plain lists; rows of any lengths.

            answer = ratchet.losses([{"objective": {"preset": "gspo"}, "batch": {"log_probs": [[-2.0, -1.8], [-1.9]], ...}}])

        An item that failed has the status "error"; when none succeeded, or one failed under `all_or_nothing`, the refusal is
        raised. Non-finite numbers are the texts "NaN", "Infinity" and "-Infinity" in the answer, and may be plain ones in the
        request. Raises RatchetLossPending when the answer is not there within `wait_s`.
        """
        named = {"dtype": dtype, "on_nonfinite": on_nonfinite}
        body = {"items": [dict(item) for item in items], "all_or_nothing": all_or_nothing}
        body |= {name: value for name, value in named.items() if value is not None}
        text = json.dumps(body, separators=(",", ":")).encode()
        return self._transport.parsed(losses.ask(self._transport, text, losses.JSON, wait_s))

    def losses_safetensors(self, body: bytes, *, wait_s: float = 30.0) -> bytes:
        """The same in safetensors, both ways, for tensors of any framework. `ratchet_client.torch` does this for torch."""
        return losses.ask(self._transport, body, losses.TENSORS, wait_s).content

    def loss_request(self, loss_id: str, *, wait_s: float = 30.0) -> Losses:
        """The answer to a request whose RatchetLossPending was raised before. It is kept for some minutes."""
        return self._transport.parsed(losses.collect(self._transport, _part(loss_id), losses.JSON, wait_s))

    # ---------------------------------------------------------------- checkpoints

    def list_checkpoints(
        self, *, job_id: str | None = None, after: str | None = None, limit: int | None = None
    ) -> Page[Checkpoint]:
        return self._get("/v1/checkpoints", {"job_id": job_id, "after": after, "limit": limit})

    def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return self._get(f"/v1/checkpoints/{_part(checkpoint_id)}")

    def download_checkpoint(self, checkpoint_id: str, directory: str | Path) -> Path:
        """Unpack a checkpoint into a new folder, which peft or transformers load as it is. Returns the folder.

        Only regular files below that folder are taken; their sha256 sums are compared with the checkpoint's manifest.
        """
        directory = Path(directory)
        response = self._transport.request("GET", f"/v1/checkpoints/{_part(checkpoint_id)}/archive", stream=True)
        with closing(response):
            try:
                archive.unpack(response.iter_bytes(CHUNK_BYTES), directory)
            except httpx.TransportError as error:
                raise self._transport.unreachable(error) from error
        return directory

    def delete_checkpoint(self, checkpoint_id: str) -> None:
        self._transport.request("DELETE", f"/v1/checkpoints/{_part(checkpoint_id)}")

    def pin_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Keep it whatever comes, until `unpin_checkpoint`."""
        return self._transport.json("POST", f"/v1/checkpoints/{_part(checkpoint_id)}/pin")

    def unpin_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return self._transport.json("POST", f"/v1/checkpoints/{_part(checkpoint_id)}/unpin")

    def checkpoint_lineage(self, checkpoint_id: str) -> dict[str, Any]:
        """`data`: the checkpoint and those that it comes from, back to `base`, the model that the first job started from."""
        return self._get(f"/v1/checkpoints/{_part(checkpoint_id)}/lineage")

    def delete_checkpoints(
        self,
        *,
        ids: Iterable[str] | None = None,
        job_id: str | None = None,
        older_than_s: float | None = None,
        keep_last: int | None = None,
        final: bool | None = None,
        dry_run: bool = True,
    ) -> dict[str, Any]:
        """Delete all that fit, save what is pinned or needed; by default only say what would go."""
        which = _given(ids=None if ids is None else list(ids), job_id=job_id, older_than_s=older_than_s)
        body = {**which, **_given(keep_last=keep_last, final=final), "dry_run": dry_run}
        return self._transport.json("POST", "/v1/checkpoints:delete", json=body)

    # ---------------------------------------------------------------- datasets

    def create_dataset(self, source: str | Path | Rows, name: str, *, idempotency_key: str | None = None) -> Dataset:
        """Upload rows: the path of a JSONL file, streamed as it is, or dictionaries."""
        return self._transport.json(
            "POST",
            "/v1/datasets",
            params={"name": name},
            content=_content_of(source),
            headers={"Content-Type": "application/x-ndjson"},
            idempotency_key=idempotency_key,
        )

    def list_datasets(self, *, after: str | None = None, limit: int | None = None) -> Page[Dataset]:
        return self._get("/v1/datasets", {"after": after, "limit": limit})

    def get_dataset(self, dataset_id: str) -> Dataset:
        return self._get(f"/v1/datasets/{_part(dataset_id)}")

    def dataset_rows(self, dataset_id: str, *, offset: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        return self._get(f"/v1/datasets/{_part(dataset_id)}/rows", {"offset": offset, "limit": limit})["data"]

    def delete_dataset(self, dataset_id: str) -> None:
        self._transport.request("DELETE", f"/v1/datasets/{_part(dataset_id)}")

    # ---------------------------------------------------------------- models and keys

    def list_models(self) -> Page[Model]:
        return self._get("/v1/models")

    def create_key(
        self,
        name: str,
        *,
        project: str | None = None,
        scopes: Iterable[Scope] | None = None,
        expires_in_s: float | None = None,
        requests_per_s: float | None = None,
        burst: int | None = None,
    ) -> NewKey:
        """A new API key; its text stands in this answer and nowhere else. By default it may do everything (`admin`),
        does not expire, and has the rate that the operator has set."""
        rate = {"requests_per_s": requests_per_s, "burst": burst} if (requests_per_s, burst) != (None, None) else None
        asked = {"project": project, "scopes": list(scopes) if scopes is not None else None}
        asked |= {"expires_in_s": expires_in_s, "rate": rate}
        body = {"name": name} | {field: value for field, value in asked.items() if value is not None}
        return self._transport.json("POST", "/v1/keys", json=body)

    def list_keys(self) -> Page[Key]:
        return self._get("/v1/keys")

    def delete_key(self, key_id: str) -> None:
        """Revoke a key; it stops working at once."""
        self._transport.request("DELETE", f"/v1/keys/{_part(key_id)}")

    # ---------------------------------------------------------------- what was spent

    def usage(
        self,
        *,
        group_by: Literal["day", "job", "key"] | None = None,
        first_day: str | date | None = None,
        last_day: str | date | None = None,
        job_id: str | None = None,
        key_id: str | None = None,
        project: str | None = None,
    ) -> Usage:
        """What the project spent, by day (the default), job or API key. Days are UTC and inclusive."""
        days = {"from": first_day and str(first_day), "to": last_day and str(last_day)}
        filters = {"group_by": group_by, "job_id": job_id, "key_id": key_id, "project": project}
        return self._get("/v1/usage", {**days, **filters})

    def get_budget(self, *, project: str | None = None) -> Budget:
        return self._get("/v1/budget", {"project": project})

    def set_budget(
        self, project: str, *, tokens: int | None = None, worker_s: float | None = None, since: str | date | None = None
    ) -> Budget:
        """Replace a project's budget, with a key of the administrators' project; without bounds there is none."""
        bounds = _given(project=project, tokens=tokens, worker_s=worker_s, since=since and str(since))
        return self._transport.json("PUT", "/v1/budget", json=bounds)

    # ---------------------------------------------------------------- inside

    def _get(self, path: str, params: Mapping[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        return self._transport.json("GET", path, params=params, timeout_s=timeout_s)

    def _act(self, job_id: str, action: str, *, json: Any = None, idempotency_key: str | None = None) -> Job:
        path = f"/v1/jobs/{_part(job_id)}/{action}"
        return self._transport.json("POST", path, json=json, idempotency_key=idempotency_key)

    def _send_spec(self, path: str, spec: Spec, idempotency_key: str | None) -> Any:
        if isinstance(spec, Mapping):
            return self._transport.json("POST", path, json=dict(spec), idempotency_key=idempotency_key)
        text = spec.encode() if isinstance(spec, str) else spec
        kind = "application/json" if _is_json(text) else "application/yaml"
        return self._transport.json(
            "POST", path, content=lambda: text, headers={"Content-Type": kind}, idempotency_key=idempotency_key
        )

    def _stream(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        path = f"/v1/jobs/{_part(job_id)}/events"
        response = self._transport.request("GET", path, headers=headers, timeout_s=STREAM_SILENCE_S, stream=True)
        with closing(response):
            for sent in events.parse(response.iter_bytes()):
                yield json.loads(sent.data)


def _part(value: str) -> str:
    """An id as one segment of a path, whatever it holds."""
    return quote(value, safe="")


def _given(**values: Any) -> dict[str, Any]:
    """A body of those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _is_json(text: bytes) -> bool:
    """Almost all JSON is YAML, too, but the service takes longer JSON, and parses it faster."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _content_of(source: str | Path | Rows) -> Callable[[], Content]:
    """The upload from its beginning, each time it is asked for: an attempt may have to be repeated."""
    if isinstance(source, str | Path):
        path = Path(source)
        with path.open("rb"):  # fails here and now when it cannot be read
            return lambda: _chunks_of(path)
    text = "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_plain) + "\n" for row in source).encode()
    return lambda: text


def _chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"a row may hold JSON only, got a {type(value).__name__}")
