"""Checkpoints: listed, downloaded as an archive that unpacks to the same files, deleted."""

import io
import tarfile
from hashlib import sha256

import pytest

from service.api.archive import archive_of
from service.ids import new_id
from service.jobs import lease as leases
from service.store.checkpoints import CheckpointRow
from service.store.tables import Checkpoint

FILES = {
    "manifest.json": b"{}",
    "model/config.json": b'{"model_type": "llama"}',
    "model/model.safetensors": bytes(range(256)) * 9000,  # longer than one chunk of the stream
    "optimizer.safetensors": b"",
    f"model/{'long-' * 40}name.txt": b"a name that needs an extended header",
}


@pytest.fixture
def save(api):
    def save(lease, step):
        checkpoint_id = new_id("ckpt")
        folder = api.store.blobs.temporary_dir()
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        path = f"checkpoints/{lease.job_id}/{checkpoint_id}"
        api.store.blobs.commit_dir(folder, path)
        size = sum(map(len, FILES.values()))
        row = CheckpointRow(
            checkpoint_id, step, "full", {"source": "tiny"}, path, size, "a" * 64, {"eval/loss": 0.5}, True, False
        )
        leases.commit_checkpoint(api.store, lease, row)
        return checkpoint_id

    return save


@pytest.mark.parametrize(
    ("key", "value"), [("dry_run", 0), ("dry_run", "no"), ("older_than_s", "1"), ("older_than_s", True), ("keep_last", False)]
)
def test_a_filter_of_another_type_is_not_guessed_at(client, key, value):
    """A `dry_run` that is taken for false would delete."""
    refused = client.post("/v1/checkpoints:delete", json={"older_than_s": 0, key: value})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == f"/{key}"


def test_checkpoints_are_listed_and_read(api, client, submit, save):
    job, another = submit(), submit()
    lease, _ = api.claim(job["id"])
    first, second = save(lease, 1), save(lease, 2)
    for path in (f"/v1/jobs/{job['id']}/checkpoints", f"/v1/checkpoints?job_id={job['id']}", "/v1/checkpoints"):
        assert [one["id"] for one in client.get(path).json()["data"]] == [second, first]
    assert client.get(f"/v1/jobs/{another['id']}/checkpoints").json()["data"] == []
    page = client.get(f"/v1/jobs/{job['id']}/checkpoints", params={"limit": 1}).json()
    assert (page["last_id"], page["has_more"]) == (second, True)
    one = client.get(f"/v1/checkpoints/{first}").json()
    assert (one["step"], one["job_id"], one["adapter"], one["metrics"]) == (1, job["id"], "full", {"eval/loss": 0.5})


def test_a_card_says_what_it_is_and_how_to_load_it(api, client, submit, save):
    job = submit(name="a `name`\nwith | signs\x1b[31m\u202e")
    lease, _ = api.claim(job["id"])
    leases.set_resolved(api.store, lease, {"parameters": 1234, "versions": {"torch": "2.9.1"}})
    first = save(lease, 2)
    answer = client.get(f"/v1/checkpoints/{first}/card")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    lines = answer.text.splitlines()
    assert lines[0] == "# `a 'name' with / signs\\x1b[31m\\u202e`"
    for line in (
        f"| checkpoint | `{first}` |",
        "| base model | `tiny` |",
        f"| step | `2 of {job['max_steps']}` |",
        f"| objective | `{job['spec']['objective']['preset']}` |",
        f"| data sha256 | `{job['data_sha256']}` |",
        "| parameters | `1234` |",
        "| trained with | `torch 2.9.1` |",
        "| `eval/loss` | 0.5 |",
        'model = AutoModelForCausalLM.from_pretrained("model")',
    ):
        assert line in lines, line
    leases.succeed(api.store, lease, {}, "max_steps")
    client.delete(f"/v1/jobs/{job['id']}")
    assert client.get(f"/v1/checkpoints/{first}/card").text.splitlines()[0] == f"# `{first}`"


