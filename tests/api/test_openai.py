"""OpenAI's routes over HTTP. A stand-in for the worker answers; what a model really says is in tests/clients."""

import json
from array import array
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from chaos.standin import said, sampler
from service.edge.faces import NATIVE
from service.jobs import lifecycle
from service.losses.numbers import tensor
from service.openai.answers import Form
from service.openai.requests import CompletionRequest
from service.openai.sampled import sampled
from service.sessions.codec import pack
from service.store.operations import Answered
from service.store.tables import Operation

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def heads(api: Any) -> Iterator[list[dict[str, Any]]]:
    """A sampler that answers; the heads of the operations that it saw."""
    with sampler(api.settings) as seen:
        yield seen


def complete(client: httpx.Client, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "1+1=", **body}, headers=headers)


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **body})


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def waiting(api: Any) -> list[Operation]:
    with api.store.begin(readonly=True) as session:
        return list(session.scalars(select(Operation).where(Operation.lane != "", Operation.status == "waiting")))


def until(holds: Any, timeout_s: float = 10) -> None:
    deadline = monotonic() + timeout_s
    while not holds():
        assert monotonic() < deadline
        sleep(0.02)


def test_parameters_become_an_operation(client: httpx.Client, heads: list[Any]) -> None:
    answer = complete(client, n=2, max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop="!", seed=-1, logprobs=2)
    assert answer.status_code == 200, answer.text
    [head] = heads
    sampling = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["!"], "stop_ids": [], "ends": True}
    assert head["sampling"] == sampling
    assert (head["texts"], head["num_samples"], head["seed"], head["checkpoint"]) == (["1+1="], 2, 2**63 - 1, None)
    assert (head["pieces"], head["top_log_probs"], head["parts"]) == (True, 2, False)
    assert head["lane"] == f"openai/{answer.headers['x-request-id']}"
    body = answer.json()
    assert [choice["text"] for choice in body["choices"]] == ["ok", "ok"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["o", "k"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"?": -0.5, "o": -0.5}, {"?": -0.5, "k": -0.5}],
        "text_offset": [0, 1],
    }
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}


