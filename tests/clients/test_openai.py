"""OpenAI's own Python package against the service, with a real worker behind it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI
from policy_chats import ASKED, tokenizer

from openai_stack import Stack, openai_stack

ASK: list[Any] = [{"role": "user", "content": "hi"}]
LEARNT = "aye, captain"


@pytest.fixture(scope="module")
def stack(whole: Any) -> Iterator[Stack]:
    with openai_stack(whole) as stack:
        yield stack


@pytest.fixture(scope="module")
def trained(stack: Stack) -> SimpleNamespace:
    """A session whose adapter has learnt one answer, and its checkpoint."""
    spec = {"model": {"source": "sailor", "adapter": {"kind": "lora", "rank": 8}}}
    session = stack.http.post("/v1/sessions", json=spec).json()["id"]
    tokens = tokenizer()(f"{ASKED}{LEARNT}<|im_end|>", add_special_tokens=False)["input_ids"]
    begins = len(tokenizer()(ASKED, add_special_tokens=False)["input_ids"]) - 1
    weights = [float(place >= begins) for place in range(len(tokens) - 1)]
    row = {"tokens": tokens[:-1], "target_tokens": tokens[1:], "weights": weights}
    step = {"kind": "optim_step", "optimizer": {"learning_rate": 0.02}}
    steps = [
        {"seq": seq, **({"kind": "forward_backward", "loss": "cross_entropy", "rows": [row]} if seq % 2 else step)}
        for seq in range(1, 161)
    ]
    sent = stack.http.post(f"/v1/sessions/{session}/operations", json={"operations": steps})
    assert sent.status_code == 202, sent.text
    saved = stack.do(session, 161, kind="save_checkpoint", name="aye", purpose="sampler")
    return SimpleNamespace(session=session, checkpoint=saved["checkpoint_id"])


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return stack.client()


def test_a_checkpoint_answers_with_its_adapter_and_its_base_without(client: OpenAI, trained: SimpleNamespace) -> None:
    mine = client.chat.completions.create(model=trained.checkpoint, messages=ASK, temperature=0)
    base = client.chat.completions.create(model="sailor", messages=ASK, temperature=0, max_tokens=16)
    assert mine.choices[0].message.content == LEARNT
    assert mine.choices[0].finish_reason == "stop"
    assert mine.choices[0].message.role == "assistant"
    assert mine.model == trained.checkpoint and base.model == "sailor"
    assert base.choices[0].message.content != LEARNT
    assert mine.usage is not None
    asked, answered = len(tokenizer()(ASKED)["input_ids"]), len(LEARNT) + 1  # one token a byte, and the end of the turn
    assert (mine.usage.prompt_tokens, mine.usage.completion_tokens) == (asked, answered)
    assert mine.usage.total_tokens == asked + answered


def test_a_session_is_its_newest_checkpoint(client: OpenAI, trained: SimpleNamespace) -> None:
    answer = client.chat.completions.create(model=trained.session, messages=ASK, temperature=0)
    assert (answer.model, answer.choices[0].message.content) == (trained.checkpoint, LEARNT)


def test_an_alias_answers_from_what_was_promoted_last(client: OpenAI, stack: Stack, trained: SimpleNamespace) -> None:
    spec = {"model": {"source": "sailor", "adapter": {"kind": "lora", "rank": 8}}}
    session = stack.http.post("/v1/sessions", json=spec).json()["id"]
    untrained = stack.do(session, 1, kind="save_checkpoint", name="nothing", purpose="sampler")["checkpoint_id"]
    alias = "sailor@production"
    for promoted, learnt in ((untrained, False), (trained.checkpoint, True), (None, False)):
        asked = ("PUT", "", {"checkpoint": promoted}) if promoted else ("POST", "/rollback", {})
        moved = stack.http.request(asked[0], f"/v1/aliases/{alias}{asked[1]}", json=asked[2])
        assert moved.is_success, moved.text
        answer = client.chat.completions.create(model=alias, messages=ASK, temperature=0, max_tokens=16)
        assert answer.model == (promoted or untrained) == client.models.retrieve(alias).model_dump()["root"]
        assert (answer.choices[0].message.content == LEARNT) is learnt
    assert alias in {model.id for model in client.models.list()}
    chunks = list(client.completions.create(model=alias, prompt="a", max_tokens=2, stream=True))
    assert {chunk.model for chunk in chunks} == {untrained}


def test_models_are_listed_and_read(client: OpenAI, trained: SimpleNamespace) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", "sailor", trained.checkpoint} <= set(listed)
    assert listed[trained.checkpoint].owned_by == "default" and listed[trained.checkpoint].created > 1_700_000_000
    for name in ("tiny", "sailor", trained.checkpoint):
        assert client.models.retrieve(name) == listed[name]
    assert client.models.retrieve(trained.session).id == trained.checkpoint
    with pytest.raises(openai.NotFoundError) as absent:
        client.models.retrieve("ckpt_01k0000000000000000000000")
    assert absent.value.code == "model_not_found"


def test_stream_grows_and_is_the_whole_answer(client: OpenAI, trained: SimpleNamespace) -> None:
    chunks = list(
        client.chat.completions.create(
            model=trained.checkpoint, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == LEARNT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(LEARNT) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_comes_while_the_answers_grow(client: OpenAI) -> None:
    """Texts of several answers come in turn, in many parts, and make what the same request gets as a whole."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "1+1=", "max_tokens": 100, "n": 8, "seed": 3}
    texts, parts = [""] * 8, list[int]()
    for chunk in client.completions.create(**ask, stream=True):
        [choice] = chunk.choices
        if choice.text:
            texts[choice.index] += choice.text
            parts.append(choice.index)
    assert texts == [choice.text for choice in client.completions.create(**ask).choices]
    turns = [index for place, index in enumerate(parts) if not place or parts[place - 1] != index]
    assert len(turns) > 8, "each answer was sent at once"


