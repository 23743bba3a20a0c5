"""Aliases over HTTP: promoted, rolled back, deleted; what they keep; where they stand for the checkpoint that they point at."""

import tarfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

import httpx
import pytest

from chaos.standin import sampler
from service.api.examples import SESSION_SPEC
from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow
from service.sessions.codec import pack, unpack
from service.store import operations

NAME = "digits@production"
TENSORS = "application/vnd.safetensors"
MODEL = {"source": "tiny", "adapter": {"kind": "lora", "rank": 4}}
Submit = Callable[..., dict[str, Any]]


@pytest.fixture
def saved(api: Any, submit: Submit) -> list[str]:
    """Three checkpoints of a job that has ended."""
    lease, _ = api.claim(submit()["id"])
    ids = [new_id("ckpt") for _ in range(3)]
    for step, id_ in enumerate(ids):
        folder = api.store.blobs.temporary_dir()
        (folder / "manifest.json").write_text("{}")
        path = f"checkpoints/{lease.job_id}/{id_}"
        api.store.blobs.commit_dir(folder, path)
        row = CheckpointRow(id_, step, "lora", MODEL, path, 2, "0" * 64, {}, True, False)
        leases.commit_checkpoint(api.store, lease, row)
    leases.succeed(api.store, lease, {}, "max_steps")
    return ids


def promote(client: httpx.Client, checkpoint: str, alias: str = NAME, **more: Any) -> httpx.Response:
    return client.put(f"/v1/aliases/{alias}", json={"checkpoint": checkpoint, **more})


def test_an_alias_from_its_making_to_its_end(client: httpx.Client, saved: list[str]) -> None:
    a, b, c = saved
    made = promote(client, a, expected="none", note="first try")
    assert made.status_code == 201
    job_id = client.get(f"/v1/checkpoints/{a}").json()["job_id"]
    facts = {"id": NAME, "checkpoint_id": a, "job_id": job_id, "step": 0, "previous_id": None, "version": 1}
    assert made.json().items() >= {**facts, "object": "alias", "note": "first try", "changed_by": "test"}.items()
    assert client.get(f"/v1/aliases/{NAME}").json() == made.json()
    again = promote(client, a, expected="none")
    assert (again.status_code, again.json()) == (200, made.json())
    moved = promote(client, b, expected=a)
    assert moved.status_code == 200
    assert (moved.json()["checkpoint_id"], moved.json()["previous_id"], moved.json()["note"]) == (b, a, None)
    late = promote(client, c, expected=a)
    assert (late.status_code, late.json()["code"], late.json()["checkpoint_id"]) == (409, "alias_moved", b)
    back = client.post(f"/v1/aliases/{NAME}/rollback", json={"note": "it loops"})
    assert (back.status_code, back.json()["checkpoint_id"], back.json()["note"]) == (200, a, "it loops")
    assert client.post(f"/v1/aliases/{NAME}/rollback").json()["code"] == "nothing_before"
    promote(client, c, "digits@staging")
    page = client.get("/v1/aliases", params={"limit": 1}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (["digits@staging"], True)
    assert [one["id"] for one in client.get("/v1/aliases", params={"after": page["last_id"]}).json()["data"]] == [NAME]
    assert client.delete(f"/v1/aliases/{NAME}", params={"expected": b}).json()["code"] == "alias_moved"
    assert client.delete(f"/v1/aliases/{NAME}", params={"expected": a, "note": "unused"}).status_code == 204
    assert client.get(f"/v1/aliases/{NAME}").status_code == 404
    history = client.get(f"/v1/aliases/{NAME}/history").json()["data"]
    told = [(one["seq"], one["action"], one["from_checkpoint_id"], one["checkpoint_id"], one["note"]) for one in history]
    assert told == [
        (4, "delete", a, None, "unused"),
        (3, "rollback", b, a, "it loops"),
        (2, "promote", a, b, None),
        (1, "promote", None, a, "first try"),
    ]
    assert {one["key_name"] for one in history} == {"test"}
    page = client.get(f"/v1/aliases/{NAME}/history", params={"limit": 1, "after": history[0]["id"]}).json()
    assert ([one["seq"] for one in page["data"]], page["has_more"]) == ([3], True)
    actions = {one["action"] for one in client.get("/v1/audit", params={"object_id": NAME}).json()["data"]}
    assert actions == {"PUT /v1/aliases/{alias}", "POST /v1/aliases/{alias}/rollback", "DELETE /v1/aliases/{alias}"}


@pytest.mark.parametrize(
    "alias",
    [
        "production",
        "ckpt_01k0000000000000000000000",
        "@production",
        "digits@",
        "a@b@c",
        ".a@b",
        "digits@pr%20d",
        "d" * 51 + "@p",
    ],
)
def test_a_name_that_could_be_something_else_is_refused(client: httpx.Client, saved: list[str], alias: str) -> None:
    refused = promote(client, saved[0], alias)
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert error["pointer"] == "/path/alias" and "digits@production" in error["detail"]


def test_the_longest_name_is_taken(client: httpx.Client, saved: list[str]) -> None:
    name = f"{'d' * 50}@{'p' * 50}"
    assert promote(client, saved[0], name).status_code == 201
    promote(client, saved[1], name)
    key = {"Idempotency-Key": "k"}
    assert client.post(f"/v1/aliases/{name}/rollback", headers=key).json()["checkpoint_id"] == saved[0]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/checkpoint"), ({"expected": "x"}, "/expected"), ({"note": "n" * 1001}, "/note"), ({"ckpt": "c"}, "/ckpt")],
)
def test_what_is_wrong_with_a_promotion_is_said(client: httpx.Client, body: dict[str, str], pointer: str) -> None:
    sent = body if pointer == "/checkpoint" else {"checkpoint": "ckpt_x", **body}
    assert client.put(f"/v1/aliases/{NAME}", json=sent).json()["errors"][0]["pointer"] == pointer


