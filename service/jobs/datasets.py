"""Uploads: JSONL streamed to disk and checked line by line, so that a job never meets a broken row."""

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.orm import Session

from service.errors import BodyTooLarge, FieldError, InvalidRequest
from service.ids import new_id, utcnow
from service.spec.storable import not_storable
from service.store import datasets
from service.store.blobs import room_on
from service.store.session import Store
from service.store.tables import Dataset
from service.validation.strict_json import MAX_VALUES, BadJson, no_constant, no_key_twice, read

CHUNK_BYTES = 2**20
STORE = "the disk with the files of datasets and checkpoints (RATCHET_DATA_DIR)"
MAX_LINE_BYTES = 16 * 2**20
MAX_LINES = 10_000_000
MAX_ERRORS = 20
MAX_COLUMNS = 1000

WRONG_JSON = {
    "encoding": "not UTF-8 at byte {at}",
    "syntax": "not JSON: {what} at character {at}",
    "too_deep": "nested too deeply",
    "number": "holds an integer of more than 4300 digits",
    "key_twice": "has the key {what!r} twice",
    "too_many": "holds more than {what} values",
    "constant": "holds {what}, which is not JSON",
}
# By their first bytes: what is sent for JSONL by mistake.
OTHERS = {
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"BZh": "is compressed (bzip2); unpack it first",
    b"\xfd7zXZ\0": "is compressed (xz); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PAR1": "is a Parquet file; write its rows as JSONL",
    b"ARROW1": "is an Arrow file; write its rows as JSONL",
    b"\xff\xfe": "is UTF-16; write it as UTF-8",
    b"\xfe\xff": "is UTF-16; write it as UTF-8",
}
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


class BadLine(Exception):
    """The fault of one line."""


def ingest(
    store: Store,
    project: str,
    name: str,
    stream: Iterable[bytes] | BinaryIO,
    max_bytes: int,
    *,
    also: Callable[[Session, Dataset], None] | None = None,
) -> Dataset:
    """Store an upload of JSON objects, one per line, and add its row to the table. A failure leaves nothing behind.

    `also` runs in the transaction of the row: there an idempotency key is completed with the answer.
    `stream` gives bytes in any portions. Blank lines, a byte order mark and carriage returns are dropped. Raises
    InvalidRequest with the first MAX_ERRORS wrong lines by number, BodyTooLarge above `max_bytes`, DiskFull.
    """
    with room_on(STORE):
        folder = store.blobs.temporary_dir()
    try:
        with room_on(STORE):
            checked = _Checked(folder / "rows.jsonl")
            checked.take(_bounded(_chunks(stream), max_bytes))
            dataset_id = new_id("ds")
            path = f"datasets/{dataset_id}.jsonl"
            store.blobs.commit_file(checked.path, path)
        try:
            return _insert(store, checked, also, id=dataset_id, project=project, name=name, path=path)
        except BaseException:
            store.blobs.delete(path)
            raise
    finally:
        store.blobs.discard(folder)


def _insert(store: Store, checked: "_Checked", also: Callable[[Session, Dataset], None] | None, **names: str) -> Dataset:
    with store.begin() as session:
        dataset = Dataset(
            **names,
            rows=checked.rows,
            columns={name: {"types": sorted(types), "rows": rows} for name, (types, rows) in checked.columns.items()},
            sha256=checked.digest.hexdigest(),
            size_bytes=checked.size_bytes,
            created_at=utcnow(),
        )
        datasets.create(session, dataset)
        if also is not None:
            also(session, dataset)
    return dataset


class _Checked:
    """The file being written, and what was counted on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self.size_bytes = 0
        self.columns: dict[str, tuple[set[str], int]] = {}  # name -> types, number of rows that have it
        self.digest = hashlib.sha256()

    def take(self, chunks: Iterable[bytes]) -> None:
        errors: list[FieldError] = []
        with self.path.open("wb") as file:
            for number, line in enumerate(_lines(chunks), 1):
                if number > MAX_LINES:
                    raise _given_up(number, f"a dataset may have {MAX_LINES} lines")
                if number == 1 and (other := next((what for magic, what in OTHERS.items() if line.startswith(magic)), None)):
                    raise _given_up(number, f"the upload {other}", "bad_line")
                text = (line.removeprefix(BOM_UTF8) if number == 1 else line).strip(b" \t\r\n")
                try:
                    if text:
                        self._row(read_row(text))
                        self._write(file, text + b"\n")
                except BadLine as error:
                    errors.append(FieldError(f"/lines/{number}", str(error), "bad_line", allowed="a JSON object"))
                    if len(errors) >= MAX_ERRORS:
                        break
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            detail = f"line {errors[0].pointer.rsplit('/', 1)[1]}: {errors[0].detail}{more}"
            raise InvalidRequest(detail, errors, code="bad_dataset", hint="JSONL: one JSON object a line, in UTF-8")
        if self.rows == 0:
            raise InvalidRequest(
                "the dataset has no rows", [FieldError("", "the dataset has no rows", "empty")], code="empty_dataset",
                hint="JSONL: one JSON object a line, in UTF-8",
            )  # fmt: skip

    def _row(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            types, rows = self.columns.get(name, (set(), 0))
            types.add(TYPES[type(value)])
            self.columns[name] = (types, rows + 1)
        if len(self.columns) > MAX_COLUMNS:
            raise BadLine(f"brings the number of different columns above {MAX_COLUMNS}")
        self.rows += 1

    def _write(self, file: BinaryIO, line: bytes) -> None:
        file.write(line)
        self.digest.update(line)
        self.size_bytes += len(line)


def read_row(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises BadLine: not UTF-8, not JSON, a duplicate key, NaN, not an object, empty."""
    try:
        row = read(line, partial(json.loads, object_pairs_hook=no_key_twice, parse_constant=no_constant), MAX_VALUES)
    except BadJson as error:
        raise BadLine(WRONG_JSON[error.reason].format_map(vars(error))) from None
    if not isinstance(row, dict):
        raise BadLine(f"must be a JSON object, got {TYPES[type(row)]}")
    if not row:
        raise BadLine("is an object without a column")
    if errors := not_storable(row):
        raise BadLine(f"{errors[0].pointer} {errors[0].detail}".strip())
    return row


def _chunks(stream: Iterable[bytes] | BinaryIO) -> Iterable[bytes]:
    read = getattr(stream, "read", None)
    return iter(lambda: read(CHUNK_BYTES), b"") if read is not None else stream


def _bounded(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge(f"the dataset is larger than {max_bytes} bytes (RATCHET_MAX_DATASET_BYTES)", max_bytes=max_bytes)
        yield chunk


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends. Raises at once on a line that is too long, because lines are held in memory."""
    pending, number = bytearray(), 1
    for chunk in chunks:
        pending += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(pending).split(b"\n")
            yield from lines
            pending, number = bytearray(rest), number + len(lines)
        if len(pending) > MAX_LINE_BYTES:
            raise _given_up(number, f"line {number} is longer than {MAX_LINE_BYTES} bytes", "line_too_long")
    if pending:
        yield bytes(pending)


def _given_up(number: int, detail: str, code: str = "too_many_lines") -> InvalidRequest:
    return InvalidRequest(
        detail,
        [FieldError(f"/lines/{number}", detail, code)],
        code="bad_dataset",
        hint="JSONL: one JSON object a line, in UTF-8",
    )
