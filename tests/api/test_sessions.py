"""Sessions over HTTP. A stand-in for the worker claims them and answers their operations as one does."""

import json
import struct
from collections.abc import Callable
from threading import Thread
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from service.jobs import lease as leases
from service.relay.tensors import Tensor, encode
from service.rewards import texts
from service.sessions.codec import pack, summary, unpack
from service.spec.session import base_key
from service.store import operations
from service.store.operations import Answered
from service.store.session import Store
from service.store.tables import Operation

LORA = {"source": "tiny", "adapter": {"kind": "lora", "rank": 4}}
FORWARD: dict[str, Any] = {
    "kind": "forward_backward",
    "loss": "importance_sampling",
    "rows": [
        {"tokens": [1, 2], "target_tokens": [2, 3], "log_probs": [-1.0, -2.0], "advantages": [0.0, 1.0]},
        {"tokens": [4], "target_tokens": [5], "log_probs": [-0.5], "advantages": [-1.0]},
    ],
}
EVAL: Any = {
    "kind": "eval",
    "rows": [{"prompt": "1", "answer": "1"}],
    "graders": [{"kind": "exact", "reference": "{answer}"}],
}
STEP = {"kind": "optim_step", "optimizer": {"learning_rate": 1e-3}}


def start(client: httpx.Client, **spec: Any) -> dict[str, Any]:
    answer = client.post("/v1/sessions", json={"model": LORA, **spec})
    assert answer.status_code == 201, answer.text
    return answer.json()


def send(client: httpx.Client, session: dict[str, Any], seq: int, body: dict[str, Any], **headers: str) -> httpx.Response:
    return client.post(f"/v1/sessions/{session['id']}/operations", json={"seq": seq, **body}, headers=headers)


def logged(api: Any, session: dict[str, Any], seq: int) -> Operation:
    with api.store.begin(readonly=True) as sql:
        (row,) = operations.since(sql, session["id"], seq, limit=1)
        return row


def floats(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), memoryview(struct.pack(f"<{len(values)}f", *values)))


def integers(*values: int) -> Tensor:
    return Tensor("I64", (len(values),), memoryview(struct.pack(f"<{len(values)}q", *values)))


def answer_next(api: Any, session: dict[str, Any], seq: int, answered: Callable[[str], Answered]) -> None:
    lease, _ = api.claim(session["id"])
    row = logged(api, session, seq)
    leases.answer_operations(api.store, api.settings, lease, [answered(row.id)])
    api.doorbell.signal(session["id"], "events")


def test_operations_newest_first_say_what_came_of_them(api: Any, client: httpx.Client) -> None:
    session = start(client)
    url = f"/v1/sessions/{session['id']}/operations"
    for seq in (1, 2, 3):
        send(client, session, seq, STEP)
    metrics = {"grad_norm": 0.5, "skipped": 0}
    lease, _ = api.claim(session["id"])
    stored = [
        Answered(logged(api, session, 1).id, pack({"metrics": metrics}, {}), began=monotonic()),
        Answered(logged(api, session, 2).id, error={"code": "x", "detail": "y", "category": "user"}),
    ]
    leases.answer_operations(api.store, api.settings, lease, stored)
    page = client.get(url, params={"order": "newest_first", "limit": 2}).json()
    assert [(view["seq"], view["status"], view["summary"]) for view in page["data"]] == [
        (3, "waiting", None),
        (2, "failed", None),
    ]
    assert page["has_more"] and page["waiting"] == 1
    rest = client.get(url, params={"order": "newest_first", "before": page["last_id"]}).json()
    (first,) = rest["data"]
    assert (first["seq"], first["attempt"], first["summary"]) == (1, 1, {"metrics": metrics}) and not rest["has_more"]
    assert first["created_at"] <= first["started_at"] <= first["finished_at"]
    strange = client.get(url, params={"order": "newest_first", "before": session["id"]})
    (wrong,) = strange.json()["errors"]
    assert (strange.status_code, wrong["code"], wrong["pointer"]) == (422, "unknown_cursor", "/query/before")
    assert client.get(url, params={"order": "newest"}).status_code == 422


