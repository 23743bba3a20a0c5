"""What a supervised job learns of a row: an answer behind a prompt, or the assistant's turns of a chat."""

from typing import Any

import pytest
import torch
from policy_chats import ANSWER, ASKED, PLAIN, THINKS, USER, text_of, tokenizer

from service.jobs.data import Data, InlineRows
from service.spec.data import DataSpec
from workers.loops.supervised import Example, _mask, examples_of
from workers.policy.score.layout import Sequence
from workers.policy.text import Text

AGAIN, LAST = {"role": "user", "content": "again"}, {"role": "assistant", "content": "ho"}
TALK = [USER, ANSWER, AGAIN, LAST]


def data(**spec: Any) -> Data:
    rows = spec.pop("rows", [{"messages": TALK}])
    read = DataSpec.model_validate({"train": {"source": "inline", "rows": rows}, "chat": "messages", **spec})
    return Data.of(read, InlineRows(rows), None)


def learnt(text: Text, example: Example) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    runs, was = list[list[int]](), False
    for token, is_learnt in zip(example.sequence.completion, example.learnt, strict=True):
        if is_learnt and not was:
            runs.append([])
        if is_learnt:
            runs[-1].append(token)
        was = is_learnt
    return [text.tokenizer.decode(run) for run in runs]


@pytest.fixture
def plain(load) -> Text:
    return text_of(load, tokenizer(PLAIN))


def test_the_last_turn_of_a_chat_is_learnt_unless_all_are_asked_for(plain: Text) -> None:
    (example,) = examples_of(plain, data(), {"messages": TALK}, 0)
    assert learnt(plain, example) == ["ho<|im_end|>"] and all(example.learnt)
    assert example.sequence.prompt == plain.encode(TALK[:3])
    (example,) = examples_of(plain, data(learn="all"), {"messages": TALK}, 0)
    assert learnt(plain, example) == ["yo ho<|im_end|>", "ho<|im_end|>"]
    assert plain.tokenizer.decode(example.sequence.prompt) == ASKED
    whole = [*example.sequence.prompt, *example.sequence.completion]
    assert whole == plain.tokenizer(plain.chat.turn(TALK).prompt + "ho<|im_end|>")["input_ids"]


def test_turns_that_the_template_writes_anew_have_sequences_of_their_own(load) -> None:
    """Each as it is sampled: with the think block that only a last turn has."""
    text = text_of(load, tokenizer(THINKS))
    first, second = examples_of(text, data(learn="all"), {"messages": TALK}, 0)
    assert learnt(text, first) == ["<think>\n\n</think>\n\nyo ho<|im_end|>"]
    assert learnt(text, second) == ["<think>\n\n</think>\n\nho<|im_end|>"]
    assert "<think>" not in text.tokenizer.decode(second.sequence.prompt)


def test_an_answer_beside_a_chat_is_a_turn_of_the_template(plain: Text) -> None:
    asked = data(answer="{a}", rows=[{"messages": [USER], "a": "yo ho"}])
    (example,) = examples_of(plain, asked, {"messages": [USER], "a": "yo ho"}, 0)
    assert example.sequence == Sequence(*plain.encode_turn([USER, ANSWER]))


def test_an_answer_that_the_spec_begins_is_gone_on_with(plain: Text) -> None:
    begun = data(
        chat=[{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "So "}],
        answer="{a}",
        rows=[{"q": "hi", "a": "it is"}],
    )
    (example,) = examples_of(plain, begun, {"q": "hi", "a": "it is"}, 0)
    assert plain.tokenizer.decode(example.sequence.prompt) == ASKED + "So "
    assert learnt(plain, example) == ["it is<|im_end|>"]


def test_the_end_of_a_chat_column_is_its_answer_and_no_part_of_the_prompt() -> None:
    chat = data()
    assert chat.prompt({"messages": TALK}) == TALK[:3] and chat.answer({"messages": TALK}) == "ho"
    assert chat.prompt({"messages": TALK[:3]}) == TALK[:3] and chat.answer({"messages": TALK[:3]}) is None
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat.prompt({"messages": [{"role": "user", "content": parts, "name": None}]}) == [USER]


def test_only_what_is_learnt_has_a_gradient(load, plain: Text) -> None:
    """The mask of a batch whose rows stand in another order, against a loop over its tokens."""
    batch = [
        Example(Sequence([1, 2], [3, 4, 5, 6]), [True, False, False, True], 0),
        Example(Sequence([1], [2, 3]), [True, True], 1),
    ]
    log_probs = torch.arange(8.0).reshape(2, 4).requires_grad_()
    (log_probs * _mask(batch, [1, 0], log_probs)).sum().backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