def test_a_card_of_an_adapter_loads_it_on_its_base(api, client, submit, save):
    lease, _ = api.claim(submit()["id"])
    checkpoint_id = save(lease, 1)
    with api.store.begin() as session:
        row = session.get(Checkpoint, checkpoint_id)
        row.adapter, row.model = "lora", {"source": "org/model", "revision": "abc"}
    text = client.get(f"/v1/checkpoints/{checkpoint_id}/card").text
    assert 'base = AutoModelForCausalLM.from_pretrained("org/model")' in text  # the job resolved no commit
    leases.set_resolved(api.store, lease, {"revision": "c0ffee"})
    text = client.get(f"/v1/checkpoints/{checkpoint_id}/card").text
    assert 'from_pretrained("org/model", revision="c0ffee")' in text and 'PeftModel.from_pretrained(base, "model")' in text


def test_an_archive_unpacks_to_the_same_files(api, client, submit, save, tmp_path):
    lease, _ = api.claim(submit()["id"])
    checkpoint_id = save(lease, 1)
    answer = client.get(f"/v1/checkpoints/{checkpoint_id}/archive")
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert checkpoint_id in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = {
        path.relative_to(tmp_path / checkpoint_id).as_posix(): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert unpacked == FILES


def test_an_archive_without_the_optimizer_has_everything_else(api, client, submit, save):
    lease, _ = api.claim(submit()["id"])
    answer = client.get(f"/v1/checkpoints/{save(lease, 1)}/archive", params={"optimizer": "false"})
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == FILES.keys() - {"optimizer.safetensors"}


@pytest.mark.parametrize(
    ("sections", "best"),
    [
        ({}, 2),  # the highest mean reward
        ({"checkpoints": {"keep_best": {"metric": "eval/loss", "mode": "min"}}}, 3),
        ({"early_stopping": {"metric": "eval/loss", "mode": "max", "patience": 3}, "checkpoints": {"keep_best": {}}}, 1),
    ],
)
def test_the_best_checkpoint_is_named_by_the_jobs_own_rule(api, client, other, submit, save, sections, best):
    job_id = submit(data={"eval": {"source": "split", "rows": 1}}, **sections)["id"]
    path = f"/v1/jobs/{job_id}/checkpoints/best"
    lease, _ = api.claim(job_id)
    told = client.get(path)
    assert told.status_code == 404 and told.json()["detail"] == f"no checkpoint of {job_id} was evaluated when it was saved"
    ids = {step: save(lease, step) for step in (1, 2, 3, 4)}
    measured = {1: (0.1, 3.0), 2: (0.9, 2.0), 3: (0.5, 1.0), 4: (None, None)}
    with api.store.begin() as session:
        for step, (reward, loss) in measured.items():
            checkpoint = session.get(Checkpoint, ids[step])
            checkpoint.metrics = {} if reward is None else {"eval/reward/mean": reward, "eval/loss": loss}
    assert client.get(path).json()["id"] == ids[best]
    assert other.get(path).status_code == 404


@pytest.mark.parametrize(
    ("mode", "best", "saved", "named"),
    [
        ("max", (0.5, 2), {2: 0.5, 4: 0.5}, (0.5, 4)),  # of equals the later one is kept
        ("max", (0.5, 2), {4: 0.55}, (0.55, 4)),  # better, by less than min_delta
        ("min", (0.5, 2), {4: 0.45, 6: 0.7}, (0.45, 4)),
        ("max", (0.5, 0), {2: 0.4, 4: None}, (0.5, 0)),  # the model before training is better than all
        ("max", None, {2: 0.4}, (0.4, 2)),
        ("max", None, {2: None}, None),
    ],
)
def test_the_result_names_the_checkpoint_that_is_kept_as_the_best(api, client, submit, save, mode, best, saved, named):
    stop = {"metric": "eval/reward/mean", "mode": mode, "patience": 3, "min_delta": 0.1}
    job_id = submit(data={"eval": {"source": "split", "rows": 1}}, early_stopping=stop)["id"]
    lease, _ = api.claim(job_id)
    ids = {step: save(lease, step) for step in saved}
    with api.store.begin() as session:
        for step, value in saved.items():
            session.get(Checkpoint, ids[step]).metrics = {} if value is None else {"eval/reward/mean": value}
    leases.succeed(api.store, lease, {"best": best and {"value": best[0], "step": best[1]}}, "no_improvement")
    found = client.get(f"/v1/jobs/{job_id}").json()["result"]["best"]
    if named is None:
        assert found is None
        return
    there = ids.get(named[1])
    assert found == {"metric": "eval/reward/mean", "value": named[0], "step": named[1], "checkpoint_id": there}
    if there is not None:
        assert client.get(f"/v1/jobs/{job_id}/checkpoints/best").json()["id"] == there


def test_an_archive_holds_regular_files_only(tmp_path):
    (tmp_path / "secret").write_text("of somebody else")
    folder = tmp_path / "checkpoint"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"w" * 1000)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    archive = archive_of(folder, "ckpt_x")
    content = b"".join(archive.stream())
    assert len(content) == archive.size
    with tarfile.open(fileobj=io.BytesIO(content)) as unpacked:
        assert [member.name for member in unpacked] == ["ckpt_x/model/weights"]
        assert unpacked.getmembers()[0].isreg()


