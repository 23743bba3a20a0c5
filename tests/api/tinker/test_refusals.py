"""What the Tinker wire refuses, how it says so, and that nothing that is sent is an error of ours."""

import random
from array import array

import httpx
import pytest
import zstandard

from service.tinker import futures

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5]}]}
ABSENT = "tinker_01k00000000000000000000000:train:0"


def detail(answer: httpx.Response) -> str:
    """Every error is {"detail": text}, with a body: the client takes an empty 400 for a fault on the way."""
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json()["detail"], str) and answer.json()["detail"]
    return answer.json()["detail"]


# ---------------------------------------------------------------- bodies


def test_a_zstd_bomb_is_too_large_whatever_it_declares(wire, compress):
    model_id = wire.model()
    bomb = bytes(2**20 + 1)
    declared = wire.send(compress(bomb), content_encoding="zstd")
    assert declared.status_code == 413 and "decompressed" in detail(declared)
    silent = wire.send(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**28)), content_encoding="zstd")
    assert silent.status_code == 400 and "zstd" in detail(silent)
    whole = wire.message(model_id, [5], seq_id=1).SerializeToString()
    assert wire.send(compress(whole), content_encoding="zstd").status_code == 200


def test_a_body_that_is_cut_off_is_malformed(wire, compress):
    whole = wire.message(wire.model(), [5, 6, 7], seq_id=1).SerializeToString()
    for answer in (wire.send(whole[:-2]), wire.send(compress(whole)[:-2], content_encoding="zstd"), wire.send(b"\xff" * 40)):
        assert answer.status_code == 400 and detail(answer)


def test_other_formats_and_encodings_are_named(wire):
    raw = wire.message(wire.model(), [5], seq_id=1).SerializeToString()
    assert wire.send(raw, content_encoding="gzip").status_code == 415
    answer = wire.post("forward_backward", model_id="m", seq_id=1)
    assert answer.status_code == 415 and "application/x-protobuf" in detail(answer)


def test_fields_that_a_newer_client_sends_are_ignored(wire):
    model_id = wire.model()
    wire.done(wire.ordered("optim_step", model_id, adam_params={"learning_rate": 0.1, "new": 1}, newer={"a": 1}))
    wire.done(wire.sample(wire.sampler(), [5], newest=True, sampling_params={"min_p": 0.1}))


# ---------------------------------------------------------------- in band


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1.0}}, "learning_rate"),
        ("optim_step", {"adam_params": {"beta2": 1.5}}, "adam_params"),
        ("optim_step", {"adam_params": {"grad_clip_norm": -0.5}}, "grad_clip_norm"),
        ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}}, "dimuon"),
        ("save_weights", {"path": "a/b"}, "a/b"),
        ("save_weights", {"path": "_sampler.1"}, "_sampler.1"),
        ("save_weights", {"path": "a", "ttl_seconds": 5}, "ttl_seconds"),
        ("save_weights_external", {"path": "a", "age_encryption_recipients": ["age1"]}, "encrypt"),
        ("load_weights", {"path": f"tinker://{ABSENT}/weights/a", "optimizer": True}, "never was"),
        ("load_weights", {"path": "tinker://nothing", "optimizer": True}, "tinker://nothing"),
    ],
)
def test_operations_that_are_wrong_fail_as_the_user_s_with_200_and_later_ones_go_on(wire, path, body, word):
    model_id = wire.model()
    said = wire.failed(wire.ordered(path, model_id, **body))
    assert said["category"] == "user" and word in said["error"]
    assert "metrics" in wire.done(wire.ordered("optim_step", model_id, adam_params={}))


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}}, "/prompt/chunks/0/tokens/0"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [2**31]}]}}, "/prompt/chunks/0/tokens/0"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": []}]}}, "at least one token"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "image"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5] * 200}]}}, "context holds 128"),
        ({"num_samples": 0}, "num_samples"),
        ({"sampling_params": {"temperature": -1.0}}, "temperature"),
        ({"sampling_params": {"top_p": 0.0}}, "top_p"),
        ({"sampling_params": {"stop": [""]}}, "stop"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": True}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": -3}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 10**30}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [5, 1]}}, "/target_prompt_logprobs/shape"),
    ],
)
def test_samples_that_are_wrong_fail_as_the_user_s(wire, body, word):
    sampler = wire.sampler()
    answer = wire.ok("asample", sampling_session_id=sampler, seq_id=0, **{"prompt": PROMPT, "sampling_params": {}, **body})
    said = wire.failed(answer["request_id"])
    assert said["category"] == "user" and word in said["error"]


