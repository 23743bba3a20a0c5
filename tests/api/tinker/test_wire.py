"""The Tinker wire by hand: what its client relies on, and what other servers get wrong."""

import re
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest

from service.edge.remembered import Recent
from service.sessions.codec import unpack
from service.store import clock, operations
from service.store.tables import Operation, TinkerModel
from service.tinker import futures, log, runs, sampling
from service.tinker.messages import INT64, LENGTH
from service.tinker.requests import OptimStep
from service.tinker.tickets import OPERATION


def numbers(raw, typecode="f"):
    return array(typecode, raw).tolist()


def job_of(served, model_id):
    with served.api.store.begin(readonly=True) as session:
        return session.get_one(TinkerModel, model_id).job_id


# ---------------------------------------------------------------- ids, order, repeats


def test_ids_have_the_form_that_the_client_computes(wire):
    model_id = wire.model()
    assert model_id == f"{wire.session_id}:train:0"
    answer = wire.done(wire.ordered("save_weights_for_sampler", model_id, sampling_session_seq_id=4, kind="snapshot"))
    assert answer["sampling_session_id"] == f"{wire.session_id}:sample:4"


def test_a_step_and_its_result(wire):
    model_id = wire.model()
    output = wire.done(wire.forward_backward(model_id, [5, 6], [7]))
    assert output.metrics["loss:sum"] == pytest.approx(0.18)
    (record,) = output.loss_fn_outputs
    assert record.num_datums == 2 and numbers(record.fields["logprobs"].offsets, "q") == [0, 8, 12]
    assert numbers(record.fields["logprobs"].data) == pytest.approx([-0.05, -0.06, -0.07])
    step = wire.done(wire.ordered("optim_step", model_id, adam_params={"learning_rate": 0.5}))
    assert step["metrics"]["learning_rate"] == 0.5


def test_chunks_that_arrive_out_of_order_run_in_order(served, wire):
    model_id = wire.model()
    before = len(served.worker.ran)
    ids = {seq: wire.forward_backward(model_id, [seq], seq_id=seq) for seq in (3, 1, 2)}
    for seq, request_id in ids.items():
        assert wire.done(request_id).metrics["loss:sum"] == pytest.approx(seq / 100)
    assert served.worker.ran[before:] == [("forward_backward", 1), ("forward_backward", 2), ("forward_backward", 3)]