def test_a_chat_goes_to_the_template(client: httpx.Client, heads: list[Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    kwargs = {"enable_thinking": False}
    assert chat(client, tools=tools, chat_template_kwargs=kwargs, stop=["k"]).json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "o",
        "refusal": None,
    }
    chat(client, tools=tools, tool_choice="none")
    assert heads[0]["chats"] == [{"messages": ASK, "tools": tools, "chat_template_kwargs": kwargs}]
    assert heads[0]["sampling"]["max_tokens"] is None
    assert heads[1]["chats"][0]["tools"] is None


def test_one_sampler_serves_a_project_s_base(api: Any, client: httpx.Client, other: httpx.Client, heads: list[Any]) -> None:
    for caller in (client, client, other):
        assert complete(caller).status_code == 200
    mine, theirs = (caller.get("/v1/jobs", params={"kind": "sampler"}).json()["data"] for caller in (client, other))
    assert len(mine) == len(theirs) == 1
    assert mine[0]["id"] != theirs[0]["id"]


def test_stream_without_parts_is_the_stored_answer(client: httpx.Client, heads: list[Any]) -> None:
    answer = complete(client, stream=True, n=2, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = chunks(answer)
    texts = ["".join(c["text"] for chunk in found for c in chunk["choices"] if c["index"] == index) for index in (0, 1)]
    assert texts == ["ok", "ok"]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] == 5
    assert [c["finish_reason"] for chunk in found for c in chunk["choices"] if c["finish_reason"]] == ["length"] * 2


def test_parts_are_sent_as_they_come_and_none_twice(api: Any, client: httpx.Client) -> None:
    """A part that was missed is made up for by the stored answer, and nothing of a stop text is sent."""

    def grows(head: dict[str, Any]) -> Answered:
        api.doorbell.tell(head["lane"], [(0, 0, "hello ")])
        sleep(0.2)
        api.doorbell.tell(head["lane"], [(0, 6, "wor")])
        sleep(0.2)
        api.doorbell.tell(head["lane"], [(0, 12, "missed one before")])
        sleep(0.2)
        return said(head, "hello world, STOP and more", "stop")

    with sampler(api.settings, grows):
        answer = complete(client, stream=True, stop=["world, S", " STOP"])
    texts = [chunk["choices"][0]["text"] for chunk in chunks(answer)]
    assert "".join(texts) == "hello "
    assert texts[0] == "hello", "the space may begin a stop"
    with sampler(api.settings, grows):
        answer = complete(client, stream=True)
    texts = [chunk["choices"][0]["text"] for chunk in chunks(answer)]
    assert texts == ["hello ", "wor", "ld, STOP and more", ""]


def test_failed_operation_is_an_error_of_openai_s_shape(api: Any, client: httpx.Client) -> None:
    error = {"code": "sequence_too_long", "detail": "too long", "category": "user", "pointer": "/prompts", "hint": "shorten"}
    with sampler(api.settings, lambda head: Answered(head["id"], error=error)):
        for stream in (False, True):
            answer = complete(client, stream=stream)
            assert answer.status_code == 400
            assert answer.json() == {
                "error": {
                    "message": "too long (shorten)",
                    "type": "invalid_request_error",
                    "param": "prompt",
                    "code": "context_length_exceeded",
                }
            }
    lost = {"code": "operation_lost", "detail": "the worker died", "category": "server"}
    with sampler(api.settings, lambda head: Answered(head["id"], error=lost)):
        answer = complete(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "operation_lost")


def test_error_within_a_stream_is_an_event(api: Any, client: httpx.Client) -> None:
    def breaks(head: dict[str, Any]) -> Answered:
        api.doorbell.tell(head["lane"], [(0, 0, "hello")])
        sleep(0.3)
        return Answered(head["id"], error={"code": "operation_lost", "detail": "the worker died", "category": "server"})

    with sampler(api.settings, breaks):
        found = chunks(complete(client, stream=True))
    assert found[0]["choices"][0]["text"] == "hello"
    assert found[-1]["error"]["code"] == "operation_lost"


def test_who_leaves_is_not_worked_for(api: Any, client: httpx.Client) -> None:
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"model": "tiny", "prompt": "1", "stream": stream}, timeout=0.5)
        until(lambda: not waiting(api))
    assert not api.app.state.context.open_answers._open


def test_a_repeat_waits_for_the_first_one_s_operation(api: Any, client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "one"}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"model": "tiny", "prompt": "1"}, timeout=0.5, headers=headers)
    [operation] = waiting(api)
    with sampler(api.settings) as seen:
        first, again = (complete(client, headers, prompt="1") for _ in range(2))
    assert len(seen) == 1
    assert first.json() == again.json()
    assert first.json()["id"] == f"cmpl-{operation.id}"
    other = complete(client, headers, prompt="2")
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_too_much_that_waits_is_a_429(api: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.app.state.context.open_answers, "_per_key", 0)
    full = complete(client)
    assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "too_many_streams", "5")
    assert not waiting(api)
    monkeypatch.undo()
    settings = api.settings.model_copy(update={"max_waiting_operations": 1})
    checks = lifecycle._has_room
    monkeypatch.setattr(lifecycle, "_has_room", lambda _, *rest: checks(settings, *rest))
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"model": "tiny", "prompt": "1"}, timeout=0.5, headers={"Idempotency-Key": "a"})
    full = complete(client)
    assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "session_full", "1")
    with sampler(api.settings):
        until(lambda: not waiting(api))


