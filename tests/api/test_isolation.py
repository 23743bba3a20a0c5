"""A key sees the objects of its project and no others; without a key there is nothing to see.

Every route of the OpenAPI document is tried, on objects that really exist. A route that has no example here fails the walk.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from chaos.standin import sampler
from service.api.examples import JOB_SPEC, LOSS_REQUEST, SESSION_SPEC, TRAIN_STEP
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, RolloutRow
from service.store import keys, webhooks
from service.store.tables import ApiKey, Webhook

PUBLIC = {"GET /livez", "GET /readyz", "GET /metrics"}
JSONL = {"content": b'{"q": "1"}\n', "headers": {"Content-Type": "application/jsonl"}}
STREAM = {"headers": {"Accept": "text/event-stream"}}


ASK = [{"role": "user", "content": "hi"}]
STREAMED = {"model": "tiny", "prompt": "1+1=", "stream": True}


@dataclass(frozen=True)
class Example:
    """A request that only its key can fail: the scope that it takes, and what is sent with it."""

    scope: str
    sent: tuple[dict[str, Any], ...] = ({},)


EXAMPLES = {
    "POST /v1/jobs:validate": Example("write", ({"json": JOB_SPEC},)),
    "GET /v1/jobs": Example("read"),
    "POST /v1/jobs": Example("write", ({"json": JOB_SPEC},)),
    "GET /v1/jobs/{job_id}": Example("read", ({}, {"params": {"wait_s": 1}})),
    "DELETE /v1/jobs/{job_id}": Example("write"),
    "POST /v1/jobs/{job_id}/fork": Example("write", ({}, {"json": {"spec": {"name": "mine"}}})),
    "POST /v1/jobs/{job_id}/pause": Example("write"),
    "POST /v1/jobs/{job_id}/resume": Example("write"),
    "POST /v1/jobs/{job_id}/cancel": Example("write"),
    "GET /v1/jobs/{job_id}/events": Example("read", ({}, STREAM, {"params": {"order": "newest_first"}})),
    "GET /v1/jobs/{job_id}/metrics": Example("read"),
    "GET /v1/jobs/{job_id}/metrics/names": Example("read"),
    "GET /v1/jobs/{job_id}/attempts": Example("read"),
    "GET /v1/jobs:overview": Example("read"),
    "GET /v1/jobs/{job_id}/advice": Example("read"),
    "GET /v1/jobs/{job_id}/rollouts": Example("read"),
    "GET /v1/jobs/{job_id}/checkpoints": Example("read"),
    "GET /v1/jobs/{job_id}/checkpoints/best": Example("read"),
    "GET /v1/checkpoints": Example("read"),
    "GET /v1/checkpoints/{checkpoint_id}": Example("read"),
    "DELETE /v1/checkpoints/{checkpoint_id}": Example("write"),
    "POST /v1/checkpoints:delete": Example("write", ({"json": {"older_than_s": 0}},)),
    "GET /v1/checkpoints/{checkpoint_id}/lineage": Example("read"),
    "POST /v1/checkpoints/{checkpoint_id}/pin": Example("write"),
    "POST /v1/checkpoints/{checkpoint_id}/unpin": Example("write"),
    "GET /v1/checkpoints/{checkpoint_id}/archive": Example("read"),
    "GET /v1/checkpoints/{checkpoint_id}/card": Example("read"),
    "GET /v1/aliases": Example("read"),
    "GET /v1/aliases/{alias}": Example("read"),
    "PUT /v1/aliases/{alias}": Example("write", ({"json": {"checkpoint": "ckpt_01k1111111111111111111111"}},)),
    "DELETE /v1/aliases/{alias}": Example("write"),
    "GET /v1/aliases/{alias}/history": Example("read"),
    "POST /v1/aliases/{alias}/rollback": Example("write"),
    "GET /v1/datasets": Example("read"),
    "POST /v1/datasets": Example("write", (JSONL,)),
    "GET /v1/datasets/{dataset_id}": Example("read"),
    "DELETE /v1/datasets/{dataset_id}": Example("write"),
    "GET /v1/datasets/{dataset_id}/rows": Example("read"),
    "GET /v1/models": Example("read"),
    "GET /v1/models/{model_id}": Example("read"),
    "POST /v1/completions": Example("write", ({"json": {"model": "tiny", "prompt": "1+1="}}, {"json": STREAMED})),
    "POST /v1/chat/completions": Example("write", ({"json": {"model": "tiny", "messages": ASK}},)),
    "POST /v1/losses": Example("write", ({"json": LOSS_REQUEST},)),
    "GET /v1/losses/{loss_id}": Example("read"),
    "GET /v1/sessions": Example("read"),
    "POST /v1/sessions": Example("write", ({"json": SESSION_SPEC},)),
    "GET /v1/sessions/{session_id}": Example("read"),
    "GET /v1/sessions/{session_id}/operations": Example("read"),
    "POST /v1/sessions/{session_id}/operations": Example("write", ({"json": TRAIN_STEP | {"seq": 2}},)),
    "GET /v1/sessions/{session_id}/operations/{operation}": Example("read"),
    "GET /v1/usage": Example("read"),
    "GET /v1/budget": Example("read"),
    "PUT /v1/budget": Example("admin", ({"json": {"project": "default", "tokens": 1}},)),
    "GET /v1/workers": Example("read"),
    "GET /v1/queue": Example("read"),
    "GET /v1/keys/self": Example("read"),
    "GET /v1/keys": Example("admin"),
    "POST /v1/keys": Example("admin", ({"json": {"name": "x"}},)),
    "DELETE /v1/keys/{key_id}": Example("admin"),
    "POST /v1/keys/{key_id}/rotate": Example("admin"),
    "GET /v1/audit": Example("admin"),
    "GET /v1/files": Example("read"),
    "POST /v1/files": Example("write", ({"files": {"file": ("x.jsonl", b'{"q": "1"}')}, "data": {"purpose": "fine-tune"}},)),
    "GET /v1/files/{file_id}": Example("read"),
    "GET /v1/files/{file_id}/content": Example("read"),
    "DELETE /v1/files/{file_id}": Example("write"),
    "GET /v1/fine_tuning/jobs": Example("read"),
    "POST /v1/fine_tuning/jobs": Example("write", ({"json": {"model": "tiny", "training_file": "ds_x"}},)),
    "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}": Example("read"),
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel": Example("write"),
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause": Example("write"),
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume": Example("write"),
    "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events": Example("read"),
    "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints": Example("read"),
    "GET /v1/webhooks": Example("read"),
    "POST /v1/webhooks": Example("write", ({"json": {"url": "https://example.com/hook"}},)),
    "GET /v1/webhooks/{webhook_id}": Example("read"),
    "PATCH /v1/webhooks/{webhook_id}": Example("write", ({"json": {"description": "mine"}},)),
    "DELETE /v1/webhooks/{webhook_id}": Example("write"),
    "POST /v1/webhooks/{webhook_id}/rotate": Example("write"),
    "POST /v1/webhooks/{webhook_id}/test": Example("write"),
    "GET /v1/webhooks/{webhook_id}/deliveries": Example("read"),
    "GET /v1/webhooks/{webhook_id}/deliveries/{delivery_id}": Example("read"),
    "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver": Example("write"),
}
OPERATORS = {"PUT /v1/budget"}  # for keys of the administrators' project only
OF_A_FILE = {"POST /v1/fine_tuning/jobs"}  # what it trains on must be there first
ABSENT = {
    "job_id": "job_01k0000000000000000000000",
    "checkpoint_id": "ckpt_01k0000000000000000000000",
    "dataset_id": "ds_01k0000000000000000000000",
    "alias": "absent@production",
    "key_id": "key_01k0000000000000000000000",
    "loss_id": "loss_01k00000000000000000000000",
    "session_id": "job_01k0000000000000000000001",
    "operation": "op_01k00000000000000000000000",
    "model_id": "ckpt_01k0000000000000000000000",
    "file_id": "ds_01k0000000000000000000001",
    "fine_tuning_job_id": "job_01k0000000000000000000002",
    "webhook_id": "whk_01k00000000000000000000000",
    "delivery_id": "msg_01k00000000000000000000000",
}
# What stays of answers that say when something was seen, or how long it waits.
MOVING = {
    "GET /v1/keys": lambda body: sorted(one["id"] for one in body["data"]),
    "GET /v1/keys/self": lambda body: body["id"],
    "GET /v1/workers": lambda body: sorted((one["id"], *one["job_ids"]) for one in body["data"]),
    "GET /v1/queue": lambda body: body["jobs"],
}
MARK = "only-for-its-owner"  # in everything of the owner's that has a text


@pytest.fixture(scope="module", autouse=True)
def _sampler(api):
    with sampler(api.settings):
        yield


@pytest.fixture(scope="module")
def routes(api) -> list[str]:
    """Every operation that the document names, as METHOD /path."""
    return [f"{method.upper()} {path}" for path, methods in api.app.openapi()["paths"].items() for method in methods]


@pytest.fixture
def owned(api, client, submit):
    """Objects of `client`'s project, by the name that they have in paths."""
    job = submit(name=MARK, metadata={"note": MARK}, tags=[MARK])
    lease, _ = api.claim(job["id"])
    samples = [{"text": MARK, "reward": 1.0, "scores": {}, "tokens": 1, "finish_reason": "stop"}]
    leases.commit_step(api.store, lease, 1, {"reward/mean": 0.5}, [RolloutRow("train", 1, 0, MARK, None, samples)])
    checkpoint_id = new_id("ckpt")
    folder = api.store.blobs.temporary_dir()
    (folder / "manifest.json").write_text("{}")
    path = f"checkpoints/{job['id']}/{checkpoint_id}"
    api.store.blobs.commit_dir(folder, path)
    row = CheckpointRow(checkpoint_id, 1, "full", {"source": "tiny"}, path, 2, "0" * 64, {"eval/reward/mean": 0.5}, True, True)
    leases.commit_checkpoint(api.store, lease, row)
    leases.succeed(api.store, lease, {}, "max_steps")
    alias = "theirs@production"
    promoted = client.put(f"/v1/aliases/{alias}", json={"checkpoint": checkpoint_id, "note": MARK})
    assert promoted.status_code == 201, promoted.text
    rows = client.post("/v1/datasets", params={"name": MARK}, **JSONL).json()
    key = client.post("/v1/keys", json={"name": MARK}).json()
    loss = client.post("/v1/losses", json=LOSS_REQUEST).json()
    ids = {"job_id": job["id"], "checkpoint_id": checkpoint_id, "dataset_id": rows["id"], "alias": alias}
    session = client.post("/v1/sessions", json=SESSION_SPEC | {"name": MARK}).json()
    operation = client.post(f"/v1/sessions/{session['id']}/operations", json=TRAIN_STEP).json()
    ids |= {"session_id": session["id"], "operation": operation["id"]}
    pairs = {"file": (MARK, b'{"prompt": "1+1=", "completion": "2"}')}
    file = client.post("/v1/files", files=pairs, data={"purpose": "fine-tune"}).json()["id"]
    tuning = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file, "suffix": MARK}).json()["id"]
    ids |= {"file_id": file, "fine_tuning_job_id": tuning}
    hook = {"url": f"https://example.com/{MARK}", "description": MARK, "events": ["webhook.disabled"]}
    webhook = client.post("/v1/webhooks", json=hook).json()
    delivery = _delivered(api, webhook["id"])
    ids |= {"webhook_id": webhook["id"], "delivery_id": delivery}
    return ids | {"key_id": key["id"], "loss_id": loss["id"], "model_id": checkpoint_id}