# ---------------------------------------------------------------- before there is an operation


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("create_model", {"model_seq_id": 0, "base_model": "no such/model x"}, 422, "no such/model x"),
        ("create_model", {"model_seq_id": 0, "base_model": "tiny", "optimizer_config": {"type": "dimuon"}}, 422, "dimuon"),
        ("create_model", {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 0}}, 422, "rank"),
        ("create_model", {"model_seq_id": -1, "base_model": "tiny"}, 422, "model_seq_id"),
        (
            "create_model",
            {
                "model_seq_id": 0,
                "base_model": "tiny",
                "lora_config": {"rank": 1, "train_mlp": False, "train_attn": False, "train_unembed": False},
            },
            422,
            "nothing would be trained",
        ),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "base_model": "no such/model x"}, 422, "no such/model x"),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "base_model": "/m" * 150}, 422, "/m/m"),
        ("create_sampling_session", {"sampling_session_seq_id": 0}, 422, "base_model"),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "model_path": "tinker://a/weights/b"}, 404, "never was"),
        ("load_weights", {"model_seq_id": 0, "path": f"tinker://{ABSENT}/weights/a", "optimizer": True}, 404, "never was"),
        ("load_weights", {"path": f"tinker://{ABSENT}/weights/a", "optimizer": True}, 422, "model_seq_id"),
        ("copy_weights", {"source_path": f"tinker://{ABSENT}/weights/a"}, 404, "never was"),
        ("retrieve_future", {"request_id": "op_x"}, 404, "op_x"),
    ],
)
def test_what_cannot_begin_is_refused_at_once(wire, path, body, status, word):
    answer = wire.post(path, **{"session_id": wire.session_id, **body})
    assert answer.status_code == status and word in detail(answer)


def test_an_optimizer_s_state_that_was_not_saved_cannot_be_loaded(wire):
    path = wire.done(wire.ordered("save_weights_for_sampler", wire.model(), path="s"))["path"]
    answer = wire.post("load_weights", session_id=wire.session_id, model_seq_id=8, path=path, optimizer=True)
    assert answer.status_code == 422 and "optimizer" in detail(answer)


def test_a_key_is_needed_and_may_come_as_the_client_sends_it(served, wire):
    with httpx.Client(base_url=served.api.url) as nobody:
        answer = nobody.post("/api/v1/client/config", json={})
    assert answer.status_code == 401 and "tml-" in detail(answer)


# ---------------------------------------------------------------- others


def test_nothing_of_another_project_s_can_be_seen_or_used(served, wire):
    model_id, sampler = wire.model(), wire.sampler()
    step = wire.ordered("optim_step", model_id, adam_params={})
    sample = wire.sample(sampler, [5])
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    stranger = served.client()
    kept = {"session_id": stranger.session_id, "model_seq_id": 0, "sampling_session_seq_id": 0}
    url = f"training_runs/{model_id}/checkpoints/weights/one"
    posts = [
        ("session_heartbeat", {"session_id": wire.session_id}),
        (f"sessions/{wire.session_id}/finish", {"reason": {"type": "success"}}),
        ("create_model", {**kept, "session_id": wire.session_id, "base_model": "tiny"}),
        ("create_sampling_session", {**kept, "session_id": wire.session_id, "base_model": "tiny"}),
        ("create_sampling_session", {**kept, "model_path": path}),
        ("load_weights", {**kept, "path": path, "optimizer": False}),
        ("copy_weights", {"source_path": path, "session_id": stranger.session_id, "model_seq_id": 3}),
        ("get_info", {"model_id": model_id}),
        ("optim_step", {"model_id": model_id, "seq_id": 9, "adam_params": {}}),
        ("save_weights", {"model_id": model_id, "seq_id": 9, "path": "x"}),
        ("save_weights_for_sampler", {"model_id": model_id, "seq_id": 9, "path": "x"}),
        ("save_weights_external", {"model_id": model_id, "seq_id": 9, "path": "x"}),
        ("asample", {"sampling_session_id": sampler, "seq_id": 9, "prompt": PROMPT, "sampling_params": {}}),
        ("weights_info", {"tinker_path": path}),
        ("retrieve_future", {"request_id": step}),
        ("retrieve_future", {"request_id": sample}),
        ("retrieve_future", {"request_id": f"model={model_id}"}),
        ("cancel_future", {"request_id": sample}),
        (f"{url}/publish", {}),
    ]
    answers = [(name, stranger.post(name, **body)) for name, body in posts]
    answers.append(("forward_backward", stranger.send(stranger.message(model_id, [5], seq_id=9).SerializeToString())))
    gets = (
        f"sessions/{wire.session_id}",
        f"samplers/{sampler}",
        f"training_runs/{model_id}",
        f"training_runs/{model_id}/checkpoints",
        f"{url}/external_weights_urls",
    )
    answers += [(name, stranger.http.get(f"/api/v1/{name}")) for name in gets]
    answers.append(("delete", stranger.http.delete(f"/api/v1/{url}")))
    answers.append(("unpublish", stranger.http.delete(f"/api/v1/{url}/publish")))
    answers.append(("ttl", stranger.http.put(f"/api/v1/{url}/ttl", json={"ttl_seconds": 3600})))
    assert [(name, answer.status_code) for name, answer in answers if answer.status_code != 404] == []
    for listed in ("sessions", "training_runs", "checkpoints"):
        found = stranger.http.get(f"/api/v1/{listed}").json()[listed]
        assert not any(wire.session_id in str(each) for each in found)
    assert wire.http.get(f"/api/v1/{url}/external_weights_urls").status_code == 200  # it is still there