def test_a_repeated_request_with_its_key_does_nothing_again(client: httpx.Client, saved: list[str]) -> None:
    key = {"Idempotency-Key": "one"}
    for id_ in saved:
        promote(client, id_)
    first = client.post(f"/v1/aliases/{NAME}/rollback", headers=key)
    second = client.post(f"/v1/aliases/{NAME}/rollback", headers=key)
    assert first.json() == second.json() and second.headers["Idempotency-Replayed"] == "true"
    assert client.get(f"/v1/aliases/{NAME}").json()["checkpoint_id"] == saved[1]
    body = {"checkpoint": saved[2]}
    client.put(f"/v1/aliases/{NAME}", json=body, headers=key)
    promote(client, saved[0])
    assert client.put(f"/v1/aliases/{NAME}", json=body, headers=key).headers["Idempotency-Replayed"] == "true"
    assert client.get(f"/v1/aliases/{NAME}").json()["checkpoint_id"] == saved[0]  # not moved again by the repeat


def test_what_it_points_at_is_not_deleted_and_its_job_may_be(client: httpx.Client, saved: list[str]) -> None:
    promote(client, saved[0])
    promote(client, saved[0], "digits@staging")
    seen = client.get(f"/v1/checkpoints/{saved[0]}").json()
    assert seen["aliases"] == [NAME, "digits@staging"] and seen["pinned_at"] is None
    refused = client.delete(f"/v1/checkpoints/{saved[0]}").json()
    assert (refused["code"], refused["aliases"]) == ("checkpoint_aliased", [NAME, "digits@staging"])
    assert f"{NAME} and digits@staging point at" in refused["detail"]
    swept = client.post("/v1/checkpoints:delete", json={"ids": saved, "dry_run": False}).json()
    assert swept["kept"] == [{"id": saved[0], "reason": "aliased"}] and len(swept["data"]) == 2
    assert client.delete(f"/v1/jobs/{seen['job_id']}").status_code == 204
    assert client.get(f"/v1/aliases/{NAME}").json().items() >= {"checkpoint_id": saved[0], "job_id": None}.items()
    client.delete(f"/v1/aliases/{NAME}")
    client.delete("/v1/aliases/digits@staging")
    assert client.delete(f"/v1/checkpoints/{saved[0]}").status_code == 204