def _delivered(api, webhook_id):
    """A delivery that nobody sends: it is over."""
    with api.store.begin() as session:
        row = webhooks.test(session, session.get(Webhook, webhook_id), utcnow())
        row.status = "delivered"
    return row.id


def tries(routes: list[str], *, with_id: bool | None = None) -> Iterator[tuple[str, Example, dict[str, Any]]]:
    """Each closed route with each request of its example."""
    for route in routes:
        if route not in PUBLIC and with_id in (None, "{" in route):
            for sent in EXAMPLES[route].sent:
                yield route, EXAMPLES[route], sent


def ask(client, route, sent, ids=ABSENT):
    method, path = route.split()
    return client.request(method, path.format(**ids), **sent)


def plain(answer, ids):
    """An answer without what may differ: the ids that were asked for, and the request's own."""
    text = answer.text
    for name, one in ids.items():
        text = text.replace(one, name)
    body = json.loads(text)
    body.pop("request_id", None)
    return answer.status_code, answer.headers["content-type"], body


def code(answer):
    """The error's code, in the shape of any face."""
    return answer.json()["error"]["code"]


# ---------------------------------------------------------------- the walk


def test_every_route_has_an_example(routes):
    missing = set(routes) - set(EXAMPLES) - PUBLIC
    assert not missing, f"add to EXAMPLES how these are called, and what they take: {sorted(missing)}"
    assert set(EXAMPLES) <= set(routes), "these routes are gone"


