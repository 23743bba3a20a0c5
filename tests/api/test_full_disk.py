"""A disk that is full, or a quota that is used up: 507, which says what is full, and nothing half written."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from service.edge import uploads
from service.jobs import datasets as ingesting
from service.jobs import lifecycle
from service.store.blobs import Blobs

ROWS = b'{"q": "1"}\n'
JSONL = {"Content-Type": "application/jsonl"}


def full(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def files(api):
    return sorted(str(path.relative_to(api.store.blobs.root)) for path in api.store.blobs.root.rglob("*") if path.is_file())


@pytest.fixture
def upload(api, client):
    def upload():
        before = files(api)
        answer = client.post("/v1/datasets", content=ROWS, headers={**JSONL, "Idempotency-Key": "x"})
        assert files(api) == before or answer.status_code == 201
        return answer

    return upload


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["while it comes", "while it is checked", "at the rename", "at the fsync", "for its folder"])
def test_an_upload_that_does_not_fit(client, upload, monkeypatch, where, number):
    with monkeypatch.context() as patch:
        if where == "while it comes":
            patch.setattr(uploads, "_spool", full(number))
        elif where == "while it is checked":
            patch.setattr(ingesting._Checked, "_write", full(number))
        elif where == "at the rename":
            patch.setattr(Path, "rename", full(number))
        elif where == "at the fsync":
            patch.setattr(os, "fsync", full(number))
        else:
            patch.setattr(Blobs, "temporary_dir", full(number))
        answer = upload()
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["retryable"]) == (507, "disk_full", True)
    assert "RATCHET_DATA_DIR" in problem["detail"]
    assert answer.headers["Connection"] == "close"
    assert client.get("/v1/datasets").json()["data"] == []
    assert upload().status_code == 201  # its Idempotency-Key is free, too


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_real_disk_that_takes_no_byte(client, monkeypatch):
    monkeypatch.setattr(uploads, "TemporaryFile", lambda **_: os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", 0))
    answer = client.post("/v1/datasets", content=ROWS, headers=JSONL)
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")


def test_a_form_that_does_not_fit_in_the_temporary_folder(client, monkeypatch):
    write = tempfile.SpooledTemporaryFile.write
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full(errno.ENOSPC))
    answer = client.post("/v1/datasets", files={"file": ("rows.jsonl", ROWS)})
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", write)
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert "temporary files" in answer.json()["detail"]


class PostgresFull(Exception):
    sqlstate = "53100"


@pytest.mark.parametrize("reason", [PostgresFull("could not extend file"), Exception("database or disk is full")])
def test_a_database_without_room(client, submit, monkeypatch, reason):
    def fail(*_, **__):
        raise OperationalError("INSERT", {}, reason)

    monkeypatch.setattr(lifecycle, "delete", fail)
    answer = client.delete(f"/v1/jobs/{submit()['id']}")
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert "the database" in answer.json()["detail"]


@pytest.mark.parametrize("error", [RuntimeError("planted"), OSError(errno.EIO, "planted")])
def test_after_what_nobody_expected_the_connection_is_closed_and_the_answer_says_so(client, submit, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "delete", fail)
        answer = client.delete(f"/v1/jobs/{submit()['id']}")
    assert (answer.status_code, answer.headers["Connection"]) == (500, "close")
    assert "planted" not in answer.text
    assert client.get("/v1/jobs").status_code == 200