def test_a_request_that_is_sent_again_is_not_done_again(served, wire):
    model_id = wire.model()
    before = len(served.worker.ran)
    assert wire.forward_backward(model_id, [5], seq_id=1) == wire.forward_backward(model_id, [5], seq_id=1)
    body = {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    first, again = wire.ok("optim_step", **body), wire.ok("optim_step", **body)
    assert first == again
    assert wire.done(first["request_id"]) == wire.done(first["request_id"])  # a result can be fetched more than once
    assert served.worker.ran[before:] == [("forward_backward", 1), ("optim_step", 2)]
    create = {"session_id": wire.session_id, "model_seq_id": 9, "base_model": "tiny", "lora_config": {"rank": 4}}
    assert wire.ok("create_model", **create) == wire.ok("create_model", **create)


def test_a_model_that_is_asked_for_twice_at_once_is_made_once(served, wire):
    create = {"session_id": wire.session_id, "model_seq_id": 5, "base_model": "tiny", "lora_config": {"rank": 4}}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(wire.post("create_model", **create))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    assert len(wire.http.get("/v1/sessions").json()["data"]) == 1


def test_a_seq_that_is_used_for_something_else_is_refused_for_good(wire):
    model_id = wire.model()
    wire.forward_backward(model_id, [5], seq_id=1)
    answer = wire.send(wire.message(model_id, [6], seq_id=1).SerializeToString())
    assert (answer.status_code, answer.json()["code"]) == (422, "seq_reused")
    create = {"session_id": wire.session_id, "model_seq_id": 9, "base_model": "tiny", "lora_config": {"rank": 4}}
    wire.ok("create_model", **create)
    for other in ({"lora_config": {"rank": 8}}, {"lora_config": {"rank": 4, "seed": 1}}, {"lora_config": None}):
        answer = wire.post("create_model", **{**create, **other})
        assert (answer.status_code, answer.json()["code"]) == (422, "seq_reused")
    wire.ok("create_model", **create)


def test_what_is_refused_uses_up_its_place(wire):
    """The client counts on after a refusal. What it sends next must not wait for ever."""
    model_id = wire.model()
    refused = wire.forward_backward(model_id, [5], loss_fn="stable_reinforce")
    later = wire.ordered("optim_step", model_id, adam_params={})
    assert wire.failed(refused)["category"] == "user" and "importance_sampling" in wire.failed(refused)["error"]
    assert "metrics" in wire.done(later)
    assert wire.failed(refused)["code"] == "loss_not_offered"  # also after it had its turn


def test_clones_of_a_sampler_count_from_billions(wire):
    sampler = wire.sampler()
    ids = [wire.sample(sampler, [5], seq_id=seq) for seq in (0, 1, 3_000_000_000, 999_999_999 * 1_000_000_000)]
    assert len(set(ids)) == 4
    assert wire.sample(sampler, [5], seq_id=0) == ids[0]
    assert all(len(wire.done(request_id).sequences) == 1 for request_id in ids)


# ---------------------------------------------------------------- polling


def test_not_yet_is_408_with_a_reason_and_the_poll_is_held(served, wire, monkeypatch):
    monkeypatch.setattr(futures, "HOLD_S", 0.3)
    model_id = wire.model()
    waiting = wire.forward_backward(model_id, [5], seq_id=2)  # seq 1 has not come
    began = time.monotonic()
    answer = wire.post("retrieve_future", request_id=waiting, allow_metadata_only=True)
    assert answer.status_code == 408 and time.monotonic() - began >= 0.3
    assert answer.json()["queue_state"] in ("active", "paused_capacity")
    wire.forward_backward(model_id, [5], seq_id=1)
    assert wire.done(waiting).metrics["loss:sum"]


def test_a_poll_of_what_was_just_sent_is_known_and_still_sees_the_end(served, wire, monkeypatch):
    """A thousand samples that are waited for are polled a thousand times in half a minute."""
    monkeypatch.setattr(futures, "HOLD_S", 0.2)
    monkeypatch.setattr(Recent, "get", lambda self, key: self._kept.get(key, (0.0, None))[1])  # however slow the machine
    model_id, looks, look = wire.model(), [], futures._look
    monkeypatch.setattr(futures, "_look", lambda *given: looks.append(given[2]) or look(*given))
    waiting = wire.forward_backward(model_id, [5], seq_id=2)  # seq 1 has not come
    for _ in range(3):
        assert wire.post("retrieve_future", request_id=waiting).status_code == 408
    assert looks == []
    assert served.client().post("retrieve_future", request_id=waiting).status_code == 404
    wire.forward_backward(model_id, [5], seq_id=1)
    assert wire.done(waiting).metrics["loss:sum"]


def test_a_poll_is_answered_as_soon_as_the_result_is_there(served, wire, monkeypatch):
    model_id = wire.model()
    wire.done(wire.forward_backward(model_id, [5]))
    monkeypatch.setattr(served.worker, "pause_s", 0.4)
    began = time.monotonic()
    wire.done(wire.forward_backward(model_id, [5]))
    assert 0.4 <= time.monotonic() - began < 1.5


def test_an_owner_s_pause_is_shown_as_the_reason(served, wire, monkeypatch):
    monkeypatch.setattr(futures, "HOLD_S", 0.1)
    model_id = wire.model()
    job = wire.http.get("/v1/sessions").json()["data"][0]["id"]
    wire.done(wire.ordered("optim_step", model_id, adam_params={}))
    monkeypatch.setattr(served.worker, "pause_s", 0.6)
    waiting = wire.ordered("optim_step", model_id, adam_params={})
    assert wire.http.post(f"/v1/jobs/{job}/pause").status_code == 200
    answer = wire.post("retrieve_future", request_id=waiting)
    assert answer.status_code == 408 and answer.json()["queue_state"] in ("active", "paused_capacity")
    monkeypatch.setattr(served.worker, "pause_s", 0.0)


def test_an_expired_sample_is_410_and_an_expired_step_is_told_in_band(served, wire):

    model_id, sampler = wire.model(), wire.sampler()
    step = wire.ordered("optim_step", model_id, adam_params={})
    sample = wire.sample(sampler, [5])
    wire.done(step)
    wire.done(sample)
    with served.api.store.begin() as session:
        operations.expire(session, clock.now(session) + timedelta(days=1))
    answer = wire.result(sample)
    assert (answer.status_code, answer.json()["code"]) == (410, "result_expired")
    assert wire.failed(step)["category"] == "user" and "expired" in wire.failed(step)["error"]


# ---------------------------------------------------------------- sampling


def test_a_promise_names_each_sample_and_the_answer_has_as_many(wire):
    sampler = wire.sampler()
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}, "sampling_params": {"max_tokens": 3}}
    promise = wire.ok("asample", sampling_session_id=sampler, seq_id=0, num_samples=3, **body)
    assert len(set(promise["sample_sequence_ids"])) == 3
    answer = wire.done(promise["request_id"])
    assert [numbers(one.tokens, "i") for one in answer.sequences] == [[8, 9, 10], [9, 10, 11], [10, 11, 12]]
    assert all(one.stop_reason == LENGTH for one in answer.sequences)
    assert not answer.HasField("prompt_logprobs")