def test_a_new_route_without_an_example_fails_the_walk(routes):
    with pytest.raises(AssertionError, match="add to EXAMPLES"):
        test_every_route_has_an_example([*routes, "GET /v1/secrets"])
    with pytest.raises(KeyError):
        list(tries([*routes, "GET /v1/secrets"]))


def test_another_project_s_objects_look_like_absent_ones(client, other, owned, routes):
    before = everything(client, routes, owned)
    for route, _, sent in tries(routes, with_id=True):
        theirs, absent = ask(other, route, sent, owned), ask(other, route, sent, ABSENT)
        assert (theirs.status_code, code(theirs)) in ((404, "not_found"), (404, "model_not_found")), route
        assert plain(theirs, owned) == plain(absent, ABSENT), route
    assert everything(client, routes, owned) == before  # and nothing of it happened
    for name in ("job_id", "checkpoint_id", "dataset_id", "alias", "key_id"):
        assert owned[name] in json.dumps(before), "a negative control: their owner sees them all"


def everything(client, routes, owned):
    """All that the owner can read."""
    got = {}
    for route, _, sent in tries([route for route in routes if route.startswith("GET")]):
        answer = ask(client, route, {} if sent is STREAM else sent, owned)
        assert answer.status_code in (200, 202), f"{route}: {answer.text}"
        got[route] = answer.text if route not in MOVING else MOVING[route](answer.json())
    return got


