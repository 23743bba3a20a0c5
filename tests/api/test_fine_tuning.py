"""OpenAI's files and fine-tuning jobs over HTTP: what becomes of a request. Real runs stand in tests/clients."""

import json

import pytest

from service.errors import Failure, InvalidRequest
from service.jobs import lease as leases
from service.openai.tuning import KEPT, FineTuningRequest, _resolved
from service.openai.tuning_graders import template, weights_of

PAIRS = b'{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": "3"}\n{"prompt": "2+2=", "completion": "4"}\n'
CHECK = {"type": "string_check", "name": "right", "input": "{{sample.output_text}}", "operation": "eq"}
RIGHT = CHECK | {"reference": "{{item.answer}}"}
CHATS = b'{"messages": [{"role": "user", "content": "1+1="}], "answer": "2"}\n'


def upload(client, rows=PAIRS, name="rows.jsonl", **fields):
    answer = client.post("/v1/files", files={"file": (name, rows)}, data={"purpose": "fine-tune", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def tune(client, file=None, **request):
    file = file or upload(client)["id"]
    return client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file, **request})


def refused(answer, param, *, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    return error["message"]


# ---------------------------------------------------------------- files


def test_a_file_is_a_dataset(client):
    file = upload(client)
    assert (file["object"], file["purpose"], file["filename"], file["status"]) == (
        "file",
        "fine-tune",
        "rows.jsonl",
        "processed",
    )
    assert client.get(f"/v1/datasets/{file['id']}").json()["rows"] == 3
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == PAIRS
    for asked, got in (("bytes=1-3", PAIRS[1:4]), ("bytes=-5", PAIRS[-5:]), (f"bytes={len(PAIRS) - 2}-", PAIRS[-2:])):
        part = client.get(f"/v1/files/{file['id']}/content", headers={"Range": asked})
        assert (part.status_code, part.content) == (206, got), asked
    for asked in (f"bytes={len(PAIRS)}-", "bytes=3-1", "bytes=-0", "bytes=0-1,4-5", "lines=0-1", "x", ""):
        whole = client.get(f"/v1/files/{file['id']}/content", headers={"Range": asked})
        assert (whole.status_code, whole.content) == (200, PAIRS), f"{asked}: a range that is not there is ignored"
    second = upload(client, CHATS)
    listed = client.get("/v1/files", params={"limit": 1, "purpose": "fine-tune"}).json()
    assert ([one["id"] for one in listed["data"]], listed["has_more"]) == ([second["id"]], True)
    rest = client.get("/v1/files", params={"after": listed["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == [file["id"]]
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert client.get(f"/v1/files/{file['id']}/content").status_code == 404


def test_wrong_files_are_refused(client):
    form = {"files": {"file": ("x", PAIRS)}}
    assert "purpose" in refused(client.post("/v1/files", **form), "purpose")
    refused(client.post("/v1/files", **form, data={"purpose": "batch"}), "purpose")
    refused(
        client.post("/v1/files", **form, data={"purpose": "fine-tune", "expires_after[seconds]": "3600"}),
        "expires_after[seconds]",
    )
    assert "line 2" in refused(
        client.post("/v1/files", files={"file": ("x", b'{"a": 1}\n{"a": }')}, data={"purpose": "fine-tune"}), "lines[2]"
    )
    assert client.post("/v1/files", content=PAIRS, headers={"Content-Type": "application/jsonl"}).status_code == 415
    refused(client.get("/v1/files", params={"purpose": "vision"}), "query.purpose")


# ---------------------------------------------------------------- what becomes of a request


def native(client, answer):
    assert answer.status_code == 200, answer.text
    return client.get(f"/v1/jobs/{answer.json()['id']}").json()


def test_supervised_with_nothing_said(client):
    answer = tune(client)
    job = answer.json()
    assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": 3, "learning_rate_multiplier": 1.0}
    assert (job["status"], job["object"], job["fine_tuned_model"], job["seed"]) == ("queued", "fine_tuning.job", None, 0)
    spec = native(client, answer)["spec"]
    assert (spec["kind"], spec["limits"]["max_steps"], spec["update"]["batch_size"]) == ("supervised", 3, 3)
    assert (spec["data"]["prompt"], spec["data"]["answer"]) == ("{prompt}", "{completion}")
    assert (spec["optimizer"]["learning_rate"], spec["model"]["adapter"]["kind"]) == (1e-4, "lora")


def test_every_hyperparameter_of_reinforcement_has_its_place(client):
    grader = {
        "type": "multi",
        "name": "both",
        "graders": {"right": RIGHT, "near": {
            "type": "text_similarity", "name": "n", "input": "{{ sample.output_text }}", "reference": "a {b} {{item.answer}}",
            "evaluation_metric": "fuzzy_match",
        }},
        "calculate_output": "(2 * right + near) / 4 - 0.25*near",
    }  # fmt: skip
    hyperparameters = {
        "n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 3, "compute_multiplier": 0.5, "eval_interval": 5,
        "eval_samples": 1, "reasoning_effort": "default", "max_completion_tokens": 9,
    }  # fmt: skip
    messages = [{"messages": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1)} for n in range(6)]
    rows = "\n".join(map(json.dumps, messages)).encode()
    method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}}
    refusal = refused(tune(client, upload(client, rows)["id"], method=method), "training_file")
    assert "has no chat template" in refusal  # of the tiny model: all else was right
    request = FineTuningRequest.model_validate({"model": "tiny", "training_file": "ds_x", "method": method})
    assert _resolved(request.chosen, "reinforcement", 6) == hyperparameters
    assert request.method is not None and request.method.reinforcement is not None
    right, near = request.method.reinforcement.grader.graders()
    assert right == {"kind": "exact", "name": "right", "reference": "{answer}", "strip": False, "weight": 0.5}
    assert near == {"kind": "similarity", "name": "near", "reference": "a {{b}} {answer}", "metric": "ratio", "weight": 0.0}


def test_what_was_asked_comes_back(client):
    asked = {"suffix": "mine", "seed": 7, "metadata": {"a": "b"}, "validation_file": upload(client)["id"]}
    hyperparameters = {"n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": 2.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    answer = tune(client, **asked, method=method)
    job = answer.json()
    assert {name: job[name] for name in asked} == asked
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": hyperparameters | {"batch_size": 3}}}
    made = native(client, answer)
    assert (made["name"], made["spec"]["seed"], made["spec"]["data"]["eval"]["id"]) == ("mine", 7, asked["validation_file"])
    assert KEPT in made["metadata"]
    old = tune(client, hyperparameters={"n_epochs": 2}).json()
    assert old["hyperparameters"]["n_epochs"] == 2


@pytest.mark.parametrize(
    ("request_", "param", "said"),
    [
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "dpo is not offered"),
        ({"method": {"type": "reinforcement"}}, "method", "grader"),
        ({"method": {"type": "supervised", "reinforcement": {"grader": RIGHT}}}, "method", "does not use"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", ""),
        ({"training_file": "ds_x"}, "training_file", "no file ds_x"),
        ({"validation_file": "ds_x"}, "validation_file", "no file ds_x"),
        ({"seed": -1}, "seed", ""),
        ({"n_epochs": 3}, "n_epochs", ""),
        ({"metadata": {KEPT: "x"}}, "metadata", KEPT),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", ""),
    ],
)
def test_what_is_not_offered_is_refused_by_name(client, request_, param, said):
    assert said in refused(tune(client, **request_), param)


@pytest.mark.parametrize(
    ("grader", "said"),
    [
        ({"type": "python", "name": "p", "source": "def grade(s, i): return 1"}, "code of callers is not run here"),
        ({"type": "label_model", "name": "p", "labels": []}, "not offered"),
        (RIGHT | {"operation": "ne"}, "`ne` is not offered"),
        (RIGHT | {"input": "{{item.answer}}"}, "only the answer itself"),
        (RIGHT | {"reference": "{{item.a.b}}"}, "{{item.NAME}}"),
        (RIGHT | {"reference": "{{sample.output_json}}"}, "{{item.NAME}}"),
        ({**RIGHT, "type": "text_similarity", "evaluation_metric": "bleu"}, "only fuzzy_match"),
        ({"type": "score_model", "name": "s", "model": "gpt-4o", "input": []}, "no model grades here"),
        ({"type": "score_model", "name": "s", "model": "http://127.0.0.1/x", "input": []}, "no public address"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "a * a"}, "only a sum"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "a + b"}, "look at b"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "a + 1"}, "changes nothing"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "__import__('os')"}, "only a sum"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "a / 0"}, "only a sum"),
        ({"type": "multi", "name": "m", "graders": {"a": RIGHT}, "calculate_output": "(" * 4000}, "only a sum"),
        ({"type": "magic", "name": "m"}, "magic"),
    ],
)
def test_graders_that_are_not_offered_are_refused_by_name(client, grader, said):
    method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    answer = tune(client, upload(client, CHATS)["id"], method=method)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("method.reinforcement.grader"), answer.text
    assert said in answer.json()["error"]["message"]