def test_prompt_log_probs_are_as_long_as_the_prompt_and_only_the_last_where_asked(wire):
    sampler = wire.sampler()
    answer = wire.done(wire.sample(sampler, [5, 6, 7], prompt_logprobs=True, topk_prompt_logprobs=2))
    assert (
        numbers(answer.prompt_logprobs)[1:] == pytest.approx([-0.06, -0.07])
        and str(numbers(answer.prompt_logprobs)[0]) == "nan"
    )
    assert (answer.topk_prompt_logprobs.k, answer.topk_prompt_logprobs.length) == (2, 3)
    assert numbers(answer.topk_prompt_logprobs.token_ids, "i") == [0, 0, 6, 7, 7, 8]
    assert numbers(answer.topk_prompt_logprobs.logprobs)[:2] == [-99999.0] * 2
    answer = wire.done(wire.sample(sampler, [5, 6, 7], 1, prompt_logprobs=True, prompt_logprobs_last_n=1))
    assert [str(value) == "nan" for value in numbers(answer.prompt_logprobs)] == [True, True, False]


def test_target_log_probs_come_for_the_cells_that_were_asked_for(wire):
    sampler = wire.sampler()
    dense = {"data": [9, 8, -1, 7], "dtype": "int64", "shape": [2, 2]}
    sparse = {
        "data": [9, 8, 7],
        "dtype": "int64",
        "shape": [2, 2],
        "sparse_crow_indices": [0, 2, 3],
        "sparse_col_indices": [0, 1, 1],
    }
    for seq, targets in enumerate((dense, sparse)):
        found = wire.done(wire.sample(sampler, [5, 6, 7], seq, target_prompt_logprobs=targets)).target_prompt_logprobs
        assert list(found.shape) == [2, 2]
        assert numbers(found.sparse_csr.values) == pytest.approx([-0.09, -0.08, -0.07])
        assert numbers(found.sparse_csr.col_indices, "q") == [0, 1, 1]


def test_stop_says_what_ends_an_answer(served, wire):
    def how(**parameters):
        body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "sampling_params": parameters}
        return unpack(sampling.asked(body, seq=1, lane="x", checkpoint_id=None, context=10, run_seed=0).request)[0]["sampling"]

    assert how()["ends"] is True and how()["stop"] == [] and how()["max_tokens"] == 9
    assert how(stop=[])["ends"] is False
    assert how(stop="ab")["stop"] == ["ab"] and how(stop=["a", "b"])["stop"] == ["a", "b"]
    assert how(stop=[3, 4])["stop_ids"] == [3, 4] and how(stop=[3, 4])["ends"] is True
    assert how(max_tokens=100)["max_tokens"] == 9 and how(top_k=-1)["top_k"] == 0


