"""What callers send stands in no log, whatever becomes of the request; and no text of theirs makes lines of its own."""

import io
import logging
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError, OperationalError

from service.errors import LeaseLost
from service.jobs import lifecycle
from service.settings import Settings
from service.store import jobs
from service.telemetry import JsonFormatter, PlainFormatter, Scrubber

PLANTED = "planted-7d20c1"
METADATA = {"note": f"{PLANTED}\n09:00:00 ERROR   service: forged\x1b[31m"}


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """All that is logged meanwhile, by both formatters."""
    written, root = io.StringIO(), logging.getLogger()
    handlers = [logging.StreamHandler(written) for _ in range(2)]
    for handler, formatter in zip(handlers, (PlainFormatter, JsonFormatter), strict=True):
        handler.setFormatter(formatter(Scrubber(Settings())))
        root.addHandler(handler)
    yield written
    for handler in handlers:
        root.removeHandler(handler)


def broken_statement(store, error):
    """A statement with what was sent, which this real database refuses, or a fault of the drivers' own."""
    if error == "conflict":
        with store.begin() as session:
            columns = "INSERT INTO datasets (id, project, name) VALUES (:id, 'p', :name)"  # what is not null is missing
            session.execute(text(columns), {"id": "ds_x", "name": PLANTED})
    if error == "no such table":
        with store.begin() as session:
            session.execute(text("INSERT INTO nowhere VALUES (:name)"), {"name": PLANTED})
    kind = {"away": OperationalError, "data": DataError}[error]
    raise kind("INSERT INTO jobs VALUES (%(m)s)", {"m": PLANTED}, Exception("refused"), hide_parameters=True)


@pytest.mark.parametrize(("error", "status"), [("conflict", 409), ("no such table", (500, 503)), ("away", 503), ("data", 500)])
def test_an_error_of_the_database(each_api, spec, monkeypatch, logged, error, status):
    monkeypatch.setattr(lifecycle, "create_job", lambda store, *_, **__: broken_statement(store, error))
    with each_api.client() as client:
        answer = client.post("/v1/jobs", json=spec(metadata=METADATA))
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert logged.getvalue(), "it is logged"
    assert PLANTED not in logged.getvalue() and PLANTED not in answer.text


def test_a_race_that_the_database_decides(each_api, spec, monkeypatch, logged):
    """The parent goes in between, and nothing looks: the foreign key does."""
    create_job = lifecycle.create_job

    def after_the_delete(*arguments, **named):
        lifecycle.delete(each_api.store, named["project"], named["parent_id"])
        return create_job(*arguments, **named)

    with each_api.client() as client:
        parent = client.post("/v1/jobs", json=spec(metadata=METADATA)).json()["id"]
        client.post(f"/v1/jobs/{parent}/cancel")
        monkeypatch.setattr(jobs, "hold", lambda *_: None)
        monkeypatch.setattr(lifecycle, "create_job", after_the_delete)
        answer = client.post(f"/v1/jobs/{parent}/fork")
    assert (answer.status_code, answer.json()["code"]) == (409, "changed_meanwhile")
    assert "IntegrityError" in logged.getvalue()
    assert PLANTED not in logged.getvalue() and PLANTED not in answer.text


@pytest.mark.parametrize("body", [{"kind": PLANTED}, {"metadata": METADATA, "kind": "rl"}, [PLANTED], PLANTED])
def test_a_body_that_is_refused(client, logged, body):
    answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": PLANTED, "X-Odd": PLANTED})
    assert answer.status_code == 422, answer.text
    assert client.post("/v1/jobs", content=PLANTED).status_code == 400
    assert client.get(f"/v1/jobs/{PLANTED}").status_code == 404
    assert client.get("/v1/jobs", params={"name": PLANTED, PLANTED: "1"}).status_code == 422
    assert PLANTED not in logged.getvalue()


def test_a_text_that_forges_lines_makes_none(api, client, spec, monkeypatch, logged):
    def fail(*_, **__):
        raise LeaseLost("the reward service says: x\n09:00:00 ERROR   service: forged\x1b[31m\u202e")

    monkeypatch.setattr(lifecycle, "create_job", fail)
    assert client.post("/v1/jobs", json=spec()).status_code == 500
    lines = logged.getvalue().split("\n")
    assert any("forged" in line for line in lines)
    assert not any(line.startswith("09:00:00 ERROR   service: forged") for line in lines)
    assert all(line.isprintable() for line in lines)
