"""The life of a job over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic, sleep

import pytest

from service.api.views import JobView
from service.errors import Failure
from service.ids import new_id
from service.jobs import lease as leases
from service.states import Phase
from service.store import jobs
from service.store.checkpoints import CheckpointRow


def checkpoint(api, lease, step=2, **changes):
    """A checkpoint as a worker commits it."""
    checkpoint_id = new_id("ckpt")
    folder = api.store.blobs.temporary_dir()
    (folder / "model").mkdir()
    (folder / "model" / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "manifest.json").write_text("{}")
    path = f"checkpoints/{lease.job_id}/{checkpoint_id}"
    api.store.blobs.commit_dir(folder, path)
    model = {"source": "tiny", "adapter": {"kind": "full"}}
    row = CheckpointRow(checkpoint_id, step, "full", model, path, 1002, "0" * 64, {}, True, False)
    leases.commit_checkpoint(api.store, lease, row)
    return checkpoint_id


def test_a_job_from_submission_to_success(each_api, spec):
    api = each_api
    with api.client() as client:
        sent = spec(tags=["first"], metadata={"team": "search"}, name="addition")
        job = client.post("/v1/jobs", json=sent).json()
        assert (job["status"], job["kind"], job["step"], job["max_steps"]) == ("queued", "rl", 0, 10)
        assert job["spec_sent"] == sent
        assert job["spec"]["objective"]["surrogate"]["clip_high"] == 4e-4  # what gspo stands for is written out
        assert job["metadata"] == {"team": "search"}
        assert job["allowed_actions"] == ["pause", "cancel", "fork"]
        assert client.get(f"/v1/jobs/{job['id']}").json() == job

        lease, _ = api.claim(job["id"])
        leases.set_phase(api.store, lease, Phase.SAMPLING)
        running = client.get(f"/v1/jobs/{job['id']}").json()
        assert (running["status"], running["phase"], running["attempt"]) == ("running", "sampling", 1)
        leases.commit_step(api.store, lease, 1, {"reward/mean": 0.5}, [])
        saved = checkpoint(api, lease, step=1)
        leases.succeed(api.store, lease, {"reason": "max_steps"}, "max_steps")

        done = client.get(f"/v1/jobs/{job['id']}").json()
        assert (done["status"], done["status_reason"], done["step"]) == ("succeeded", "max_steps", 1)
        assert done["checkpoint_id"] == saved
        assert done["result"] == {"reason": "max_steps"}
        assert done["allowed_actions"] == ["fork", "delete"]
        assert client.get(job["links"]["events"]).json()["last_id"] == done["last_event"]


def test_a_job_is_read_as_its_view_says(each_api, spec):
    """It is not made by the view: documents come as they are stored."""
    api = each_api
    with api.client() as client:
        job_id = client.post("/v1/jobs", json=spec(name="größte \U0001f600", tags=["ä"], metadata={"a": [1e-06, None]})).json()[
            "id"
        ]
        lease, _ = api.claim(job_id)
        leases.set_resolved(api.store, lease, {"device": "cpu", "warnings": ['"\\u0000"']})
        leases.commit_step(api.store, lease, 1, {"reward/mean": 0.5}, [])
        leases.fail(api.store, lease, Failure("sample_not_graded", "ü", details={"value": 2**70}), {"final": {"m": 0.25}})
        with api.store.begin(readonly=True) as session:
            job = jobs.find(session, job_id)
            assert job is not None
            view = JobView.read(session, job)
        assert view.error is not None and view.result is not None and view.usage.attempts == 1
        assert client.get(f"/v1/jobs/{job_id}").json() == json.loads(view.model_dump_json())


@pytest.mark.parametrize("route", ["jobs", "sessions"])
def test_how_long_a_job_has_run_includes_its_present_attempt_until_now(each_api, spec, route):
    api = each_api
    with api.client() as client:
        body = spec() if route == "jobs" else {"model": {"source": "tiny"}}
        job_id = client.post(f"/v1/{route}", json=body).json()["id"]
        assert client.get(f"/v1/{route}/{job_id}").json()["run_s"] == 0
        api.claim(job_id)
        began = api.store.now() - timedelta(seconds=90)
        with api.store.begin() as session:
            job = jobs.find(session, job_id, lock=True)
            assert job is not None
            job.run_s, job.claimed_at, job.lease_until = 30.0, began, began + timedelta(days=1)
        for read in (
            lambda: client.get(f"/v1/{route}/{job_id}").json(),
            lambda: client.get(f"/v1/{route}").json()["data"][0],
            lambda: client.post(f"/v1/jobs/{job_id}/pause").json(),
        ):
            before = (api.store.now() - began).total_seconds()
            run_s = read()["run_s"]
            assert 30 + before <= run_s <= 30 + (api.store.now() - began).total_seconds()


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("jobs/ckpt_1", "no job ckpt_1 in this project; ckpt_ begins the ids of checkpoints"),
        ("jobs/job_1", "no job job_1 in this project"),
        ("jobs/mine", "no job mine in this project"),
        ("checkpoints/job_1", "no checkpoint job_1 in this project; job_ begins the ids of jobs"),
        ("datasets/ckpt_1", "no dataset ckpt_1 in this project; ckpt_ begins the ids of checkpoints"),
        ("webhooks/ds_1", "no webhook ds_1 in this project; ds_ begins the ids of datasets"),
    ],
)
def test_an_id_of_another_kind_is_told_apart(client, path, detail):
    refused = client.get(f"/v1/{path}")
    assert (refused.status_code, refused.json()["detail"]) == (404, detail)


def test_yaml_and_json_make_the_same_job(client, spec):
    yaml = b"""
