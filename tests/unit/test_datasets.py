import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Iterable
from typing import Any

import pytest

from service.errors import BodyTooLarge, InvalidRequest
from service.jobs import datasets as uploads
from service.jobs.datasets import ingest
from service.store import datasets
from service.store.session import Store

MEGABYTE = 2**20


def upload(store: Store, *chunks: bytes, max_bytes: int = MEGABYTE) -> Any:
    return ingest(store, "default", "rows", chunks, max_bytes)


def files(store: Store) -> list[str]:
    return [path.name for path in store.blobs.root.rglob("*") if path.is_file()]


def refused(store: Store, *chunks: bytes) -> InvalidRequest:
    """The error, having made sure that the upload left nothing behind."""
    with pytest.raises(InvalidRequest) as caught:
        upload(store, *chunks)
    with store.begin(readonly=True) as session:
        assert datasets.page(session, "default") == ([], False)
    assert files(store) == []
    return caught.value


def test_rows_are_stored_and_described(lite_store: Store) -> None:
    body = b'{"q": "1+1", "a": 2}\n{"q": "2+2", "a": null, "note": [1]}\n'
    dataset = upload(lite_store, body)
    assert (dataset.rows, dataset.size_bytes, dataset.name) == (2, len(body), "rows")
    assert dataset.columns == {
        "q": {"types": ["string"], "rows": 2},
        "a": {"types": ["integer", "null"], "rows": 2},
        "note": {"types": ["array"], "rows": 1},
    }
    assert lite_store.blobs.path(dataset.path).read_bytes() == body
    assert dataset.sha256 == hashlib.sha256(body).hexdigest()
    with lite_store.begin(readonly=True) as session:
        assert datasets.get(session, "default", dataset.id).rows == 2


def test_bytes_may_come_in_any_portions(lite_store: Store) -> None:
    body = "".join(json.dumps({"q": "ä" * n}, ensure_ascii=False) + "\n" for n in range(40)).encode()
    sums = {
        upload(lite_store, *(body[i : i + size] for i in range(0, len(body), size))).sha256 for size in (1, 7, 1000, len(body))
    }
    assert sums == {hashlib.sha256(body).hexdigest()}
    assert ingest(lite_store, "default", "rows", io.BytesIO(body), MEGABYTE).rows == 40


def test_blank_lines_marks_and_carriage_returns_do_not_matter(lite_store: Store) -> None:
    dataset = upload(lite_store, b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}')
    assert lite_store.blobs.path(dataset.path).read_bytes() == b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at character 7"),
        (b"a,b,c", "not JSON"),
        (b"[1, 2]", "must be a JSON object, got array"),
        (b"null", "must be a JSON object, got null"),
        (b"{}", "is an object without a column"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "has the key 'b' twice"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1e999}', "/a holds inf, which is not a finite number"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\u0000"}', "/a holds the character NUL"),
        (b'{"a": "\\ud800"}', "/a holds half of a character"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "levels deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds an integer of more than 4300 digits"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data"),
    ],
)
def test_a_broken_line_is_named_by_its_number(line: bytes, says: str, lite_store: Store) -> None:
    error = refused(lite_store, b'{"a": 0}\n\n' + line + b'\n{"a": 3}\n')
    assert error.code == "bad_dataset"
    [field] = error.errors
    assert field.pointer == "/lines/3" and says in field.detail
    assert error.detail.startswith("line 3: ")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (gzip.compress(b'{"a": 1}\n'), "is compressed (gzip)"),
        (lzma.compress(b'{"a": 1}\n'), "is compressed (xz)"),
        (b"PAR1" + bytes(40) + b"PAR1", "is a Parquet file"),
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
    ],
)
def test_what_is_no_jsonl_at_all_is_called_by_its_name(body: bytes, says: str, lite_store: Store) -> None:
    error = refused(lite_store, body)
    assert (error.code, len(error.errors)) == ("bad_dataset", 1) and says in error.detail and error.hint is not None


def test_the_first_twenty_broken_lines_are_told(lite_store: Store) -> None:
    error = refused(lite_store, b'{"a": 1}\n' + b"nonsense\n" * 50)
    assert [field.pointer for field in error.errors] == [f"/lines/{n}" for n in range(2, 22)]
    assert "(and 19 more)" in error.detail


@pytest.mark.parametrize("body", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_upload_is_refused(body: bytes, lite_store: Store) -> None:
    assert refused(lite_store, body).code == "empty_dataset"


def test_a_line_without_an_end_is_given_up_early(lite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_LINE_BYTES", 1000)
    taken = 0

    def endless() -> Iterable[bytes]:
        nonlocal taken
        yield b'{"a": 1}\n{"b": "'
        while True:
            taken += 1
            yield b"x" * 100

    with pytest.raises(InvalidRequest, match="line 2 is longer than 1000 bytes"):
        ingest(lite_store, "default", "rows", endless(), MEGABYTE)
    assert taken < 12 and files(lite_store) == []


def test_an_upload_above_the_limit_is_given_up_early(lite_store: Store) -> None:
    with pytest.raises(BodyTooLarge, match="larger than 100 bytes"):
        upload(lite_store, *[b'{"a": 1}\n'] * 12, max_bytes=100)
    assert files(lite_store) == []
    assert upload(lite_store, *[b'{"a": 1}\n'] * 11, max_bytes=100).rows == 11


def test_a_body_that_breaks_off_leaves_nothing_behind(lite_store: Store) -> None:
    def broken() -> Iterable[bytes]:
        yield b'{"a": 1}\n'
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        ingest(lite_store, "default", "rows", broken(), MEGABYTE)
    assert files(lite_store) == []


def test_a_row_that_cannot_be_inserted_takes_its_file_along(lite_store: Store) -> None:
    def fail(session: Any, dataset: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ingest(lite_store, "default", "rows", [b'{"a": 1}\n'], MEGABYTE, also=fail)
    assert files(lite_store) == []
    with lite_store.begin(readonly=True) as session:
        assert datasets.page(session, "default") == ([], False)


def test_too_many_different_columns_are_refused(lite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_COLUMNS", 3)
    error = refused(lite_store, *[b'{"c%d": 1}\n' % n for n in range(5)])
    assert error.errors[0].pointer == "/lines/4" and "above 3" in error.errors[0].detail


def test_so_many_lines_and_no_more(lite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_LINES", 3)
    assert ingest(lite_store, "default", "rows", [b'{"a": 1}\n' * 3], 1000).rows == 3
    for lines in (b'{"a": 1}\n' * 4, b"\n" * 10):
        with pytest.raises(InvalidRequest, match="a dataset may have 3 lines") as refused:
            ingest(lite_store, "default", "rows", [lines], 1000)
        assert refused.value.errors[0].code == "too_many_lines"


def test_a_row_holds_so_many_values(lite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_VALUES", 3)
    with pytest.raises(InvalidRequest, match="line 2: holds more than 3 values"):
        ingest(lite_store, "default", "rows", [b'{"a": [1, 2, 3]}\n{"a": [1, 2, 3, 4]}\n'], 1000)
