"""A key sees the objects of its project and no others; without a key there is nothing to see."""

import json

import pytest

from service.api import checkpoints, datasets, dry_run, events, jobs, keys, metrics, models, rollouts
from service.ids import new_id
from service.jobs import lease as leases
from service.store.checkpoints import CheckpointRow

RESOURCES = (dry_run, jobs, events, metrics, rollouts, checkpoints, datasets, models, keys)
ROUTES = [(method, route.path) for one in RESOURCES for route in one.router.routes for method in sorted(route.methods)]
WITH_ID = [(method, path) for method, path in ROUTES if "{" in path]


@pytest.fixture
def owned(api, client, submit):
    """Objects of `client`'s project, by the name that they have in paths."""
    job = submit()
    lease, _ = api.claim(job["id"])
    checkpoint_id = new_id("ckpt")
    folder = api.store.blobs.temporary_dir()
    (folder / "manifest.json").write_text("{}")
    path = f"checkpoints/{job['id']}/{checkpoint_id}"
    api.store.blobs.commit_dir(folder, path)
    row = CheckpointRow(checkpoint_id, 1, "full", {"source": "tiny"}, path, 2, "0" * 64, {}, True, True)
    leases.commit_checkpoint(api.store, lease, row)
    leases.succeed(api.store, lease, {}, "max_steps")
    rows = client.post("/v1/datasets", content=b'{"q": "1"}\n', headers={"Content-Type": "application/jsonl"}).json()
    key = client.post("/v1/keys", json={"name": "second"}).json()
    return {"job_id": job["id"], "checkpoint_id": checkpoint_id, "dataset_id": rows["id"], "key_id": key["id"]}


def test_there_are_routes_to_try():
    assert len(ROUTES) >= 25
    assert len(WITH_ID) >= 17


def test_another_project_s_objects_are_not_there(client, other, owned):
    for method, path in WITH_ID:
        answer = other.request(method, path.format(**owned))
        assert answer.status_code == 404, f"{method} {path}: {answer.status_code}"
        assert answer.json()["code"] == "not_found"
    for method, path in WITH_ID:  # a negative control: their owner finds them all, and they are all untouched
        if method == "GET":
            assert client.get(path.format(**owned)).status_code == 200, path
    assert client.get("/v1/keys").json()["data"][0]["id"] == owned["key_id"]


def test_another_project_s_objects_are_in_no_list(other, owned):
    for path in ("/v1/jobs", "/v1/datasets", "/v1/checkpoints"):
        assert other.get(path).json()["data"] == []
    assert owned["key_id"] not in json.dumps(other.get("/v1/keys").json())
    assert other.get("/v1/checkpoints", params={"job_id": owned["job_id"]}).status_code == 404


def test_another_project_s_objects_are_no_cursors(client, other, owned):
    for path, name in (("/v1/jobs", "job_id"), ("/v1/datasets", "dataset_id"), ("/v1/checkpoints", "checkpoint_id")):
        assert client.get(path, params={"after": owned[name]}).status_code == 200
        assert other.get(path, params={"after": owned[name]}).status_code == 422


def test_another_project_s_objects_are_no_inputs(other, owned, spec):
    data = {"train": {"source": "dataset", "id": owned["dataset_id"]}}
    refused = other.post("/v1/jobs", json=spec(data=data)).json()
    assert refused["errors"][0]["pointer"] == "/data/train/id"
    refused = other.post("/v1/jobs", json=spec(model={"from_checkpoint": owned["checkpoint_id"]})).json()
    assert refused["errors"][0]["pointer"] == "/model/from_checkpoint/id"


def test_without_a_key_every_route_is_closed(api):
    with api.anonymous() as stranger:
        for method, path in ROUTES:
            answer = stranger.request(method, path.format(job_id="x", checkpoint_id="x", dataset_id="x", key_id="x"))
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"