def test_a_read_only_key_trains_nothing(served, wire):
    made = wire.http.post("/v1/keys", json={"name": "reader", "scopes": ["read"]}).json()
    with httpx.Client(base_url=served.api.url, headers={"X-API-Key": made["key"]}) as reader:
        answer = reader.post("/api/v1/create_session", json={"tags": []})
        assert answer.status_code == 403 and "write" in detail(answer)
        assert reader.get("/api/v1/training_runs").status_code == 200


# ---------------------------------------------------------------- anything at all

ROUTES = [
    "client/config",
    "client/dynamic_config",
    "create_session",
    "session_heartbeat",
    "telemetry",
    "create_model",
    "get_info",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "create_sampling_session",
    "asample",
    "weights_info",
    "copy_weights",
    "sessions/search",
    "retrieve_future",
    "cancel_future",
]
ODD = [None, True, -1, 0, 1, 2**63, 1e300, "", "a", "tinker://a/weights/b", "\0", "\U0001f642" * 300, [], [None], [[1]], {}]


def test_no_json_is_an_error_of_ours(served, wire, monkeypatch):
    monkeypatch.setattr(futures, "HOLD_S", 0.01)
    draw = random.Random(9)
    model_id, sampler = wire.model(), wire.sampler()
    path = wire.done(wire.ordered("save_weights", model_id, path="one"))["path"]
    good = {
        "session_id": wire.session_id,
        "model_id": model_id,
        "seq_id": 5,
        "model_seq_id": 3,
        "base_model": "tiny",
        "lora_config": {"rank": 2},
        "adam_params": {"learning_rate": 0.1},
        "path": path,
        "optimizer": True,
        "sampling_session_seq_id": 3,
        "sampling_session_id": sampler,
        "prompt": PROMPT,
        "sampling_params": {"max_tokens": 2},
        "num_samples": 2,
        "target_prompt_logprobs": {"data": [], "dtype": "int64", "shape": [0, 1]},
        "tinker_path": path,
        "source_path": path,
        "request_id": f"model={model_id}",
        "statuses": [{"type": "active"}],
        "cursor": {"last_created_at": "x", "last_session_id": "y"},
        "user_metadata": {"a": "b"},
        "ttl_seconds": 3600,
    }
    seen = set()
    for round_ in range(340):
        body = {name: value for name, value in good.items() if draw.random() < 0.8}
        for name in draw.sample(sorted(body), k=min(len(body), draw.randrange(3))):
            body[name] = draw.choice(ODD)
        answer = wire.post(ROUTES[round_ % len(ROUTES)], **body)
        seen.add(answer.status_code)
        assert answer.status_code < 500 and answer.status_code != 409, (ROUTES[round_ % len(ROUTES)], body, answer.text)
        if answer.status_code not in (200, 204, 408):
            detail(answer)
    assert {200, 404, 422} <= seen


def test_no_protobuf_is_an_error_of_ours(served, wire, compress):
    draw = random.Random(8)
    model_id = wire.model()
    seen = set()
    for round_ in range(200):
        message = wire.message(model_id, [5, 6], [7], seq_id=round_ + 1)
        for _ in range(draw.randrange(3)):
            value = draw.choice(message.data).loss_fn_inputs[draw.choice(["target_tokens", "weights", "logprobs", "x"])]
            value.shape[:] = [draw.choice([0, 1, 2, -1, 2**40]) for _ in range(draw.randrange(4))]
            value.dtype = draw.randrange(-1, 7)
            if draw.random() < 0.3:
                value.sparse_csr.values = array("f", [1.0] * draw.randrange(4)).tobytes()
                value.sparse_csr.crow_indices = array("q", [draw.randrange(-1, 4) for _ in range(3)]).tobytes()
                value.sparse_csr.col_indices = array("q", [draw.randrange(-1, 4) for _ in range(2)]).tobytes()
        raw = bytearray(message.SerializeToString())
        for _ in range(draw.choice([0, 0, 0, 1, 3])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        headers = {"content_encoding": "zstd"} if round_ % 4 == 0 else {}
        answer = wire.send(compress(bytes(raw)) if headers else bytes(raw), **headers)
        seen.add(answer.status_code)
        assert answer.status_code < 500 and answer.status_code != 409, (bytes(raw), answer.text)
    assert {200, 400} <= seen
