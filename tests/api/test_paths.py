"""No name that a caller chooses leads out of the folder that it belongs to."""

import io
import json
import shutil
import tarfile

import pytest

from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow

SECRET = "what-only-the-operator-reads"
ONE_STORE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


# ---------------------------------------------------------------- models


@pytest.fixture
def production(serve, settings, tmp_path):
    """A server as an operator runs it, with one model, beside a folder that is none of its own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(f'{{"max_position_embeddings": 7, "note": "{SECRET}"}}')
    mine = settings.local_models_dir / "mine"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text('{"max_position_embeddings": 100}')
    (settings.local_models_dir / "leading-out").symlink_to(tmp_path / "elsewhere")
    with serve(settings.model_copy(update={"environment": "production"})) as api:
        yield api


def model_error(answer):
    assert answer.status_code == 422, answer.text
    assert SECRET not in answer.text
    return next(one for one in answer.json()["errors"] if one["pointer"] == "/model/source")


@ONE_STORE
def test_a_model_is_one_of_the_operator_s(production, spec, tmp_path):
    with production.client() as client:
        for good in ("mine", str(production.settings.local_models_dir / "mine")):
            job = client.post("/v1/jobs", json=spec(model={"source": good}))
            assert job.status_code == 201, job.text
            assert job.json()["spec"]["model"]["source"].endswith("/models/mine")
        listed = [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert listed == ["tiny", "mine"]  # a link that leads out cannot be named, and is not listed


@ONE_STORE
def test_a_link_that_leads_out_counts_where_any_folder_does(production, serve, spec):
    with production.client() as client:
        link = str(production.settings.local_models_dir / "leading-out")
        error = model_error(client.post("/v1/jobs", json=spec(model={"source": link})))
        assert error["allowed"] == ["tiny", "mine"] and "did you mean" not in error["detail"]
    with serve(production.settings.model_copy(update={"environment": "development"})) as api, api.client() as client:
        job = client.post("/v1/jobs", json=spec(model={"source": "leading-out"}))
        assert job.status_code == 201, job.text
        assert job.json()["spec"]["model"]["source"] == link


@ONE_STORE
def test_a_model_s_name_leads_nowhere_else(production, spec, tmp_path):
    elsewhere, models = tmp_path / "elsewhere", production.settings.local_models_dir
    names = [
        str(elsewhere),
        f"{models}/../../elsewhere",
        f"{models}/leading-out",
        f"{models}/mine/../../../elsewhere",
        "../elsewhere",
        "./../elsewhere",
        "mine/../../../elsewhere",
        "~/x",
        "~nobody-of-this-name/x",
        "/" + "x" * 500,
        "x" * 500,
        ".",
        "..",
        "mine/..",
        "mine\\..\\..",
        "\uff0e\uff0e/elsewhere",
        "mine%2f..",
        "file:///etc",
        "mine\n",
        str(models),
    ]
    with production.client() as client:
        for name in names:
            assert model_error(client.post("/v1/jobs", json=spec(model={"source": name})))["code"] == "model_not_found", name
        there, absent = (
            model_error(client.post("/v1/jobs", json=spec(model={"source": f"/{name}"})))["detail"].partition(" ")[2]
            for name in ("etc", "nothing-of-this-name")
        )
        assert there == absent  # nor does it say what exists on the machine
        assert client.post("/v1/jobs", json=spec(model={"source": "mi\0ne"})).status_code == 422


@ONE_STORE
def test_on_one_s_own_machine_any_folder_may_be_named(serve, settings, spec, tmp_path):
    """The negative control, and what `ratchet up` sets."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    own = settings.model_copy(update={"environment": "production", "any_model_folder": True})
    with serve(own) as api, api.client() as client:
        assert client.post("/v1/jobs", json=spec(model={"source": str(tmp_path / "elsewhere")})).status_code == 201


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_when_the_job_is_submitted(api, client, spec, tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    error = model_error(client.post("/v1/jobs", json=spec(model={"source": str(tmp_path)})))
    assert error["code"] == "model_pickled" and name in error["detail"]
    (tmp_path / "model.safetensors").write_bytes(b"")  # the negative control: beside safetensors it is not looked at
    assert client.post("/v1/jobs", json=spec(model={"source": str(tmp_path)})).status_code == 201


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/model.safetensors", None])
@pytest.mark.parametrize("by", ["index", "config"])
def test_what_the_index_or_the_config_names_is_refused_when_the_job_is_submitted(client, spec, tmp_path, file, by):
    (tmp_path / "other.safetensors").write_bytes(b"")  # beside it: it changes nothing
    index = {"weight_map": {"a": "other.safetensors", "b": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index if by == "index" else {"weight_map": {}}))
    (tmp_path / "config.json").write_text(json.dumps({} if by == "index" else {"transformers_weights": file or 7}))
    error = model_error(client.post("/v1/jobs", json=spec(model={"source": str(tmp_path)})))
    assert error["code"] == "model_pickled" and by in error["detail"]
    index["weight_map"]["b"] = "parts/b.safetensors"  # the negative control
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert client.post("/v1/jobs", json=spec(model={"source": str(tmp_path)})).status_code == 201


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[1]", "an array of 1 item, where an object should stand"),
        ("{", "cannot be read"),
    ],
)
def test_json_of_a_model_s_folder_that_cannot_be_read_is_told_so(api, client, spec, name, text, reason):
    folder = api.settings.local_models_dir / f"{new_id('ds')}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(text)
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    error = model_error(client.post("/v1/jobs", json=spec(model={"source": folder.name})))
    assert error["code"] == "model_not_found" and name in error["detail"] and reason in error["detail"]
    assert folder.name in [one["id"] for one in client.get("/v1/models").json()["data"]]
    shutil.rmtree(folder)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../../../../etc/passwd", "..", "a/b", ".hidden", "a\\b", "x.txt\n"])