def test_n_stop_and_seed(client: OpenAI, trained: SimpleNamespace) -> None:
    several = [
        client.completions.create(model="sailor", prompt=["ab", "cd"], n=3, max_tokens=8, seed=seed) for seed in (7, 7, 8)
    ]
    texts = [[choice.text for choice in one.choices] for one in several]
    assert len(texts[0]) == 6 and len(set(texts[0])) > 1
    assert texts[0] == texts[1] != texts[2]
    assert [choice.index for choice in several[0].choices] == list(range(6))
    cut = client.chat.completions.create(model=trained.checkpoint, messages=ASK, temperature=0, stop=[", cap", "zzz"])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("aye", "stop")
    parts = client.chat.completions.create(model=trained.checkpoint, messages=ASK, temperature=0, stop=", cap", stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "aye"
    short = client.chat.completions.create(model=trained.checkpoint, messages=ASK, temperature=0, max_completion_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("aye", "length")


def test_logprobs_of_a_chat(client: OpenAI, trained: SimpleNamespace) -> None:
    answer = client.chat.completions.create(
        model=trained.checkpoint, messages=ASK, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == LEARNT
    for token in logprobs.content:
        assert token.bytes == list(token.token.encode())
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    streamed = client.chat.completions.create(
        model=trained.checkpoint, messages=ASK, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    content = [token for chunk in streamed if (found := chunk.choices[0].logprobs) for token in found.content or []]
    assert [token.logprob for token in content] == [token.logprob for token in logprobs.content]


def test_echo_scores_a_prompt(client: OpenAI) -> None:
    """What evaluation harnesses ask for: the log-probs of a given text, as tokens, without sampling."""
    tokens = [72, 73, 74, 75]
    scored = client.completions.create(model="sailor", prompt=tokens, echo=True, logprobs=1, max_tokens=0)
    more = client.completions.create(model="sailor", prompt=[tokens], echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.tokens is not None
    assert len(logprobs.tokens) == 4 and logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert scored.choices[0].text == "".join(logprobs.tokens)
    longer = more.choices[0].logprobs
    assert longer is not None and longer.token_logprobs is not None and len(longer.token_logprobs) == 5
    assert longer.token_logprobs[1:4] == logprobs.token_logprobs[1:]
    assert more.choices[0].text.startswith(scored.choices[0].text)


def test_what_is_wrong_comes_in_openai_s_shape(client: OpenAI, stack: Stack, trained: SimpleNamespace) -> None:
    def refused(kind: type[openai.APIStatusError], **request: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as error:
            client.chat.completions.create(**{"model": trained.checkpoint, "messages": ASK, **request})
        assert set(error.value.response.json()) == {"error"}
        assert set(error.value.response.json()["error"]) == {"message", "type", "param", "code"}
        return error.value

    bad = openai.BadRequestError
    assert refused(bad, response_format={"type": "json_object"}).param == "response_format.type"
    assert refused(bad, presence_penalty=0.5).param == "presence_penalty"
    assert refused(bad, temperature=-1).param == "temperature"
    assert refused(bad, reasoning_effort="low").param == "reasoning_effort"
    assert "did you mean" in refused(bad, extra_body={"temprature": 1}).message
    assert refused(bad, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert refused(bad, tools=[{"type": "function", "function": {"name": "f"}}]).code == "chat_refused"
    long = refused(bad, messages=[{"role": "user", "content": "x" * 300}])
    assert (long.code, long.param) == ("context_length_exceeded", "messages")
    assert refused(openai.NotFoundError, model="gpt-4o").code == "model_not_found"
    with pytest.raises(bad) as no_template:
        client.chat.completions.create(model="tiny", messages=ASK)
    assert no_template.value.code == "no_chat_template"
    with pytest.raises(openai.AuthenticationError):
        stack.client("tml-of-nobody-at-all-0000000000000000").models.list()
    with pytest.raises(bad) as streamed:
        client.chat.completions.create(model="tiny", messages=ASK, stream=True)
    assert streamed.value.code == "no_chat_template"


def test_another_project_s_checkpoint_is_not_there(stack: Stack, trained: SimpleNamespace) -> None:
    other = stack.http.post("/v1/keys", json={"name": "x", "project": "other"}).json()["key"]
    for model in (trained.checkpoint, trained.session):
        with pytest.raises(openai.NotFoundError) as absent:
            stack.client(other).chat.completions.create(model=model, messages=ASK)
        assert absent.value.code == "model_not_found"
    assert trained.checkpoint not in [model.id for model in stack.client(other).models.list()]


def test_harmless_parameters_are_ignored(client: OpenAI, trained: SimpleNamespace) -> None:
    answer = client.chat.completions.create(
        model=trained.checkpoint,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        temperature=0,
        user="me",
        metadata={"a": "b"},
        store=False,
        n=1,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
    )
    assert answer.choices[0].message.content == LEARNT


def test_a_repeat_with_the_same_idempotency_key_is_not_sampled_again(client: OpenAI) -> None:
    def ask(prompt: str, key: str) -> Any:
        headers = {"Idempotency-Key": key}
        return client.completions.create(model="sailor", prompt=prompt, max_tokens=8, extra_headers=headers)

    first, again, other = ask("ab", "one"), ask("ab", "one"), ask("ab", "two")
    assert first == again
    assert other.id != first.id and other.choices[0].text != first.choices[0].text
    with pytest.raises(openai.APIStatusError) as reused:
        ask("cd", "one")
    assert reused.value.code == "idempotency_key_reused"


def test_a_checkpoint_of_all_weights_is_a_base_of_its_own(client: OpenAI, stack: Stack) -> None:
    session = stack.http.post("/v1/sessions", json={"model": {"source": "sailor", "adapter": {"kind": "full"}}}).json()["id"]
    rows = [{"tokens": [65] * 8, "target_tokens": [66] * 8}]
    for seq in range(1, 9):
        body = {"kind": "forward_backward", "loss": "cross_entropy", "rows": rows}
        stack.do(session, seq, **(body if seq % 2 else {"kind": "optim_step", "optimizer": {"learning_rate": 0.1}}))
    saved = stack.do(session, 9, kind="save_checkpoint", name="b", purpose="sampler")["checkpoint_id"]
    ask: dict[str, Any] = {"prompt": "AAAA", "max_tokens": 1, "temperature": 0}
    token = tokenizer().decode([66])
    assert client.completions.create(model=saved, **ask).choices[0].text == token
    assert client.completions.create(model="sailor", **ask).choices[0].text != token