kind: rl
name: a job
model: {source: tiny}
data:
  train: {source: inline, rows: [{q: "1+1=", a: "2"}, {q: "2+2=", a: "4"}]}
  prompt: "{q}"
  answer: "{a}"
objective: {preset: gspo}
rollout: {prompts_per_step: 2, group_size: 2, max_completion_tokens: 4}
reward: {graders: [{kind: exact, reference: "{a}"}]}
optimizer: {learning_rate: 1e-5}
limits: {max_steps: 10}
"""
    for media_type in ("application/yaml", "text/yaml", "application/x-yaml; charset=utf-8"):
        from_yaml = client.post("/v1/jobs", content=yaml, headers={"Content-Type": media_type})
        assert from_yaml.status_code == 201, from_yaml.text
    from_json = client.post("/v1/jobs", json=spec(optimizer={"learning_rate": 1e-5}))
    assert from_yaml.json()["spec_sha256"] == from_json.json()["spec_sha256"]
    assert from_yaml.json()["spec"] == from_json.json()["spec"]


def test_dry_run_resolves_grades_and_keeps_nothing(client, spec):
    rows = [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": ""}]
    answer = client.post("/v1/jobs:validate", json=spec(data={"train": {"source": "inline", "rows": rows}}))
    assert answer.status_code == 200, answer.text
    dry = answer.json()
    assert dry["spec"]["objective"]["preset"] == "gspo"
    assert dry["estimates"]["optimizer_steps"] == 40
    assert [sample["prompt"] for sample in dry["samples"]] == ["1+1=", "2+2="]
    assert dry["samples"][0]["graded"]["total"] == 1.0
    assert client.get("/v1/jobs").json()["data"] == []
    job = client.post("/v1/jobs", json=spec(data={"train": {"source": "inline", "rows": rows}})).json()
    assert (dry["spec_sha256"], dry["data_sha256"]) == (job["spec_sha256"], job["data_sha256"])


def test_a_dry_run_shows_what_graders_pay_for_right_near_and_wrong_answers(client, spec):
    rows = [{"q": "1+1=", "a": 2}, {"q": "2+2=", "a": 4}]
    reward = {"graders": [{"kind": "number", "reference": "{a}"}]}
    dry = client.post("/v1/jobs:validate", json=spec(data={"train": {"source": "inline", "rows": rows}}, reward=reward)).json()
    tried = {probe["answer"]: (probe["kind"], probe["total"]) for probe in dry["samples"][0]["probes"]}
    assert tried[r"\boxed{2}"] == ("right", 1.0)
    assert tried["3"] == tried["-2"] == tried["21"] == ("near", 0.0)
    assert tried["4"] == tried[""] == tried["I do not know"] == ("wrong", 0.0)


def test_a_reference_that_is_no_number_is_refused_by_row(client, spec):
    rows = [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "2025-12-26"}, {"q": "3", "a": "true"}]
    reward = {"graders": [{"kind": "number", "reference": "{a}"}]}
    for path in ("/v1/jobs", "/v1/jobs:validate"):
        answer = client.post(path, json=spec(data={"train": {"source": "inline", "rows": rows}}, reward=reward))
        [error] = answer.json()["errors"]
        assert (answer.status_code, error["pointer"], error["code"]) == (
            422,
            "/reward/graders/0/reference",
            "reference_unreadable",
        )
        assert "row 1 of data.train: the reference '2025-12-26' is a date" in error["detail"]
        assert "1 further rows" in error["detail"] and "allowed are a number" in error["detail"]


def test_a_dry_run_that_takes_too_long_says_so(client, spec, monkeypatch):
    monkeypatch.setattr("service.api.dry_run.PREVIEW_TIMEOUT_S", 0.01)
    dry = client.post("/v1/jobs:validate", json=spec()).json()
    assert dry["samples"] == []
    assert "longer than 0.01 s" in dry["warnings"][-1]
    assert dry["spec_sha256"]


def test_a_dry_run_looks_into_an_uploaded_dataset(client, spec):
    rows = b'{"q": "1+1=", "a": "2"}\n{"q": "2+2=", "a": "4"}\n'
    dataset = client.post("/v1/datasets", content=rows, headers={"Content-Type": "application/jsonl"}).json()
    dry = client.post("/v1/jobs:validate", json=spec(data={"train": {"source": "dataset", "id": dataset["id"]}})).json()
    assert [(sample["prompt"], sample["reference"]) for sample in dry["samples"]] == [("1+1=", "2"), ("2+2=", "4")]


def test_lists_are_filtered_and_paged(each_api, spec):
    with each_api.client() as client:
        ids = [
            client.post("/v1/jobs", json=spec(name=f"job {number}", tags=["even"] if number % 2 == 0 else [])).json()["id"]
            for number in range(5)
        ]
        client.post(f"/v1/jobs/{ids[0]}/cancel")

        def listed(**query):
            return [job["id"] for job in client.get("/v1/jobs", params=query).json()["data"]]

        assert listed() == ids[::-1]
        assert listed(tag="even") == [ids[4], ids[2], ids[0]]
        assert listed(tag="eve") == []
        assert listed(name="JOB 3") == [ids[3]]
        assert listed(status="cancelled") == [ids[0]]
        assert listed(status=["cancelled", "queued"]) == ids[::-1]
        assert listed(kind="supervised") == []

        pages, after = [], None
        while True:
            page = client.get("/v1/jobs", params={"limit": 2, **({"after": after} if after else {})}).json()
            assert page["last_id"] == page["data"][-1]["id"]
            pages.append([job["id"] for job in page["data"]])
            after = page["last_id"]
            if not page["has_more"]:
                break
        assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
        assert "spec" not in page["data"][0]  # with thousands of inline rows a list could not be read


def test_pause_resume_cancel_delete(each_api, spec):
    api = each_api
    with api.client() as client:
        job_id = client.post("/v1/jobs", json=spec()).json()["id"]

        def ask(action):
            return client.post(f"/v1/jobs/{job_id}/{action}")

        assert ask("pause").json()["status"] == "paused"
        assert ask("pause").json()["status"] == "paused"  # said twice is said once
        assert ask("resume").json()["status"] == "queued"
        refused = ask("resume")
        assert refused.status_code == 409
        assert refused.json()["code"] == "illegal_transition"
        assert refused.json()["allowed_moves"] == ["pause", "cancel", "fork"]
        assert refused.json()["job_status"] == "queued"
        assert client.delete(f"/v1/jobs/{job_id}").json()["code"] == "illegal_transition"

        lease, _ = api.claim(job_id)
        assert ask("pause").json()["status"] == "pausing"
        leases.pause(api.store, lease)
        assert ask("resume").json()["status"] == "queued"
        assert ask("cancel").json()["status"] == "cancelled"
        assert ask("pause").json()["allowed_moves"] == ["fork", "delete"]
        assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert client.get(f"/v1/jobs/{job_id}").status_code == 404


def test_fork_goes_on_from_the_newest_checkpoint(each_api, spec):
    api = each_api
    with api.client() as client:
        parent = client.post("/v1/jobs", json=spec(optimizer={"learning_rate": 1e-4, "weight_decay": 0.1})).json()
        lease, _ = api.claim(parent["id"])
        first, newest = checkpoint(api, lease, 1), checkpoint(api, lease, 2)
        failure = Failure("non_finite_loss", "the gradient was not finite", step=2)
        leases.fail(api.store, lease, failure, None)
        assert client.get(f"/v1/jobs/{parent['id']}").json()["error"]["code"] == "non_finite_loss"

        answer = client.post(f"/v1/jobs/{parent['id']}/fork")
        assert answer.status_code == 201, answer.text
        assert answer.json()["parent_id"] == parent["id"]
        assert answer.json()["from_checkpoint_id"] == newest

        changed = {
            "from_checkpoint": first,
            "spec": {"name": "slower", "optimizer": {"learning_rate": 1e-6, "weight_decay": None}},
        }
        fork = client.post(f"/v1/jobs/{parent['id']}/fork", json=changed).json()
        assert fork["from_checkpoint_id"] == first
        assert fork["name"] == "slower"
        assert fork["spec"]["optimizer"]["learning_rate"] == 1e-6
        assert fork["spec"]["optimizer"]["weight_decay"] == 0.0  # null took it out, the default came back
        assert fork["spec"]["data"] == parent["spec"]["data"]

        other = client.post(
            f"/v1/jobs/{parent['id']}/fork", json={"from_checkpoint": {"id": first, "load": "weights+optimizer"}}
        )
        assert other.json()["spec"]["model"]["from_checkpoint"] == {"id": first, "load": "weights+optimizer"}


def test_fork_says_where_its_changes_are_wrong(client, submit):
    parent = submit()
    refused = client.post(f"/v1/jobs/{parent['id']}/fork", json={"spec": {"rollout": {"group_sise": 4}}})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/spec/rollout/group_sise"
    assert "'group_size'" in refused.json()["errors"][0]["detail"]
    refused = client.post(f"/v1/jobs/{parent['id']}/fork", json={"from_checkpoint": "ckpt_absent"})
    assert refused.json()["errors"][0]["pointer"] == "/spec/model/from_checkpoint/id"


# ---------------------------------------------------------------- Idempotency-Key


def test_same_key_and_body_give_the_first_answer(each_api, spec):
    with each_api.client() as client:
        headers = {"Idempotency-Key": "one"}
        first = client.post("/v1/jobs", json=spec(), headers=headers)
        client.post(f"/v1/jobs/{first.json()['id']}/cancel")
        again = client.post("/v1/jobs", json=dict(reversed(spec().items())), headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["Idempotency-Replayed"] == "true"
        assert "Idempotency-Replayed" not in first.headers
        assert len(client.get("/v1/jobs").json()["data"]) == 1

        refused = client.post("/v1/jobs", json=spec(name="another"), headers=headers)
        assert refused.status_code == 422
        assert refused.json()["code"] == "idempotency_key_reused"


def test_many_at_once_with_one_key_make_one_job(each_api, spec):
    with each_api.client() as client, ThreadPoolExecutor(8) as pool:
        headers = {"Idempotency-Key": "one"}
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=spec(), headers=headers), range(8)))
        assert {answer.status_code for answer in answers} <= {201, 409}
        in_flight = [answer for answer in answers if answer.status_code == 409]
        for answer in in_flight:
            assert answer.json()["code"] == "idempotency_in_flight"
            assert answer.json()["retryable"] is True
            assert answer.headers["Retry-After"] == "1"
        assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
        assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_a_refused_request_leaves_its_key_free(client, spec):
    headers = {"Idempotency-Key": "one"}
    assert client.post("/v1/jobs", json=spec(model={"source": "/nowhere"}), headers=headers).status_code == 422
    assert client.post("/v1/jobs", json=spec(), headers=headers).status_code == 201


def test_keys_of_projects_and_routes_do_not_meet(client, other, spec, submit):
    headers = {"Idempotency-Key": "one"}
    mine = client.post("/v1/jobs", json=spec(), headers=headers).json()
    theirs = other.post("/v1/jobs", json=spec(), headers=headers).json()
    fork = client.post(f"/v1/jobs/{mine['id']}/fork", json=spec() and {}, headers=headers).json()
    assert len({mine["id"], theirs["id"], fork["id"]}) == 3
    assert client.post(f"/v1/jobs/{mine['id']}/fork", json={}, headers=headers).json() == fork


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_a_strange_idempotency_key_is_refused(client, spec, key):
    refused = client.post("/v1/jobs", json=spec(), headers={"Idempotency-Key": key})
    assert refused.status_code == 400
    assert refused.json()["code"] == "invalid_idempotency_key"


# ---------------------------------------------------------------- long poll


def test_long_poll_wakes_within_a_second(each_api, spec, monkeypatch):
    monkeypatch.setattr("service.api.jobs.POLL_S", 60.0)  # nothing but the signal can wake it
    api = each_api
    with api.client() as client, ThreadPoolExecutor(1) as pool:
        job = client.post("/v1/jobs", json=spec()).json()
        lease, _ = api.claim(job["id"])
        took = []
        for step in (1, 2, 3):
            known = client.get(f"/v1/jobs/{job['id']}").json()["last_event"]
            waiting = pool.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait_s": 20, "after_event": known})
            sleep(0.3)
            assert not waiting.done()
            leases.commit_step(api.store, lease, step, {"reward/mean": 0.5}, [])
            api.doorbell.signal(job["id"], "events")
            committed = monotonic()
            assert waiting.result(timeout=30).json()["step"] == step
            took.append(monotonic() - committed)
        assert min(took) < 1.0


def test_long_poll_answers_at_once_when_there_is_something_to_say(api, client, submit):
    job = submit()
    started = monotonic()
    client.get(f"/v1/jobs/{job['id']}", params={"wait_s": 20, "after_event": 0})
    client.post(f"/v1/jobs/{job['id']}/cancel")
    ended = client.get(f"/v1/jobs/{job['id']}", params={"wait_s": 20})
    assert ended.json()["status"] == "cancelled"
    assert monotonic() - started < 5


def test_long_poll_gives_up_in_time(client, submit):
    job = submit()
    started = monotonic()
    assert client.get(f"/v1/jobs/{job['id']}", params={"wait_s": 0.3}).json() == job
    assert 0.3 <= monotonic() - started < 2


def test_a_lost_signal_costs_two_seconds_at_most(api, client, submit):
    job = submit()
    lease, _ = api.claim(job["id"])
    known = client.get(f"/v1/jobs/{job['id']}").json()["last_event"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait_s": 20, "after_event": known})
        sleep(0.3)
        leases.commit_step(api.store, lease, 1, {}, [])  # and nobody signals
        committed = monotonic()
        assert waiting.result(timeout=10).json()["step"] == 1
        assert monotonic() - committed < 3.5


def test_waiting_requests_hold_no_thread(api, client, submit):
    """The thread pool has 40 threads and the engine 15 connections; neither is held by those who wait."""
    job = submit()
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait_s": 20}) for _ in range(60)]
        sleep(1.5)
        started = monotonic()
        assert client.get("/v1/jobs").status_code == 200
        assert monotonic() - started < 2
        client.post(f"/v1/jobs/{job['id']}/cancel")
        assert {one.result().json()["status"] for one in waiting} == {"cancelled"}