def test_a_task_s_file_is_no_path(client, spec, name):
    pytest.importorskip("reasoning_gym")
    data = {
        "train": {"source": "reasoning_gym", "task": "spell_backward", "config": {"data_file": name}},
        "prompt": "{question}",
    }
    refused = client.post("/v1/jobs:validate", json=spec(data={**data, "answer": None}, model={"source": "org/model"}))
    assert refused.status_code == 422
    assert "/data/train/config/data_file" in [one["pointer"] for one in refused.json()["errors"]], refused.text


STRANGE_NAMES = ["../../evil", "/etc/evil", "a\\..\\b", "x" * 200, "\uff0e\uff0e/x", "%2e%2e%2f", "..", "CON", "a\u202eb"]


@pytest.mark.parametrize("name", STRANGE_NAMES)
@pytest.mark.parametrize("how", ["query", "form"])
def test_a_dataset_s_name_is_no_path(api, client, name, how):
    rows = b'{"q": "1"}\n'
    if how == "query":
        made = client.post("/v1/datasets", params={"name": name}, content=rows, headers={"Content-Type": "application/jsonl"})
    else:
        made = client.post("/v1/datasets", files={"file": (name, io.BytesIO(rows))})
    assert made.status_code == 201, made.text
    dataset = made.json()
    assert client.get(f"/v1/datasets/{dataset['id']}/rows").json()["data"] == [{"q": "1"}]
    lies = [path.relative_to(api.settings.data_dir) for path in api.settings.data_dir.parent.rglob(f"{dataset['id']}*")]
    assert [str(path) for path in lies] == [f"blobs/datasets/{dataset['id']}.jsonl"]
    assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0b", "\x7f"])
def test_a_dataset_s_name_holds_nothing_that_drives_a_terminal(client, name):
    sent = {"params": {"name": name}, "content": b'{"q": "1"}\n', "headers": {"Content-Type": "application/jsonl"}}
    assert client.post("/v1/datasets", **sent).status_code in (400, 422)


@pytest.mark.parametrize("path", ["/v1/checkpoints/{}", "/v1/checkpoints/{}/archive", "/v1/datasets/{}/rows", "/v1/jobs/{}"])
@pytest.mark.parametrize("id_", ["..%2f..%2fetc", "%2e%2e", "..%5c..", "a%00b", "%ef%bc%8e%ef%bc%8e", "x" * 3000, "%ff%fe"])
def test_an_id_is_no_path(client, path, id_):
    answer = client.get(path.format(id_))
    assert answer.status_code in (400, 404)
    assert answer.json()["code"] in ("not_found", "route_not_found", "malformed_url", "method_not_allowed")


@pytest.mark.parametrize("id_", ["../../etc", "/etc", "ckpt_../x", "ckpt_", "ckpt_" + "a" * 5000, "ckpt_a\n", "ckpt_\uff0e"])
def test_a_checkpoint_to_start_from_is_no_path(client, spec, id_):
    assert client.post("/v1/jobs", json=spec(model={"from_checkpoint": id_})).status_code == 422


# ---------------------------------------------------------------- archives


def test_an_archive_holds_the_files_of_its_checkpoint_and_no_link_s_target(api, client, submit, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    job = submit()
    lease, _ = api.claim(job["id"])
    folder, id_ = api.store.blobs.temporary_dir(), new_id("ckpt")
    (folder / "manifest.json").write_text("{}")
    path = f"checkpoints/{job['id']}/{id_}"
    api.store.blobs.commit_dir(folder, path)
    row = CheckpointRow(id_, 1, "full", {"source": "tiny"}, path, 2, "0" * 64, {}, True, True)
    leases.commit_checkpoint(api.store, lease, row)
    leases.succeed(api.store, lease, {}, "max_steps")
    lies = api.store.blobs.path(path)
    (lies / "link.txt").symlink_to(tmp_path / "secret")
    (lies / "folder").symlink_to(tmp_path)
    archive = client.get(f"/v1/checkpoints/{id_}/archive")
    assert SECRET.encode() not in archive.content
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert tar.getnames() == [f"{id_}/manifest.json"]