def test_a_checkpoint_is_read_by_an_alias(client: httpx.Client, saved: list[str]) -> None:
    promote(client, saved[1])
    assert client.get(f"/v1/checkpoints/{NAME}").json()["id"] == saved[1]
    with tarfile.open(fileobj=BytesIO(client.get(f"/v1/checkpoints/{NAME}/archive").content)) as tar:
        assert tar.getnames()[0].startswith(saved[1])
    assert saved[1] in client.get(f"/v1/checkpoints/{NAME}/card").text
    assert client.get(f"/v1/checkpoints/{NAME}/lineage").json()["data"][0]["checkpoint_id"] == saved[1]
    for write in (client.delete, client.get):
        assert write("/v1/checkpoints/digits@absent").status_code == 404
    assert client.delete(f"/v1/checkpoints/{NAME}").status_code == 404  # what is deleted is named by its id


def test_jobs_and_sessions_start_from_what_it_points_at_and_say_what_that_was(
    client: httpx.Client, submit: Submit, saved: list[str]
) -> None:
    promote(client, saved[0])
    job = submit(model={"source": None, "from_checkpoint": NAME})
    session = client.post("/v1/sessions", json=SESSION_SPEC | {"model": {"from_checkpoint": {"id": NAME}}}).json()
    promote(client, saved[1])
    for made in (job, session):
        assert made["spec"]["model"]["from_checkpoint"] == {"id": saved[0], "load": "weights"}
        assert made["from_checkpoint_id"] == saved[0]
    assert job["spec_sent"]["model"]["from_checkpoint"] == NAME
    fork = client.post(f"/v1/jobs/{job['id']}/fork").json()  # of a job that has saved nothing: where that one started
    assert fork["from_checkpoint_id"] == saved[0]
    assert client.post(f"/v1/jobs/{job['id']}/fork", json={"from_checkpoint": NAME}).json()["from_checkpoint_id"] == saved[1]


def test_where_an_alias_is_not_there_or_out_of_place_that_is_said(client: httpx.Client, spec: Submit) -> None:
    def wrong(**model: Any) -> dict[str, Any]:
        return client.post("/v1/jobs", json=spec(model=model)).json()["errors"][0]

    absent = wrong(from_checkpoint="digits@absent")
    assert (absent["pointer"], absent["code"]) == ("/model/from_checkpoint/id", "checkpoint_not_found")
    assert "no alias digits@absent in this project; it has none yet" in absent["detail"]
    assert "an alias (digits@production)" in wrong(from_checkpoint="production")["detail"]
    assert "model.from_checkpoint" in wrong(source=NAME)["detail"]


@pytest.fixture
def sends(client: httpx.Client) -> Callable[..., httpx.Response]:
    """Of a session, a `load_checkpoint` of NAME unless something else is named."""
    path = f"/v1/sessions/{client.post('/v1/sessions', json={'model': MODEL}).json()['id']}/operations"

    def send(seq: int, checkpoint: str = NAME, *, as_tensors: bool = False, **headers: str) -> httpx.Response:
        body = {"kind": "load_checkpoint", "seq": seq, "checkpoint": checkpoint}
        if as_tensors:
            return client.post(path, content=pack(body, {}), headers={"Content-Type": TENSORS, **headers})
        return client.post(path, json=body, headers=headers)

    return send