def test_a_file_that_shrinks_while_it_is_sent_breaks_the_archive(tmp_path):
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    archive = archive_of(tmp_path, "ckpt_x")
    (tmp_path / "weights").write_bytes(b"w" * 10)
    with pytest.raises(OSError, match="shorter"):
        b"".join(archive.stream())


def test_a_checkpoint_that_is_needed_is_kept(api, client, submit, save):
    job = submit()
    lease, _ = api.claim(job["id"])
    old, newest = save(lease, 1), save(lease, 2)
    refused = client.delete(f"/v1/checkpoints/{newest}")
    assert (refused.status_code, refused.json()["code"]) == (409, "checkpoint_in_use")
    assert client.delete(f"/v1/checkpoints/{old}").status_code == 204
    assert client.get(f"/v1/checkpoints/{old}").status_code == 404
    assert client.delete(f"/v1/checkpoints/{old}").status_code == 404
    assert not api.store.blobs.path(f"checkpoints/{job['id']}/{old}").exists()
    leases.succeed(api.store, lease, {}, "max_steps")
    client.delete(f"/v1/jobs/{job['id']}")
    kept = client.get(f"/v1/checkpoints/{newest}").json()
    assert kept["job_id"] is None  # the job is gone, its checkpoint is not
    assert sha256(client.get(f"/v1/checkpoints/{newest}/archive").content).digest()
    assert client.delete(f"/v1/checkpoints/{newest}").status_code == 204


def test_files_that_are_on_another_machine_are_a_404_that_says_so(api, client, submit, save):
    job = submit()
    lease, _ = api.claim(job["id"])
    checkpoint_id = save(lease, 1)
    api.store.blobs.delete(f"checkpoints/{job['id']}/{checkpoint_id}")
    answer = client.get(f"/v1/checkpoints/{checkpoint_id}/archive")
    assert (answer.status_code, answer.json()["code"]) == (404, "files_missing")
    assert "RATCHET_DATA_DIR" in answer.json()["hint"]


# ---------------------------------------------------------------- many at once, pins, lineage


def test_a_bulk_deletion_is_a_dry_run_unless_it_says_otherwise(api, client, submit, save):
    job = submit()
    lease, _ = api.claim(job["id"])
    ids = [save(lease, step) for step in range(5)]
    client.post(f"/v1/checkpoints/{ids[0]}/pin")
    asked = {"job_id": job["id"], "keep_last": 0}
    dry = client.post("/v1/checkpoints:delete", json=asked).json()
    assert dry["dry_run"] is True
    assert [one["id"] for one in dry["data"]] == ids[1:4]
    assert dry["kept"] == sorted(
        [{"id": ids[0], "reason": "pinned"}, {"id": ids[4], "reason": "in_use"}], key=lambda one: one["id"]
    )
    assert dry["size_bytes"] == 3 * sum(map(len, FILES.values()))
    assert len(client.get(f"/v1/jobs/{job['id']}/checkpoints").json()["data"]) == 5
    real = client.post("/v1/checkpoints:delete", json={**asked, "dry_run": False}).json()
    assert {**real, "dry_run": True} == dry
    left = client.get(f"/v1/jobs/{job['id']}/checkpoints").json()["data"]
    assert [one["id"] for one in left] == [ids[4], ids[0]]
    assert sorted(path.name for path in (api.store.blobs.root / "checkpoints" / job["id"]).iterdir()) == sorted(
        [ids[0], ids[4]]
    )


