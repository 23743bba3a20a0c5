"""Blobs in a bucket, by a real S3 server: what one machine wrote another one reads, whole or not at all."""

import hashlib
import json
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from service.errors import BucketRefused, BucketUnavailable
from service.ids import new_id, utcnow
from service.jobs import datasets, reconciler
from service.local import backup, doctor
from service.settings import Settings
from service.store import bucket
from service.store.blobs import Blobs
from service.store.bucket import Bucket
from service.store.session import open_store

URL = "s3://models/blobs"
CHECKPOINT = "checkpoints/job_1/ckpt_1"
TEXTS = {"model/a.txt": "weights", "b.txt": ""}
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture(params=[URL, "gs://models/blobs"])
def machines(s3: Any, tmp_path: Path, request: Any) -> tuple[Blobs, Blobs]:
    """Two that share the bucket and no disk."""
    return Blobs(tmp_path / "one", Bucket(request.param)), Blobs(tmp_path / "other", Bucket(request.param))


def keys(s3: Any) -> set[str]:
    return {each["Key"].removeprefix("blobs/") for each in s3.list_objects_v2(Bucket="models").get("Contents", ())}


def write(blobs: Blobs, relative: str = CHECKPOINT) -> Path:
    folder = blobs.temporary_dir()
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    files = {
        name: {"sha256": hashlib.sha256(text.encode()).hexdigest(), "size_bytes": len(text)} for name, text in TEXTS.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return blobs.commit_dir(folder, relative)


def read(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    files.pop("manifest.json", None)
    return files


def test_a_folder_of_one_machine_is_read_on_another(machines: tuple[Blobs, Blobs], s3: Any, monkeypatch: Any) -> None:
    one, other = machines
    write(one)
    monkeypatch.setattr(bucket, "PART_BYTES", 3)  # each file in several requests
    folder = other.fetch(CHECKPOINT)
    assert folder.is_relative_to(other.root) and read(folder) == TEXTS
    assert keys(s3) == {f"{CHECKPOINT}/{name}" for name in (*TEXTS, "manifest.json")}
    s3.delete_object(Bucket="models", Key=f"blobs/{CHECKPOINT}/manifest.json")
    assert other.fetch(CHECKPOINT) == folder and read(folder) == TEXTS  # it is here: nobody is asked
    assert list((other.root / "tmp").iterdir()) == []


def test_half_a_folder_and_an_altered_one_are_not_there(machines: tuple[Blobs, Blobs], s3: Any, tmp_path: Path) -> None:
    one, other = machines
    assert not other.fetch(CHECKPOINT).exists()
    write(one)
    s3.put_object(Bucket="models", Key=f"blobs/{CHECKPOINT}/model/a.txt", Body=b"evil")
    with pytest.raises(BucketUnavailable, match="another sha256"):
        other.fetch(CHECKPOINT)
    s3.delete_object(Bucket="models", Key=f"blobs/{CHECKPOINT}/model/a.txt")
    assert not other.fetch(CHECKPOINT).exists()
    s3.put_object(Bucket="models", Key="blobs/checkpoints/j/c/manifest.json", Body=b'{"files": {"../../x": {"sha256": ""}}}')
    with pytest.raises(BucketRefused, match="outside"):
        other.fetch("checkpoints/j/c")
    assert list((other.root / "tmp").iterdir()) == []


def test_a_broken_copy_is_fetched_anew(machines: tuple[Blobs, Blobs]) -> None:
    one, other = machines
    write(one)
    (other.fetch(CHECKPOINT) / "model" / "a.txt").write_text("torn")
    assert read(other.fetch(CHECKPOINT, anew=True)) == TEXTS


def test_what_is_deleted_leaves_the_bucket_and_its_neighbours_stay(machines: tuple[Blobs, Blobs], s3: Any) -> None:
    one, _ = machines
    write(one)
    write(one, f"{CHECKPOINT}0")
    one.delete(CHECKPOINT)
    one.delete(CHECKPOINT)
    assert keys(s3) == {f"{CHECKPOINT}0/{name}" for name in (*TEXTS, "manifest.json")}


@SQLITE
def test_a_dataset_goes_the_same_way_and_the_sweep_finds_what_no_row_names(s3: Any, settings: Settings, tmp_path: Path) -> None:
    mine = settings.model_copy(update={"blob_url": URL})
    store = open_store(mine)
    other = open_store(mine.model_copy(update={"data_dir": tmp_path / "other"}))
    dataset = datasets.ingest(store, "default", "rows", iter([b'{"q": 1}\n']), 1000)
    assert other.blobs.fetch(dataset.path).read_text() == '{"q": 1}\n'
    left = f"datasets/{new_id('ds')}.jsonl"
    s3.put_object(Bucket="models", Key=f"blobs/{left}", Body=b"{}")
    s3.put_object(Bucket="models", Key="blobs/notes.txt", Body=b"not ours")
    assert reconciler.sweep(other, utcnow()) == []
    later = utcnow() + timedelta(days=2)
    assert reconciler.sweep(other, later) == [left] and keys(s3) == {dataset.path, "notes.txt"}
    s3.delete_object(Bucket="models", Key=f"blobs/{dataset.path}")
    s3.put_object(Bucket="models", Key=f"blobs/{left}", Body=b"{}")
    assert reconciler.sweep(other, later) == [] and left in keys(s3)  # a bucket of which the database knows nothing
    store.close()
    other.close()


@SQLITE
def test_a_backup_copies_the_bucket_and_is_restored_into_one_that_holds_nothing_else(
    s3: Any, settings: Settings, tmp_path: Path
) -> None:
    served = settings.model_copy(update={"blob_url": URL})
    store = open_store(served)
    kept = datasets.ingest(store, "default", "rows", iter([b'{"q": 1}\n']), 1000)
    store.blobs.forget(kept.path)
    backup.backup(served, tmp_path / "copy")
    assert not store.blobs.path(kept.path).exists()  # it went straight into the backup
    store.close()
    there = {"data_dir": tmp_path / "new", "database_url": SecretStr(f"sqlite:///{tmp_path / 'new.db'}")}
    write(Blobs(tmp_path / "stranger", Bucket(URL)))
    with pytest.raises(backup.BackupFailed, match=f"holds 1 blob .* such as {CHECKPOINT}"):
        backup.restore(served.model_copy(update=there), tmp_path / "copy")
    assert not (tmp_path / "new.db").exists()
    empty = served.model_copy(update={**there, "blob_url": "s3://models/other"})
    backup.restore(empty, tmp_path / "copy")
    Bucket("s3://models/other").get(kept.path, tmp_path / "rows")
    assert (tmp_path / "rows").read_bytes() == b'{"q": 1}\n'


def test_copies_that_nobody_uses_are_removed_from_this_machine_alone(machines: tuple[Blobs, Blobs], s3: Any) -> None:
    one, _ = machines
    folder = write(one)
    assert list(one.unused({CHECKPOINT}, since=folder.stat().st_mtime)) == []
    assert list(one.unused({CHECKPOINT, "checkpoints/a/b"}, since=folder.stat().st_mtime + 1)) == [CHECKPOINT]
    one.forget(CHECKPOINT)
    assert not folder.exists() and f"{CHECKPOINT}/manifest.json" in keys(s3) and read(one.fetch(CHECKPOINT)) == TEXTS


@pytest.fixture
def forbidding() -> Iterator[str]:
    """A server that refuses everybody, and repeats what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = (
                f"<Error><Code>AuthenticationFailed</Code><Message>{self.headers['Authorization']}</Message></Error>".encode()
            )
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bucket_that_is_not_there_forbids_or_is_away_is_told_apart_and_the_doctor_sees_it(
    s3: Any, forbidding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 0, "retry_timeout": timedelta(seconds=1)})

    def told(url: str) -> tuple[str, str, bool]:
        blobs = Blobs(tmp_path / "blobs", Bucket(url))
        with pytest.raises((BucketRefused, BucketUnavailable)) as raised:
            write(blobs)
        assert not blobs.path(CHECKPOINT).exists()
        (seen,) = doctor._bucket(Settings(data_dir=tmp_path, blob_url=url))
        assert seen.status == "error" and seen.remedy
        return raised.value.detail + seen.detail + seen.remedy, raised.value.code, raised.value.retryable

    assert [one.status for one in doctor._bucket(Settings(data_dir=tmp_path, blob_url=URL)) if one.check == "bucket"] == ["ok"]
    assert keys(s3) == set()
    detail, code, retryable = told("s3://nobody/blobs")
    assert "NoSuchBucket" in detail and (code, retryable) == ("bucket_refused", False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", forbidding)
    detail, code, retryable = told(URL)
    assert "AuthenticationFailed" in detail and (code, retryable) == ("bucket_refused", False)
    assert "somebody" not in detail and "Signature" not in detail
    monkeypatch.setenv("GOOGLE_BASE_URL", forbidding)
    assert told("gs://models/blobs")[1:] == ("bucket_refused", False)
    for name, value in {"ACCOUNT_NAME": "somebody", "ACCOUNT_KEY": "aHVzaA==", "ENDPOINT": forbidding}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    detail, code, retryable = told("az://models/blobs")
    assert "AuthenticationFailed" in detail and (code, retryable) == ("bucket_refused", False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    detail, code, retryable = told(URL)
    assert (code, retryable) == ("bucket_unavailable", True)


@pytest.mark.parametrize("url", ["/a/folder", "ftp://models", "s3://", "s3://me:hush@models", "az://a/c?sig=hush"])
def test_a_url_that_names_no_bucket_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="RATCHET_BLOB_URL") as raised:
        Settings(blob_url=url)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("az://models", {}),
        ("az://models", {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "hush hush!"}),
        ("gs://models", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/hush.json"}),
    ],
)
def test_a_bucket_that_cannot_be_opened_says_which_variables_are_meant(
    url: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BucketRefused, match="cannot be opened") as raised:
        Bucket(url)
    assert raised.value.hint is not None and all(name in raised.value.hint for name in variables)
    assert "hush" not in raised.value.detail