def test_what_is_listed_or_made_is_of_one_s_own_project(other, owned, routes):
    for route, _, sent in tries(routes, with_id=False):
        answer = ask(other, route, sent)
        fine = (403,) if route in OPERATORS else (400,) if route in OF_A_FILE else (200, 201, 202)
        assert answer.status_code in fine, f"{route}: {answer.text}"
        for hidden in (MARK, *owned.values()):
            assert hidden not in answer.text, route


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [("none", 401, "missing_api_key"), ("revoked", 401, "invalid_api_key"), ("expired", 401, "expired_api_key")],
)
def test_without_a_key_in_force_every_route_is_closed(api, client, owned, routes, kind, status, code):
    project = client.get("/v1/keys").json()["data"][0]["project"]  # the very project whose objects are asked for
    before = everything(client, routes, owned)
    with api.store.begin() as session:
        key, text = keys.create(session, project=project, name="x")
        row = session.get(ApiKey, key.id)
        assert row is not None
        row.revoked_at = utcnow() if kind == "revoked" else None
        row.expires_at = utcnow() - timedelta(seconds=1) if kind == "expired" else None
    with api.anonymous(**({} if kind == "none" else {"X-API-Key": text})) as stranger:
        for route, _, sent in tries(routes):
            answer = ask(stranger, route, sent, owned)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), f"{route}: {answer.text}"
            assert MARK not in answer.text
        for route in PUBLIC:
            assert ask(stranger, route, {}).status_code == 200
    with api.store.begin() as session:
        session.delete(session.get(ApiKey, key.id))
    assert everything(client, routes, owned) == before


