"""What samplers do for callers with texts: chats in the model's template, names of tokens, parts while an answer grows."""

from pathlib import Path
from typing import Any

import pytest
from policy_chats import ASKED, USER, chat_model, tokenizer
from sqlalchemy import func, select

from service.jobs import lifecycle
from service.sessions.codec import pack
from service.sessions.sessions import sampler_of
from service.store import operations
from service.store.operations import Asked
from service.store.tables import Usage

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SAMPLING = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": [], "stop_ids": [], "ends": False}
HEAD: dict[str, Any] = {
    "kind": "sample",
    "checkpoint": None,
    "num_samples": 1,
    "seed": 1,
    "sampling": SAMPLING,
    "prompt_log_probs": False,
    "top_prompt_log_probs": 0,
    "top_log_probs": 0,
}


@pytest.fixture
def chatty(rig: Any, tmp_path: Path) -> str:
    """A sampler of a model with a chat template."""
    model = {"source": chat_model(tmp_path / "chatty")}
    return sampler_of(rig.store, rig.doorbell, rig.settings, "default", model).id


def ask(rig: Any, sampler: str, lane: str, **head: Any) -> None:
    rows = [Asked("sample", 1, pack({**HEAD, **head}, {}), 1, lane)]
    lifecycle.append_operations(rig.store, rig.doorbell, rig.settings, "default", sampler, rows)


def test_a_chat_is_what_the_template_writes(rig: Any, chatty: str) -> None:
    ask(rig, chatty, "a", chats=[{"messages": [USER], "tools": None, "chat_template_kwargs": None}])
    ask(rig, chatty, "b", chats=[{"messages": [USER], "tools": [{"type": "function"}], "chat_template_kwargs": None}])
    ask(rig, chatty, "c", chats=[{"messages": [USER], "tools": None, "chat_template_kwargs": {"enable_thinking": False}}])
    rig.work()
    [prompt] = rig.answer(chatty, 1, "a")["prompt_tokens"]
    assert prompt == tokenizer()(ASKED)["input_ids"]
    for lane, says in (("b", "'tools'"), ("c", "'enable_thinking'")):
        error = rig.error(chatty, 1, lane)
        assert (error["code"], error["category"], error["pointer"]) == ("chat_refused", "user", "/messages")
        assert says in error["detail"]


def test_without_a_limit_an_answer_goes_on_to_the_end_of_the_context(rig: Any, chatty: str) -> None:
    ask(rig, chatty, "a", texts=["abcd"], sampling={**SAMPLING, "max_tokens": None})
    ask(rig, chatty, "b", texts=["x" * 128], sampling={**SAMPLING, "max_tokens": None})
    rig.work()
    answer = rig.answer(chatty, 1, "a")
    assert (len(answer["tokens"][0]), answer["finish_reasons"]) == (128 - 4, ["length"])
    assert rig.error(chatty, 1, "b")["code"] == "sequence_too_long"


def test_pieces_name_every_token_of_the_answer(rig: Any, chatty: str) -> None:
    ask(rig, chatty, "a", texts=["ab"], top_log_probs=3, pieces=True)
    ask(rig, chatty, "b", texts=["ab"])
    rig.work()
    answer = rig.answer(chatty, 1, "a")
    named = {int(token) for token in answer["pieces"]}
    assert named == {*answer["prompt_tokens"][0], *answer["tokens"][0], *(t for row in answer["top_ids"][0] for t in row)}
    assert [answer["pieces"][str(token)] for token in answer["prompt_tokens"][0]] == ["a", "b"]
    assert answer["prompt_texts"] == ["ab"] and answer["text_ends"][0][-1] <= len(answer["texts"][0])
    assert len(answer["text_ends"][0]) == len(answer["tokens"][0])
    assert "pieces" not in rig.answer(chatty, 1, "b")


def test_parts_make_the_answer(rig: Any, chatty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.sessions.host.PART_S", 0.0)
    told: list[tuple[str, list[Any]]] = []
    monkeypatch.setattr(rig.doorbell, "tell", lambda lane, parts: told.append((lane, parts)))
    sampling = {**SAMPLING, "max_tokens": 40, "temperature": 1.0}
    ask(rig, chatty, "a", texts=["ab"], num_samples=2, sampling=sampling, parts=True)
    ask(rig, chatty, "b", texts=["ab"], sampling=sampling)
    rig.work()
    texts = rig.answer(chatty, 1, "a")["texts"]
    grown = ["", ""]
    for lane, parts in told:
        assert lane == "a", "only to who asks for parts"
        for place, start, text in parts:
            assert start == len(grown[place])
            grown[place] += text
    assert len(told) > 5
    for grows, whole in zip(grown, texts, strict=True):
        assert grows and whole.startswith(grows)


def test_no_parts_are_told_where_they_do_not_show_how_a_stop_begins(
    rig: Any, chatty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `a<pad>bc` a part shows `abc`, and whoever holds back what may be the stop's beginning lets `b` go."""
    monkeypatch.setattr("workers.sessions.host.PART_S", 0.0)
    told: set[str] = set()
    monkeypatch.setattr(rig.doorbell, "tell", lambda lane, parts: told.add(lane))
    sampling = {**SAMPLING, "max_tokens": 40, "temperature": 1.0}
    ask(rig, chatty, "hidden", texts=["ab"], sampling={**sampling, "stop": ["a<pad>bc"]}, parts=True)
    ask(rig, chatty, "shown", texts=["ab"], sampling={**sampling, "stop": ["a<|tool|>bc"]}, parts=True)
    rig.work()
    assert told == {"shown"} and rig.answer(chatty, 1, "hidden")["texts"] == rig.answer(chatty, 1, "shown")["texts"]


def test_withdrawn_operations_leave_the_engine(rig: Any, chatty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller went away while it was sampled: it is not sampled to its end, and others are."""
    steps, withdrawn = 0, False

    def tell(lane: str, parts: Any) -> None:
        nonlocal steps, withdrawn
        steps += lane == "a"
        if not withdrawn:
            withdrawn = True
            lifecycle.withdraw_operation(rig.store, rig.operation(chatty, 1, "a").id)

    monkeypatch.setattr("workers.sessions.host.PART_S", 0.0)
    monkeypatch.setattr(rig.doorbell, "tell", tell)
    monkeypatch.setattr("workers.sessions.host.LONG_SLICE_S", 0.001)
    sampling = {**SAMPLING, "max_tokens": 120, "temperature": 1.0}
    ask(rig, chatty, "a", texts=["ab"], sampling=sampling, parts=True)
    ask(rig, chatty, "b", texts=["ab"], sampling=sampling)
    rig.work()
    with rig.store.begin(readonly=True) as session:
        assert operations.at(session, chatty, "a", 1) is None
    assert 0 < steps < 60
    with rig.store.begin(readonly=True) as session:
        metered = session.scalar(select(func.sum(Usage.sampled_tokens)).where(Usage.job_id == chatty))
    assert 120 < metered < 240  # what was drawn for the withdrawn one counts
    assert len(rig.answer(chatty, 1, "b")["tokens"][0]) == 120