@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_session_loads_what_an_alias_pointed_at_when_the_operation_was_accepted(
    api: Any, client: httpx.Client, saved: list[str], sends: Callable[..., httpx.Response], as_tensors: bool
) -> None:
    def logged(seq: int) -> str:
        with api.store.begin(readonly=True) as sql:
            (row,) = operations.since(sql, first["session_id"], seq, limit=1)
            assert row.request is not None and row.size_bytes == len(row.request)
            return unpack(row.request)[0]["checkpoint"]

    promote(client, saved[0])
    first = sends(1, as_tensors=as_tensors).json()
    assert logged(1) == saved[0]
    promote(client, saved[1])
    assert sends(1, as_tensors=as_tensors).json()["id"] == first["id"] and logged(1) == saved[0]
    sends(2, as_tensors=as_tensors)
    assert logged(2) == saved[1]
    client.delete(f"/v1/aliases/{NAME}")
    assert sends(1, as_tensors=as_tensors).json()["id"] == first["id"]
    reused = sends(1, saved[2], as_tensors=as_tensors)
    assert (reused.status_code, reused.json()["code"]) == (422, "seq_reused")


def test_an_alias_that_a_session_cannot_load_takes_no_place(
    api: Any, client: httpx.Client, saved: list[str], sends: Callable[..., httpx.Response]
) -> None:
    promote(client, saved[0])
    wrong = sends(1, "digit@production")
    (fault,) = wrong.json()["errors"]
    assert (wrong.status_code, fault["pointer"], fault["code"]) == (422, "/checkpoint", "checkpoint_not_found")
    assert fault["detail"] == f"no alias digit@production in this project; there is {NAME}; did you mean '{NAME}'?"
    assert "an alias (digits@production)" in sends(1, "production").json()["errors"][0]["detail"]
    with api.client() as other:
        session = other.post("/v1/sessions", json={"model": MODEL}).json()
        load = {"kind": "load_checkpoint", "checkpoint": NAME}
        answer = other.post(f"/v1/sessions/{session['id']}/operations", json={"operations": [{**load, "seq": 1}]})
        (theirs,) = answer.json()["errors"]
        assert (answer.status_code, theirs["pointer"]) == (422, "/operations/0/checkpoint")
        assert theirs["detail"] == f"no alias {NAME} in this project; it has none yet"
        assert other.get(f"/v1/sessions/{session['id']}/operations").json()["next_seq"] == 1
    assert sends(1).status_code == 202


def test_openai_s_routes_answer_from_what_it_points_at_now(api: Any, client: httpx.Client, saved: list[str]) -> None:
    def answered() -> str:
        answer = client.post("/v1/completions", json={"model": NAME, "prompt": "1+1="})
        assert answer.status_code == 200, answer.text
        return answer.json()["model"]

    promote(client, saved[0])
    with sampler(api.settings) as heads:
        assert answered() == saved[0]
        promote(client, saved[1])
        assert answered() == saved[1]
        asked = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
        client.post(f"/v1/aliases/{NAME}/rollback")
        assert client.post("/v1/chat/completions", json=asked).json()["model"] == saved[0]
    assert [head["checkpoint"] for head in heads] == [saved[0], saved[1], saved[0]]
    models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert (models[NAME]["kind"], models[NAME]["root"]) == ("alias", saved[0])
    assert client.get(f"/v1/models/{NAME}").json() == models[NAME]
    absent = client.post("/v1/completions", json={"model": "digits@absent", "prompt": "1+1="}).json()["error"]
    assert absent["code"] == "model_not_found" and "digits@absent" in absent["message"]


def test_a_key_that_only_reads_cannot_promote(api: Any, client: httpx.Client, saved: list[str]) -> None:
    key = client.post("/v1/keys", json={"name": "x", "scopes": ["read"]}).json()["key"]
    with api.anonymous(**{"X-API-Key": key}) as reader:
        assert promote(reader, saved[0]).status_code == 403