def test_bulk_filters_are_taken_together(api, client, other, submit, save):
    job = submit()
    lease, _ = api.claim(job["id"])
    ids = [save(lease, step) for step in range(3)]
    leases.succeed(api.store, lease, {}, "max_steps")

    def would(**filters):
        return [one["id"] for one in client.post("/v1/checkpoints:delete", json=filters).json()["data"]]

    assert would(ids=ids[:2]) == ids[:2]
    assert would(job_id=job["id"], keep_last=1) == ids[:2]
    assert would(job_id=job["id"], older_than_s=3600) == []
    assert would(older_than_s=0) == ids
    assert would(ids=[ids[2]], keep_last=1) == []
    assert other.post("/v1/checkpoints:delete", json={"ids": ids, "dry_run": False}).json()["data"] == []
    for wrong in ({}, {"keep_last": 1}, {"ids": []}, {"job_id": job["id"], "dryrun": False}):
        assert client.post("/v1/checkpoints:delete", json=wrong).status_code == 422
    assert len(client.get(f"/v1/jobs/{job['id']}/checkpoints").json()["data"]) == 3


def test_a_pinned_checkpoint_is_not_deleted(api, client, submit, save):
    lease, _ = api.claim(submit()["id"])
    checkpoint_id = save(lease, 1)
    leases.succeed(api.store, lease, {}, "max_steps")
    pinned = client.post(f"/v1/checkpoints/{checkpoint_id}/pin").json()
    assert pinned["pinned_at"] is not None
    assert client.post(f"/v1/checkpoints/{checkpoint_id}/pin").json() == pinned
    refused = client.delete(f"/v1/checkpoints/{checkpoint_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "checkpoint_pinned")
    assert client.post(f"/v1/checkpoints/{checkpoint_id}/unpin").json()["pinned_at"] is None
    assert client.delete(f"/v1/checkpoints/{checkpoint_id}").status_code == 204
    assert client.post(f"/v1/checkpoints/{checkpoint_id}/pin").status_code == 404


def test_lineage_leads_back_to_the_base_through_forks_and_deletions(api, client, submit):
    def trained(checkpoint_id, model, revision=None, **sections):
        job = submit(model=model, **sections)
        lease, _ = api.claim(job["id"])
        leases.set_resolved(api.store, lease, {"revision": revision})
        row = CheckpointRow(checkpoint_id, 7, "full", job["spec"]["model"], f"x/{checkpoint_id}", 1, "0" * 64, {}, True, True)
        leases.commit_checkpoint(api.store, lease, row)
        leases.succeed(api.store, lease, {}, "max_steps")
        return job

    first, second, third = (new_id("ckpt") for _ in range(3))
    jobs = [trained(first, {"source": "tiny"}, "abc123", name="one")]
    jobs.append(trained(second, {"from_checkpoint": first}, name="two"))
    jobs.append(trained(third, {"from_checkpoint": second}, name="three"))
    assert client.delete(f"/v1/checkpoints/{second}").status_code == 204
    assert client.delete(f"/v1/jobs/{jobs[1]['id']}").status_code == 204
    found = client.get(f"/v1/checkpoints/{third}/lineage").json()
    assert [one["checkpoint_id"] for one in found["data"]] == [third, second, first]
    assert [one["job_name"] for one in found["data"]] == ["three", None, "one"]
    assert found["data"][1]["deleted_at"] is not None
    assert found["data"][2]["spec_sha256"] == jobs[0]["spec_sha256"]
    assert (found["base"], found["complete"]) == ({"source": "tiny", "revision": "abc123"}, True)
    assert client.get(f"/v1/checkpoints/{second}/lineage").status_code == 404