def test_a_snapshot_is_sampled_by_its_checkpoint_and_has_its_own_base(served, wire):
    model_id = wire.model()
    saved = wire.done(wire.ordered("save_weights_for_sampler", model_id, path="s1"))
    assert saved["path"] == f"tinker://{model_id}/sampler_weights/s1"
    sampler = wire.sampler(model_path=saved["path"])
    about = wire.http.get(f"/api/v1/samplers/{sampler}").json()
    assert about == {"sampler_id": sampler, "base_model": "tiny", "model_path": saved["path"]}
    assert wire.done(wire.sample(sampler, [5])).sequences


def test_an_expired_sampler_is_told_clearly(served, wire):
    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights_for_sampler", model_id, path="s1"))["path"]
    sampler = wire.sampler(model_path=path)
    assert wire.http.delete(f"/api/v1/training_runs/{model_id}/checkpoints/sampler_weights/s1").status_code == 204
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "sampling_params": {}}
    answer = wire.post("asample", sampling_session_id=sampler, seq_id=0, **body)
    assert (answer.status_code, answer.json()["code"]) == (404, "sampler_expired")
    assert (
        wire.post(
            "create_sampling_session", session_id=wire.session_id, sampling_session_seq_id=77, model_path=path
        ).status_code
        == 404
    )


# ---------------------------------------------------------------- weights


def test_saving_over_a_name_is_a_user_error_in_band_unless_it_is_asked_for(wire):
    model_id = wire.model()
    first = wire.done(wire.ordered("save_weights", model_id, path="one"))
    assert first == {"path": f"tinker://{model_id}/weights/one", "type": "save_weights"}
    assert wire.failed(wire.ordered("save_weights", model_id, path="one"))["category"] == "user"
    assert wire.done(wire.ordered("save_weights", model_id, path="one", overwrite=True)) == first
    assert len(wire.http.get(f"/api/v1/training_runs/{model_id}/checkpoints").json()["checkpoints"]) == 1


def test_a_load_that_is_sent_again_is_the_same_one_though_what_it_names_was_overwritten(wire):
    model_id, other = wire.model(), wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    load = {"model_id": other, "seq_id": 1, "path": path, "optimizer": True}
    first = wire.ok("load_weights", **load)["request_id"]
    wire.done(wire.ordered("save_weights", model_id, path="one", overwrite=True))
    again = wire.ok("load_weights", **load)["request_id"]
    assert wire.done(first) == wire.done(again) == {"model_id": other, "type": "load_weights"}


def test_weights_of_all_kinds_have_names_of_their_own(wire):
    model_id = wire.model()
    for path in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
        answer = wire.done(wire.ordered(path, model_id, path="same", ttl_seconds=3600))
        assert answer["type"] == path
    found = wire.http.get("/api/v1/checkpoints").json()["checkpoints"]
    assert {(one["checkpoint_id"], one["checkpoint_type"]) for one in found} == {
        ("weights/same", "training"),
        ("sampler_weights/same", "sampler"),
        ("external_weights/same", "external"),
    }
    assert all(one["expires_at"] for one in found)


def test_a_model_is_made_of_a_checkpoint(wire):
    model_id = wire.model(train_unembed=False, train_attn=False)
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    answer = wire.ok("load_weights", session_id=wire.session_id, model_seq_id=7, path=path, optimizer=True)
    made = wire.done(answer["request_id"])
    assert made == {"model_id": f"{wire.session_id}:train:7", "type": "load_weights"}
    assert wire.ok("get_info", model_id=made["model_id"])["lora_rank"] == 4
    job = wire.http.get(f"/v1/jobs/{wire.http.get('/v1/sessions').json()['data'][0]['id']}").json()
    assert job["spec"]["model"]["from_checkpoint"]["load"] == "weights+optimizer"
    wire.seqs[model_id] = wire.seqs[model_id]
    legacy = wire.done(wire.ordered("load_weights", model_id, path=path, optimizer=False))
    assert legacy == {"model_id": model_id, "type": "load_weights"}


def test_weights_info_echoes_what_is_trained(wire):
    parts = {"train_mlp": True, "train_attn": False, "train_unembed": False}
    model_id = wire.model(**parts, rank=3)
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    about = wire.ok("weights_info", tinker_path=path)
    assert about == {"base_model": "tiny", "is_lora": True, "lora_rank": 3, "optimizer_config": {"type": "adamw"}, **parts}