@pytest.mark.parametrize("scope", ["read", "write"])
def test_without_the_scope_a_route_is_closed_and_names_it(api, client, owned, routes, scope):
    made = client.post("/v1/keys", json={"name": "x", "scopes": [scope]}).json()
    before = everything(client, routes, owned)
    with api.anonymous(**{"X-API-Key": made["key"]}) as narrow:
        for route, example, sent in tries(routes):
            if example.scope not in made["scopes"]:
                answer = ask(narrow, route, sent, owned)
                assert (answer.status_code, code(answer)) == (403, "scope_missing"), f"{route}: {answer.text}"
                assert f"the scope {example.scope!r}" in answer.json()["error"]["message"]
            elif route.startswith("GET"):
                assert ask(narrow, route, {} if sent is STREAM else sent, owned).status_code in (200, 202), route
    assert everything(client, routes, owned) == before


# ---------------------------------------------------------------- ids that are not in a path


def test_another_project_s_objects_are_no_filters_and_no_cursors(client, other, owned):
    places = [
        ("/v1/jobs", "after", "job_id"),
        ("/v1/datasets", "after", "dataset_id"),
        ("/v1/checkpoints", "after", "checkpoint_id"),
        ("/v1/checkpoints", "job_id", "job_id"),
        ("/v1/aliases", "after", "alias"),
    ]
    for path, parameter, name in places:
        assert client.get(path, params={parameter: owned[name]}).status_code == 200
        theirs = other.get(path, params={parameter: owned[name]})
        absent = other.get(path, params={parameter: ABSENT[name]})
        assert theirs.status_code == (404 if parameter == "job_id" else 422)
        assert plain(theirs, owned) == plain(absent, ABSENT)


def test_another_project_s_objects_are_no_inputs(client, other, owned, submit, spec):
    mine = other.post("/v1/jobs", json=spec()).json()["id"]

    def asked(ids):
        rows = {"source": "dataset", "id": ids["dataset_id"]}
        yield "/v1/jobs", spec(data={"train": rows})
        yield "/v1/jobs", spec(data={"eval": rows})
        yield "/v1/jobs", spec(model={"from_checkpoint": ids["checkpoint_id"]})
        yield "/v1/jobs", spec(model={"from_checkpoint": ids["alias"]})
        yield f"/v1/jobs/{mine}/fork", {"from_checkpoint": ids["checkpoint_id"]}
        yield "/v1/jobs:validate", spec(data={"train": rows})

    for (path, theirs), (_, absent) in zip(asked(owned), asked(ABSENT), strict=True):
        refused = other.post(path, json=theirs)
        assert refused.status_code == 422, refused.text
        assert plain(refused, owned) == plain(other.post(path, json=absent), ABSENT)


def test_another_project_s_keys_are_no_more_there_than_those_of_no_project(client, other):
    theirs = client.get("/v1/keys").json()["data"][0]["project"]
    for method in ("GET", "POST", "DELETE"):
        path = "/v1/keys/key_x" if method == "DELETE" else "/v1/keys"
        got = []
        for project in (theirs, "nobody-s"):
            sent = {"json": {"name": "x", "project": project}} if method == "POST" else {"params": {"project": project}}
            got.append(other.request(method, path, **sent))
        assert got[0].status_code == 403
        assert plain(got[0], {}) == plain(got[1], {})


def test_an_idempotency_key_is_a_project_s_own(client, other, spec):
    sent = {"json": spec(name=MARK), "headers": {"Idempotency-Key": "one"}}
    first, second = client.post("/v1/jobs", **sent), other.post("/v1/jobs", **sent)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