def test_files_of_the_wrong_form_are_refused(client):
    other = upload(client, b'{"question": "x"}')["id"]
    assert "its columns are question" in refused(tune(client, other), "training_file")
    weighed = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}'
    assert "row 0" in refused(tune(client, upload(client, weighed)["id"]), "training_file")
    mixed = refused(tune(client, validation_file=upload(client, CHATS)["id"]), "validation_file")
    assert "completions" in mixed
    method = {"type": "reinforcement", "reinforcement": {"grader": RIGHT}}
    refused(tune(client, method=method), "training_file")


def test_an_unknown_model_is_a_404(client):
    assert tune(client, model="gpt-4o").json()["error"]["code"] == "model_not_found"


def test_formulas_and_templates() -> None:
    assert weights_of("-(a - 2*b)/2", {"a", "b"}) == {"a": -0.5, "b": 1.0}
    assert template("x {{ item.a }} {y} }}") == "x {a} {{y}} }}}}"
    with pytest.raises(InvalidRequest):
        weights_of("a if a else a", {"a"})


# ---------------------------------------------------------------- its life


def test_a_job_is_followed_paused_and_cancelled(api, client):
    job = tune(client).json()
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    assert client.post(f"{path}/pause").json()["status"] == "paused"
    assert client.post(f"{path}/resume").json()["status"] == "queued"
    lease, _ = api.claim(job["id"])
    leases.commit_step(api.store, lease, 1, {"loss": 1.5}, [])
    assert client.get(path).json()["status"] == "running"
    page = client.get(f"{path}/events", params={"limit": 2}).json()
    assert page["has_more"] and page["data"][0]["type"] == "metrics"
    assert page["data"][0]["data"] == {"step": 1, "train_loss": 1.5, "loss": 1.5}
    rest = client.get(f"{path}/events", params={"limit": 100, "after": page["last_id"]}).json()
    assert not rest["has_more"] and rest["data"][-1]["message"] == "created"
    assert len({one["id"] for one in [*page["data"], *rest["data"]]}) == len(page["data"]) + len(rest["data"])
    refused(client.get(f"{path}/events", params={"after": "evt_x"}), "query.after")
    leases.succeed(api.store, lease, {}, "max_steps")
    done = client.get(path).json()
    assert done["status"] == "succeeded" and done["trained_tokens"] == 0 and done["finished_at"] >= done["created_at"]
    again = client.post(f"{path}/cancel")
    assert again.status_code == 409 and again.json()["error"]["code"] == "illegal_transition"
    other = tune(client).json()
    assert client.post(f"/v1/fine_tuning/jobs/{other['id']}/cancel").json()["status"] == "cancelled"
    listed = client.get("/v1/fine_tuning/jobs", params={"limit": 1}).json()
    assert ([one["id"] for one in listed["data"]], listed["has_more"]) == ([other["id"]], True)
    assert client.get("/v1/fine_tuning/jobs", params={"after": other["id"]}).json()["data"] == [done]


def test_a_native_job_is_none(client, submit):
    job = submit(tags=["openai:fine_tuning"])
    assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 404
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_a_failure_is_told(api, client):
    job = tune(client).json()
    lease, _ = api.claim(job["id"])
    leases.fail(api.store, lease, Failure("model_not_found", "it is gone"))
    told = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert (told["status"], told["error"]["code"], told["error"]["message"]) == ("failed", "model_not_found", "it is gone")
    levels = {one["level"] for one in client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]}
    assert levels == {"info", "error"}


def test_a_repeat_with_the_same_idempotency_key_makes_no_second_job(client):
    file = upload(client)["id"]
    ask = {"json": {"model": "tiny", "training_file": file}, "headers": {"Idempotency-Key": "one"}}
    first, again = (client.post("/v1/fine_tuning/jobs", **ask).json() for _ in range(2))
    assert first == again and len(client.get("/v1/fine_tuning/jobs").json()["data"]) == 1