def test_adam_s_defaults_are_the_client_s_own(served):
    def optimizer(**sent):
        return unpack(log.optim_step(OptimStep(model_id="m", seq_id=1, **sent)).request)[0]["optimizer"]

    defaults = {"learning_rate": 1e-4, "betas": [0.9, 0.95], "eps": 1e-12, "weight_decay": 0.0, "max_grad_norm": None}
    assert optimizer(adam_params={}) == defaults
    assert optimizer(adam_params={"grad_clip_norm": 0.5})["max_grad_norm"] == 0.5


def test_a_checkpoint_in_use_loses_its_path_and_keeps_its_files_until_it_is_not(served, wire):
    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    wire.done(wire.ok("load_weights", session_id=wire.session_id, model_seq_id=7, path=path, optimizer=True)["request_id"])
    checkpoint = wire.http.get("/v1/checkpoints").json()["data"][0]["id"]
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"
    assert wire.http.delete(url).status_code == 204
    assert wire.http.delete(url).status_code == 404
    assert wire.http.get(f"/v1/checkpoints/{checkpoint}/archive").status_code == 200
    assert wire.http.get("/api/v1/checkpoints").json()["checkpoints"] == []
    sampler = wire.post("create_sampling_session", session_id=wire.session_id, sampling_session_seq_id=5, model_path=path)
    assert (sampler.status_code, sampler.json()["code"]) == (404, "checkpoint_not_found")
    wire.done(wire.ordered("save_weights", model_id, path="one"))  # the name is free
    again = wire.done(wire.ordered("save_weights", model_id, path="two"))["path"]
    wire.done(wire.ok("load_weights", session_id=wire.session_id, model_seq_id=8, path=again, optimizer=True)["request_id"])
    pinned = wire.http.get("/v1/checkpoints").json()["data"][0]["id"]
    assert wire.http.post(f"/v1/checkpoints/{pinned}/pin").status_code == 200
    refused = wire.http.delete(url.replace("one", "two"))
    assert (refused.status_code, refused.json()["code"]) == (422, "checkpoint_pinned")
    assert wire.ok("weights_info", tinker_path=again)["lora_rank"] == 4


def test_a_sampler_of_weights_that_are_deleted_while_a_run_needs_them(served, wire):
    """The files stay for the run. Who samples them is told that they are gone, also of what waited."""
    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    wire.done(wire.ok("load_weights", session_id=wire.session_id, model_seq_id=7, path=path, optimizer=True)["request_id"])
    sampler = wire.sampler(model_path=path)
    sample = wire.sample(sampler, [5])
    wire.done(sample)
    assert wire.http.delete(f"/api/v1/training_runs/{model_id}/checkpoints/weights/one").status_code == 204
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "sampling_params": {}}
    answer = wire.post("asample", sampling_session_id=sampler, seq_id=1, **body)
    assert (answer.status_code, answer.json()["code"]) == (404, "sampler_expired")
    error = {"code": "checkpoint_not_found", "detail": "no checkpoint ckpt_1 in this project", "category": "user"}
    with served.api.store.begin() as session:  # as a worker tells it, which came to it too late
        row = session.get_one(Operation, sample.rpartition("/")[2])
        row.answer, row.error, row.status = None, error, "failed"
    failed = wire.failed(sample)
    assert (failed["category"], failed["code"]) == ("user", "sampler_expired") and "deleted" in failed["error"]


def test_a_promoted_checkpoint_is_deleted_when_its_alias_is(wire):
    model_id = wire.model()
    wire.done(wire.ordered("save_weights", model_id, path="one"))
    checkpoint = wire.http.get("/v1/checkpoints").json()["data"][0]["id"]
    assert wire.http.put("/v1/aliases/wire@production", json={"checkpoint": checkpoint}).status_code == 201
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"
    refused = wire.http.delete(url)
    assert refused.json()["code"] == "checkpoint_aliased" and "wire@production" in refused.text
    assert wire.http.delete("/v1/aliases/wire@production").status_code == 204
    assert wire.http.delete(url).status_code == 204