def test_what_waits_is_told_of_when_it_is_on_the_disk(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request may have logged it and wait for the disk itself."""
    session, synced, sync = start(client), list[float](), Store.sync
    monkeypatch.setattr(Store, "sync", lambda self: synced.append(monotonic()) or sync(self))
    assert send(client, session, 1, STEP).status_code == 202
    assert send(client, session, 1, STEP).status_code == 202 and len(synced) >= 2
    for path, status in (("operations/1", 202), ("operations", 200)):
        before = monotonic()
        assert client.get(f"/v1/sessions/{session['id']}/{path}").status_code == status
        assert synced[-1] > before


@pytest.mark.parametrize("path", ["/v1/sessions/{}/operations", "/v1/jobs/{}/events"])
def test_what_belongs_to_one_order_is_refused_with_the_other(client: httpx.Client, path: str) -> None:
    url = path.format(start(client)["id"])
    for wrong in ({"before": "1"}, {"order": "newest_first", "after": "1"}):
        answer = client.get(url, params=wrong)
        assert answer.status_code == 422 and "the order is" in answer.text, answer.text
        (name,) = wrong.keys() - {"order"}
        assert name in answer.json()["errors"][0]["detail"] and answer.json()["errors"][0]["pointer"] == "/query"
    assert client.get(url, params={"after": "1"}).status_code == client.get(url, params={"order": "newest_first"}).status_code


def test_an_answer_s_beginning_tells_what_is_short_of_it() -> None:
    head = {"finish_reasons": ["stop", "length"], "texts": ["a" * 50, "b"], "name": None}
    raw = pack(head, {"tokens": integers(1, 2, 3)})
    assert summary(raw[:-8]) == {"answers": 2, "tokens": 3}  # without its tensors
    assert summary(raw[:60]) == summary(b"") == {}
    long = pack({"finish_reasons": ["stop", "length"], "step": 12, "texts": ['"é\\\n\0' * 2000]}, {"tokens": integers(1, 2, 3)})
    told = [summary(long[:size]) for size in range(300)]  # cut anywhere: within an escape, a character, a number
    assert told[0] == {} and told[-1] == {"answers": 2, "step": 12}
    assert all(part in ({}, {"answers": 2}, told[-1]) for part in told)


def test_session_is_a_job(api: Any, client: httpx.Client) -> None:
    made = start(client, name="loop", tags=["mine"])
    assert (made["kind"], made["status"], made["name"]) == ("session", "queued", "loop")
    assert made["spec"]["model"]["adapter"]["rank"] == 4
    assert client.get(f"/v1/jobs/{made['id']}").json()["id"] == made["id"]
    assert [row["id"] for row in client.get("/v1/sessions").json()["data"]] == [made["id"]]
    assert client.get("/v1/jobs", params={"kind": "session"}).json()["data"][0]["id"] == made["id"]
    assert client.get("/v1/sessions", params={"kind": "sampler"}).json()["data"] == []
    refused = client.get("/v1/sessions", params={"kind": "rl"})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/query/kind")
    assert client.post(f"/v1/jobs/{made['id']}/cancel").json()["status"] == "cancelled"
    late = send(client, made, 1, STEP)
    assert (late.status_code, late.json()["code"]) == (409, "session_over")


def test_a_session_is_not_forked_and_the_answer_says_what_to_do(client: httpx.Client) -> None:
    made = start(client)
    assert "fork" not in made["allowed_actions"] and "cancel" in made["allowed_actions"]
    answer = client.post(f"/v1/jobs/{made['id']}/fork")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_forkable")
    assert "model.from_checkpoint" in answer.json()["hint"]
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_a_session_is_made_once(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    first, second = (client.post("/v1/sessions", json={"model": LORA}, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]


def test_operation_is_logged_once_and_as_it_was_sent(api: Any, client: httpx.Client) -> None:
    session = start(client)
    first, again = send(client, session, 1, FORWARD), send(client, session, 1, FORWARD)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert (first.json()["status"], first.json()["seq"], first.json()["result"]) == ("waiting", 1, None)
    head, tensors = unpack(logged(api, session, 1).request or b"")
    assert head == {"kind": "forward_backward", "loss": "importance_sampling", "config": {}}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "cu_seqlens": ("I64", (3,)),
        "tokens": ("I32", (3,)),
        "target_tokens": ("I32", (3,)),
        "log_probs": ("F32", (3,)),
        "advantages": ("F32", (3,)),
    }
    assert struct.unpack("<3i", tensors["tokens"].data) == (1, 2, 4)
    assert struct.unpack("<3q", tensors["cu_seqlens"].data) == (0, 2, 3)
    assert struct.unpack("<3f", tensors["advantages"].data) == (0.0, 1.0, -1.0)
    other = send(client, session, 1, STEP)
    assert (other.status_code, other.json()["code"]) == (422, "seq_reused")


def test_answer_comes_as_json_and_as_tensors(api: Any, client: httpx.Client) -> None:
    session = start(client)
    sent = send(client, session, 1, FORWARD).json()
    tensors = {"log_probs": floats(-1.5, float("nan"), -0.25), "cu_seqlens": integers(0, 2, 3)}
    raw = pack({"metrics": {"loss:sum": 0.5}}, tensors)
    answer_next(api, session, 1, lambda id_: Answered(id_, raw))
    for name in (sent["id"], "1"):
        read = client.get(f"/v1/sessions/{session['id']}/operations/{name}").json()
        assert read["status"] == "done"
        assert read["result"] == {"metrics": {"loss:sum": 0.5}, "log_probs": [[-1.5, None], [-0.25]]}
    accept = {"Accept": "application/vnd.safetensors"}
    assert client.get(f"/v1/sessions/{session['id']}/operations/1", headers=accept).content == raw
    listed = client.get(f"/v1/sessions/{session['id']}/operations").json()
    assert ([row["seq"] for row in listed["data"]], listed["next_seq"]) == ([1], 2)


def test_waiting_ends_when_the_answer_is_there(api: Any, client: httpx.Client) -> None:
    session = start(client)

    def work() -> None:
        sleep(0.3)
        answer_next(api, session, 1, lambda id_: Answered(id_, pack({"metrics": {"grad_norm": 1.0}}, {})))

    worker, began = Thread(target=work), monotonic()
    worker.start()
    done = send(client, session, 1, STEP, Prefer="wait=10")
    worker.join()
    assert (done.status_code, done.headers["Preference-Applied"]) == (200, "wait")
    assert done.json()["result"] == {"metrics": {"grad_norm": 1.0}}
    assert 0.2 < monotonic() - began < 5
    assert send(client, session, 2, STEP, Prefer="wait=1").status_code == 202


def test_several_at_once_are_logged_together_or_not_at_all(client: httpx.Client) -> None:
    session = start(client)
    url = f"/v1/sessions/{session['id']}/operations"
    both = client.post(url, json={"operations": [{"seq": 1, **FORWARD}, {"seq": 2, **STEP}]})
    assert both.status_code == 202, both.text
    assert [row["seq"] for row in both.json()["data"]] == [1, 2]
    wrong = client.post(url, json={"operations": [{"seq": 3, **STEP}, {"seq": 1, **STEP}]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "seq_reused")
    assert client.get(url).json()["next_seq"] == 3


def test_failed_operation_says_why(api: Any, client: httpx.Client) -> None:
    session = start(client)
    send(client, session, 1, FORWARD)
    error = {"code": "token_out_of_vocabulary", "detail": "token 99 is not in the vocabulary", "category": "user"}
    answer_next(api, session, 1, lambda id_: Answered(id_, error=error))
    read = client.get(f"/v1/sessions/{session['id']}/operations/1")
    assert (read.status_code, read.json()["status"]) == (200, "failed")
    assert {key: read.json()["error"][key] for key in error} == error
    accept = {"Accept": "application/vnd.safetensors"}
    as_tensors = client.get(f"/v1/sessions/{session['id']}/operations/1", headers=accept)
    assert as_tensors.status_code == 422
    assert {key: as_tensors.json()[key] for key in error} == error


def test_tensors_are_taken_as_they_are(api: Any, client: httpx.Client) -> None:
    session = start(client)
    head = {"kind": "forward", "seq": 1, "loss": "cross_entropy", "config": {}}
    tensors = {
        "tokens": integers(1, 2, 3),
        "cu_seqlens": integers(0, 3),
        "target_tokens": Tensor("I64", (3, 2), integers(1, 2, 3, 4, 5, 6).data),
        "weights": Tensor("F32", (3, 2), floats(1, 0, -0.1, 0, 1, 1).data),
    }
    url = f"/v1/sessions/{session['id']}/operations"
    kind = {"Content-Type": "application/vnd.safetensors", "Accept": "application/json"}
    sent = client.post(url, content=encode(tensors, {"head": json.dumps(head)}), headers=kind)
    assert sent.status_code == 202, sent.text
    read_head, read = unpack(logged(api, session, 1).request or b"")
    assert read_head == {"kind": "forward", "loss": "cross_entropy", "config": {}}
    assert {name: bytes(tensor.data) for name, tensor in read.items()} == {
        name: bytes(tensor.data) for name, tensor in tensors.items()
    }


TOKENS, CUTS = integers(1, 2, 3), integers(0, 3)
ROWS_HEAD = {"kind": "forward", "seq": 1, "loss": "cross_entropy"}


@pytest.mark.parametrize(
    ("head", "tensors", "pointer"),
    [
        (ROWS_HEAD, {"tokens": TOKENS, "cu_seqlens": CUTS}, "/target_tokens"),
        (ROWS_HEAD, {"tokens": TOKENS, "cu_seqlens": integers(0, 2), "target_tokens": TOKENS}, "/tokens"),
        (ROWS_HEAD, {"tokens": TOKENS, "cu_seqlens": integers(0, 3, 3), "target_tokens": TOKENS}, "/cu_seqlens"),
        (ROWS_HEAD, {"tokens": floats(1, 2, 3), "cu_seqlens": CUTS, "target_tokens": TOKENS}, "/tokens"),
        (ROWS_HEAD, {"tokens": TOKENS, "cu_seqlens": CUTS, "target_tokens": TOKENS, "wieghts": TOKENS}, "/wieghts"),
        (ROWS_HEAD, {"tokens": TOKENS, "cu_seqlens": CUTS, "target_tokens": TOKENS, "weights": floats(1)}, "/weights"),
        ({"kind": "optim_step", "seq": 1}, {"tokens": TOKENS}, "/tokens"),
        ({"kind": "optim_step", "seq": 0}, {}, "/seq"),
        ({"kind": "optim_stpe", "seq": 1}, {}, "/kind"),
    ],
)
def test_wrong_tensors_are_named(client: httpx.Client, head: Any, tensors: Any, pointer: str) -> None:
    session = start(client)
    url, kind = f"/v1/sessions/{session['id']}/operations", {"Content-Type": "application/vnd.safetensors"}
    answer = client.post(url, content=encode(tensors, {"head": json.dumps(head)}), headers=kind)
    assert answer.status_code == 422, answer.text
    assert pointer in [error["pointer"] for error in answer.json()["errors"]]
    assert client.get(url).json()["next_seq"] == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"kind": "forward_backward", "loss": "ppo"}, "`loss` and `rows`"),
        ({**FORWARD, "rows": [{"tokens": [1, 2], "target_tokens": [1]}]}, "one entry for each of the 2 tokens"),
        ({"kind": "train_step", "objective": {"preset": "gspo"}, "groups": []}, "at least 1"),
        (
            {
                "kind": "train_step",
                "objective": {"preset": "gspo"},
                "groups": [{"prompt_tokens": [1], "answers": [{"tokens": [2]}]}],
            },
            "`reward` or an `advantage`",
        ),
        ({"kind": "save_checkpoint", "name": "../x"}, "/name"),
        ({"kind": "sample"}, "`prompts` (tokens) or `texts`"),
        ({"kind": "optim_step", "optimizer": {"lr": 1}}, "learning_rate"),
        ({**EVAL, "rows": [{"answer": "1"}]}, "row 0 needs a `prompt`"),
        ({**EVAL, "rows": [{"prompt": "1"}]}, "row 0 has no column 'answer'"),
        ({**EVAL, "graders": [{"kind": "http", "url": "https://example.com"}]}, "the grader http works in jobs only"),
        ({**EVAL, "graders": EVAL["graders"] * 2}, "names of their own"),
        ({**EVAL, "graders": [{"kind": "regex", "pattern": "(a{9999}){9999}"}]}, '"/graders/0/pattern"'),
    ],
)
def test_wrong_bodies_are_refused(client: httpx.Client, body: Any, says: str) -> None:
    session = start(client)
    answer = send(client, session, 1, body)
    assert answer.status_code == 422, answer.text
    assert says in answer.text


def test_graders_of_an_eval_are_checked_as_a_jobs_are(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(client)
    wrong = [
        {"kind": "regex", "pattern": "("},
        {"kind": "exact", "reference": "{answer}", "extract": "[a"},
        {"kind": "json_schema", "schema": {"type": "nope"}},
    ]
    asked = {**EVAL, "graders": wrong}
    refused = send(client, session, 1, asked)
    assert refused.status_code == 422, refused.text
    expected = ["/graders/0/pattern", "/graders/1/extract", "/graders/2/schema"]
    assert [error["pointer"] for error in refused.json()["errors"]] == expected
    assert "not a regular expression" in refused.json()["detail"]

    huge = {**EVAL, "graders": [{"kind": "regex", "pattern": "a{200000}"}]}
    monkeypatch.setattr(texts, "MEMORY_BYTES", 64 * 2**20)
    url, fine = f"/v1/sessions/{session['id']}/operations", {**EVAL, "graders": [{"kind": "regex", "pattern": "a"}]}
    both = [{"seq": seq, **body} for seq, body in ((1, fine), (2, huge))]
    refused = client.post(url, json={"operations": both})
    assert refused.status_code == 422, refused.text
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/operations/1/graders/0/pattern"]
    assert client.get(url).json()["next_seq"] == 1
    assert client.post(url, json=both[0]).status_code == 202


def test_sessions_of_others_are_not_there(api: Any, client: httpx.Client, other: httpx.Client) -> None:
    session = start(client)
    operation = send(client, session, 1, STEP).json()
    for path in ("", "/operations", "/operations/1", f"/operations/{operation['id']}"):
        assert other.get(f"/v1/sessions/{session['id']}{path}").status_code == 404
    assert send(other, session, 2, STEP).status_code == 404
    mine = start(other)
    assert other.get(f"/v1/sessions/{mine['id']}/operations/{operation['id']}").status_code == 404


def test_train_step_is_logged_as_flat_tensors(api: Any, client: httpx.Client) -> None:
    session = start(client)
    groups = [
        {
            "prompt_tokens": [1, 2],
            "answers": [
                {"tokens": [3], "log_probs": [-1.0], "reward": 1.0},
                {"tokens": [4, 5], "log_probs": [-1.0, -2.0], "reward": 0.0, "mask": [1, 0], "truncated": True},
            ],
        }
    ]
    body = {"kind": "train_step", "objective": {"preset": "gspo"}, "groups": groups, "minibatches": 2}
    assert send(client, session, 1, body).status_code == 202
    head, tensors = unpack(logged(api, session, 1).request or b"")
    assert (head["minibatches"], head["epochs"], head["optimizer"]["learning_rate"]) == (2, 1, 1e-4)
    assert head["objective"]["ratio"]["kind"] == "sequence"
    assert struct.unpack("<4i", tensors["prompt_tokens"].data) == (1, 2, 1, 2)
    assert struct.unpack("<3q", tensors["completion_cu_seqlens"].data) == (0, 1, 3)
    assert struct.unpack("<3f", tensors["response_mask"].data) == (1, 1, 0)
    assert struct.unpack("<2f", tensors["truncated"].data) == (0, 1)
    assert struct.unpack("<2d", tensors["rewards"].data) == (1, 0)
    assert struct.unpack("<2q", tensors["group_ids"].data) == (0, 0)


def test_idle_session_is_woken_by_an_operation(api: Any, client: httpx.Client) -> None:
    session = start(client)
    lease, _ = api.claim(session["id"])
    assert leases.rest(api.store, lease, 0) == "paused"
    assert client.get(f"/v1/jobs/{session['id']}").json()["status_reason"] == "idle"
    send(client, session, 1, STEP)
    job = client.get(f"/v1/jobs/{session['id']}").json()
    assert (job["status"], job["status_reason"]) == ("queued", "operation")
    lease, _ = api.claim(session["id"])
    assert leases.rest(api.store, lease, 0) == "queued"  # operation 1 waits


def test_the_end_fails_what_waits(api: Any, client: httpx.Client) -> None:
    session = start(client)
    send(client, session, 1, STEP)
    client.post(f"/v1/jobs/{session['id']}/cancel")
    read = client.get(f"/v1/sessions/{session['id']}/operations/1").json()
    assert (read["status"], read["error"]["code"]) == ("failed", "session_over")


def test_only_models_with_the_same_frozen_weights_share(client: httpx.Client) -> None:
    from service.spec.model import ModelSpec

    def key(**model: Any) -> str | None:
        return base_key(ModelSpec.model_validate({**LORA, "tiny": None, **model}))

    assert key() == key(adapter={"kind": "lora", "rank": 8})
    assert len({key(), key(tiny={"seed": 1}), key(dtype="bfloat16")}) == 3
    assert key(adapter={"kind": "full"}) is None
