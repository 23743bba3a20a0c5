"""Datasets: uploaded, looked into, deleted."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ratchet_client.resources.base import CHUNK_BYTES, Resource, part
from ratchet_client.transport import Content
from ratchet_client.types import Dataset, Page

Rows = Iterable[Mapping[str, Any]]


class Datasets(Resource):
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
        return self._get(f"/v1/datasets/{part(dataset_id)}")

    def dataset_rows(self, dataset_id: str, *, offset: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        return self._get(f"/v1/datasets/{part(dataset_id)}/rows", {"offset": offset, "limit": limit})["data"]

    def delete_dataset(self, dataset_id: str) -> None:
        self._transport.request("DELETE", f"/v1/datasets/{part(dataset_id)}")


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