def test_ttl_publish_and_copies(wire):
    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one", user_metadata={"k": "v"}))["path"]
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"

    def shown():
        return wire.http.get("/api/v1/checkpoints").json()["checkpoints"][0]

    assert shown()["public"] is False and shown()["expires_at"] is None and shown()["user_metadata"] == {"k": "v"}
    assert wire.http.post(f"{url}/publish").status_code == 204 and shown()["public"] is True
    assert wire.http.delete(f"{url}/publish").status_code == 204 and shown()["public"] is False
    assert wire.http.put(f"{url}/ttl", json={"ttl_seconds": 3600}).status_code == 204 and shown()["expires_at"]
    assert wire.http.put(f"{url}/ttl", json={"ttl_seconds": None}).status_code == 204 and shown()["expires_at"] is None
    assert wire.http.put(f"{url}/ttl", json={"ttl_seconds": 1}).status_code == 422
    project = wire.post("sessions/search").json()["sessions"][0]["project_id"]
    copy = wire.ok("copy_weights", source_path=path, destination_project_id=project)["tinker_path"]
    assert copy.endswith(":train:0/weights/one") and copy != path
    listed = wire.http.get("/api/v1/checkpoints").json()
    assert [one["tinker_path"] for one in listed["checkpoints"]] == [copy, path] and listed["cursor"]["total_count"] == 2
    assert [one["checkpoints_count"] for one in wire.post("sessions/search").json()["sessions"]] == [1, 1]
    assert wire.http.delete(url).status_code == 204
    assert wire.ok("weights_info", tinker_path=copy)["lora_rank"] == 4
    started = wire.ok("load_weights", session_id=wire.session_id, model_seq_id=8, path=copy, optimizer=False)
    assert wire.done(started["request_id"])["type"] == "load_weights"
    run = copy.removeprefix("tinker://").partition("/")[0]
    assert wire.post("optim_step", model_id=run, seq_id=1).json()["code"] == "not_trainable"


def test_a_copy_that_is_asked_for_twice_at_once_is_made_once(served, wire):
    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    body = {"source_path": path, "session_id": wire.session_id, "model_seq_id": 50}
    with ThreadPoolExecutor(4) as pool:
        copies = {one["tinker_path"] for one in pool.map(lambda _: wire.ok("copy_weights", **body), range(4))}
    assert copies == {f"tinker://{wire.session_id}:train:50/weights/one"}
    listed = wire.http.get("/api/v1/checkpoints").json()["checkpoints"]
    [row] = wire.http.get(f"/v1/jobs/{job_of(served, model_id)}/checkpoints").json()["data"]
    assert len(listed) == 2
    folder = served.api.settings.data_dir / "blobs" / "checkpoints" / row["job_id"]
    assert len(list(folder.iterdir())) == 2  # of the copies that came too late nothing is left


def test_a_source_that_goes_while_it_is_copied_is_not_found(wire, monkeypatch):
    def gone(*_, **__):
        raise FileNotFoundError

    model_id = wire.model()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "copytree", gone)
        answer = wire.post("copy_weights", source_path=path)
    assert (answer.status_code, answer.json()["code"]) == (404, "files_missing")


def test_files_are_downloaded_by_signed_urls_without_a_key(served, wire):
    model_id = wire.model()
    wire.done(wire.ordered("save_weights_external", model_id, path="one"))
    url = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/one/external_weights_urls"
    urls = wire.http.get(url).json()["urls"]
    assert urls.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    good = urls["adapter_model.safetensors"]
    assert httpx.get(good).content == b"weights"
    part = httpx.get(good, headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"igh", "bytes 2-4/7")
    assert httpx.get(good.replace("signature=", "signature=0")).status_code == 404
    assert httpx.get(good.replace("adapter_model.safetensors", "adapter_config.json")).status_code == 404
    until = good.partition("until=")[2].partition("&")[0]
    assert httpx.get(good.replace(until, str(int(until) + 1))).status_code == 404


# ---------------------------------------------------------------- sessions