def test_a_paused_sampler_says_so(api: Any, client: httpx.Client, heads: list[Any]) -> None:
    assert complete(client).status_code == 200
    [job] = client.get("/v1/jobs", params={"kind": "sampler"}).json()["data"]
    client.post(f"/v1/jobs/{job['id']}/pause")
    answer = complete(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "sampler_paused")
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert complete(client).status_code == 200  # by another one


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": ""}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"n": 0}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": True, "stream": True}, "echo"),
        ({"maxtokens": 3}, "maxtokens"),
    ],
)
def test_what_is_not_offered_is_refused(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = complete(client, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and error["type"] == "invalid_request_error"
    assert error["param"] == param, error


@pytest.mark.parametrize(
    "model", ["gpt-4o", "ckpt_01k0000000000000000000000", "job_01k0000000000000000000000", "../etc", "ckpt_", "/m" * 150]
)
def test_unknown_models_are_a_404(client: httpx.Client, model: str) -> None:
    answer = chat(client, model=model)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), answer.text
    assert answer.headers["cache-control"] == NATIVE.headers["Cache-Control"]


def test_log_probs_are_of_the_text_s_own_tokens_though_characters_have_several() -> None:
    """One token a byte, and an end token that no text shows: each told text is whole, and no token of a stop is."""

    def said(text: str) -> bytes:
        row = array("i", [*text.encode(), 0])
        ends = [place + (n + 1 == len(sign.encode())) for place, sign in enumerate(text) for n in range(len(sign.encode()))]
        pieces = {str(byte): chr(byte) if byte < 128 else "\ufffd" for byte in row} | {"0": "</s>", "63": "?"}
        head = {"texts": [text], "finish_reasons": ["stop"], "pieces": pieces, "text_ends": [[*ends, len(text)]]}
        head |= {"prompt_texts": ["<s>?"], "prompt_ends": [[3, 4]]}
        cuts, count = tensor(array("q", [0, len(row)])), len(row)
        asked = {"prompt_tokens": tensor(array("i", [0, 63])), "prompt_cu_seqlens": tensor(array("q", [0, 2]))}
        asked["prompt_log_probs"] = tensor(array("f", [float("nan"), -1.0]))
        told = {"tokens": tensor(row), "cu_seqlens": cuts, "log_probs": tensor(array("f", [-0.5] * count))}
        return pack(head, {**asked, **told})

    request = CompletionRequest(model="tiny", prompt="?", logprobs=0)
    for text, stops, shown in (
        ("a🙂b.STOP", ["STOP"], "a🙂b."),
        ("🙂é", [], "🙂é"),
        ("🙂STOP", ["S", "TO"], "🙂"),
        ("Sa", ["S"], ""),
    ):
        answer = sampled(said(text), stops)
        [choice] = answer.choices
        assert choice.text == shown
        assert [token.text for token in choice.tokens] == [chr(b) if b < 128 else "\ufffd" for b in shown.encode()]
        parts = [chunk["choices"][0] for chunk in Form(request, "op_1", 0, "tiny").ended(0, choice, 0)]
        assert [part["text"] for part in parts if part["text"]] == list(shown)
        offsets = [offset for part in parts if part["logprobs"] for offset in part["logprobs"]["text_offset"]]
        assert offsets == [place for place, sign in enumerate(shown) for _ in sign.encode()]
    for sent, before, offsets in (("?", "?", [0, 0, 1, 1]), ([0, 63], "<s>?", [0, 3, 4, 4])):
        [choice] = sampled(said("é"), [], echo=[sent]).choices
        assert choice.prompt == before and [token.start for token in choice.tokens] == offsets


def test_log_probs_of_a_worker_that_does_not_say_where_tokens_end() -> None:
    """As workers did until 29 November 2026, whose answers are kept for hours."""
    head = {"texts": ["ab."], "finish_reasons": ["stop"], "pieces": {"1": "ab", "2": ".", "3": "?"}}
    told = {"tokens": tensor(array("i", [1, 2])), "cu_seqlens": tensor(array("q", [0, 2]))}
    asked = {"prompt_tokens": tensor(array("i", [3])), "prompt_cu_seqlens": tensor(array("q", [0, 1]))}
    logs = {"log_probs": tensor(array("f", [-0.5, -0.25])), "prompt_log_probs": tensor(array("f", [float("nan")]))}
    [choice] = sampled(pack(head, {**asked, **told, **logs}), [], echo=["?"]).choices
    assert [(token.text, token.start, token.end) for token in choice.tokens] == [("?", 0, 1), ("ab", 1, 3), (".", 3, 4)]