def test_heartbeats_keep_a_session_and_end_with_it(wire):
    assert wire.ok("session_heartbeat", session_id=wire.session_id) == {"type": "session_heartbeat"}
    model_id = wire.model()
    wire.done(wire.ordered("optim_step", model_id, adam_params={}))
    finish = {"reason": {"type": "success"}, "detail": None}
    for _ in range(2):
        assert wire.post(f"sessions/{wire.session_id}/finish", **finish).status_code == 204
    assert wire.post("session_heartbeat", session_id=wire.session_id).status_code == 410
    job = wire.http.get("/v1/sessions").json()["data"][0]["id"]
    status = "running"
    while status == "running":
        status = wire.http.get(f"/v1/jobs/{job}", params={"wait_s": 1}).json()["status"]
    assert status == "succeeded"
    refused = wire.post("optim_step", model_id=model_id, seq_id=5, adam_params={})
    assert (refused.status_code, refused.json()["code"]) == (422, "session_over")
    assert wire.post("create_model", session_id=wire.session_id, model_seq_id=3, base_model="tiny").status_code == 422


def test_sessions_are_listed_searched_and_read(served):
    wire = served.client("tinker-search")
    other = served.client("tinker-search")
    model_id, sampler = wire.model(), wire.sampler()
    assert wire.http.get("/api/v1/sessions").json()["sessions"] == [other.session_id, wire.session_id]
    assert wire.http.get("/api/v1/sessions", params={"limit": 1, "offset": 1}).json()["sessions"] == [wire.session_id]
    about = wire.http.get(f"/api/v1/sessions/{wire.session_id}").json()
    assert (
        about["training_run_ids"] == [model_id] and about["sampler_ids"] == [sampler] and about["user_metadata"] == {"a": "b"}
    )
    page = wire.ok("sessions/search", limit=1, statuses=[{"type": "active"}])
    assert [one["session_id"] for one in page["sessions"]] == [other.session_id]
    rest = wire.ok("sessions/search", cursor=page["next_cursor"], user_metadata={"a": "b"})
    assert [one["session_id"] for one in rest["sessions"]] == [wire.session_id] and "next_cursor" not in rest
    assert wire.ok("sessions/search", user_metadata={"a": "c"})["sessions"] == []


def test_training_runs_are_listed(wire):
    first, second = wire.model(), wire.model(rank=2)
    listed = wire.http.get("/api/v1/training_runs", params={"limit": 1}).json()
    assert [run["training_run_id"] for run in listed["training_runs"]] == [second]
    assert listed["cursor"] == {"offset": 0, "limit": 1, "total_count": 2}
    wire.done(wire.ordered("save_weights", first, path="a"))
    wire.done(wire.ordered("save_weights", first, path="b"))
    wire.done(wire.ordered("save_weights_for_sampler", first, sampling_session_seq_id=0))  # has no name of its own
    run = wire.http.get(f"/api/v1/training_runs/{first}").json()
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/b" and run["last_sampler_checkpoint"] is None
    assert (run["is_lora"], run["lora_rank"], run["base_model"]) == (True, 4, "tiny")


def test_capabilities_name_the_operator_s_models(served, wire):
    folder = served.api.settings.local_models_dir / "org" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 99}')
    found = wire.http.get("/api/v1/get_server_capabilities").json()["supported_models"]
    assert [(one["model_name"], one["max_context_length"]) for one in found] == [("tiny", 128), ("org/small", 99)]


def test_targets_of_two_dimensions_come_back_as_they_went(wire):
    model_id = wire.model()
    message = wire.message(model_id, [5, 6], [7], seq_id=next(wire.seqs[model_id]))
    wide = message.data[0].loss_fn_inputs
    wide["target_tokens"].dense, wide["target_tokens"].dtype = array("q", [1, 2, 3, 4]).tobytes(), INT64
    wide["weights"].dense = array("f", [0.5] * 4).tobytes()
    for name in ("target_tokens", "weights"):
        wide[name].shape[:] = [2, 2]
    answer = wire.send(message.SerializeToString())
    request_id = answer.json()["request_id"]
    assert re.fullmatch(OPERATION, request_id)  # it grows with no batch
    first, second = wire.done(request_id).loss_fn_outputs
    assert numbers(first.fields["logprobs"].data) == pytest.approx([-0.01, -0.02, -0.03, -0.04])
    assert list(first.fields["logprobs"].trailing_shape) == [2]
    assert numbers(second.fields["logprobs"].data) == pytest.approx([-0.07])
    assert list(second.fields["logprobs"].trailing_shape) == []
