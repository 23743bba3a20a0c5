"""Chats through templates of the shapes that models ship: the prompt, the turn that is learnt, what is refused."""

import re

import pytest
from policy_chats import ANSWER, ASKED, HEAD, OPENS, PLAIN, THINKS, USER, text_of, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.policy.chat import Chat, Turn
from workers.policy.errors import PolicyFailed
from workers.policy.text import Text


def chat(template: str = PLAIN) -> Chat:
    return Chat(tokenizer(template))


@pytest.fixture
def text(load, tiny_spec) -> Text:
    return text_of(load, tokenizer())


# ---------------------------------------------------------------- the template


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (PLAIN, Turn(ASKED, "yo ho")),
        (THINKS, Turn(ASKED, "<think>\n\n</think>\n\nyo ho")),
        (OPENS, Turn(ASKED, "yo ho")),
        (OPENS.replace("assistant\n{{", "assistant\n<think></think>{{"), Turn(ASKED + "<think>", "</think>yo ho")),
    ],
)
def test_a_turn_is_what_the_template_writes_behind_its_prompt(template: str, turn: Turn) -> None:
    assert chat(template).turn([USER, ANSWER]) == turn
    assert chat(template).ending == "<|im_end|>\n"


def test_without_thinking_the_empty_block_belongs_to_the_prompt() -> None:
    prompt = ASKED + "<think>\n\n</think>\n\n"
    assert chat(THINKS).turn([USER, ANSWER], enable_thinking=False) == Turn(prompt, "yo ho")
    assert chat(THINKS).prompt([USER], enable_thinking=False) == prompt


@pytest.mark.parametrize("template", [PLAIN, THINKS, OPENS])
def test_a_think_block_that_the_spec_opens_stands_where_the_answer_begins(template: str) -> None:
    begun = [USER, {"role": "assistant", "content": "<think>\n"}]
    assert chat(template).prompt(begun) == ASKED + "<think>\n"
    assert chat(template).prompt([USER, {"role": "assistant", "content": "Well, "}]).endswith("Well, ")


def test_a_template_that_loses_the_question_is_refused() -> None:
    """Or the question would be learnt with the answer."""
    loses = "{% if add_generation_prompt %}{{ messages[-1].content }}>{% else %}all of it: "
    loses += "{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}"
    with pytest.raises(PolicyFailed, match="does not show the assistant's last turn") as failed:
        chat(loses).turn([USER, ANSWER])
    assert failed.value.code == "chat_refused"


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ([USER, {"role": "tool", "content": "4"}], {}, "leaves out messages of the role 'tool' (message 1)"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], {}, "leaves out the key 'reasoning_content' of the role 'assistant'"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"name": "f"}}]}], {}, "leaves out the key 'tool_calls'"),
        ([USER], {"tools": [{"name": "f"}]}, "takes no 'tools': whatever is given, it writes the same (leave out data.tools,"),
        ([USER], {"enable_thinking": False}, "the same (leave out enable_thinking of data.chat_template_kwargs,"),
        ([{"role": "system", "content": "x"}, USER], {}, "refuses the messages (system, user): no system here"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_or_refuses_is_named(messages, options, said: str) -> None:
    picky = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(PolicyFailed) as failed:
        chat(picky).prompt(messages, **options)
    assert said in f"{failed.value.detail} ({failed.value.hint})" and failed.value.code == "chat_refused"
    assert chat(picky).prompt([USER, {**ANSWER, "name": "bob"}, USER]).count("hi") == 2


SYSTEM = {"role": "system", "content": "Be brief."}
MOVES = "{% set first = messages[0] %}" + PLAIN.replace(
    HEAD, "{% for m in messages if m.role != 'system' %}{{ first.content if loop.first and first.role == 'system' }}"
)


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        (PLAIN.replace(HEAD, "{% for m in messages if m.role != 'system' %}"), [SYSTEM, USER], "'system' (message 0)"),
        (MOVES, [SYSTEM, USER, ANSWER, SYSTEM, USER], "'system' (message 3)"),
        (PLAIN.replace(HEAD, "{% for m in messages[-3:] %}"), [USER, ANSWER, USER, ANSWER], "'user' (message 0)"),
        (PLAIN.replace("{{ m.content }}", "", 1), [USER, ANSWER], "'user' (message 0)"),
    ],
)
def test_a_message_whose_text_is_nowhere_in_the_chat_is_refused(template: str, messages, left_out: str) -> None:
    asked = chat(template)
    for read in (asked.prompt, asked.turn) if messages[-1] is ANSWER else (asked.prompt,):
        with pytest.raises(PolicyFailed, match=re.escape(f"leaves out the key 'content' of the role {left_out}")) as failed:
            read(messages)
        assert failed.value.code == "chat_refused"


def test_a_system_text_may_be_moved_to_another_place() -> None:
    assert "Be brief." in chat(MOVES).prompt([SYSTEM, USER]) and "Be brief." in chat(MOVES).turn([SYSTEM, USER, ANSWER]).prompt


def test_arguments_of_tool_calls_are_given_as_the_object_that_templates_expect() -> None:
    calls = (
        HEAD
        + "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    assert chat(calls).prompt(messages) == 'user:hi;assistant:{"a": 1};tool:1;'
    as_text = calls.replace(" | tojson", "").replace("{{ c.", "{{ '' + c.")  # one that wants the text
    assert chat(as_text).prompt(messages) == 'user:hi;assistant:{"a": 1};tool:1;'


# ---------------------------------------------------------------- tokens


def test_a_learnt_turn_ends_as_the_template_ends_one_and_sampling_stops_there(text: Text) -> None:
    prompt, turn = text.encode_turn([USER, ANSWER])
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt == text.encode([USER])
    assert turn == [*text.tokenizer("yo ho")["input_ids"], end]
    assert text.eos_ids == [text.tokenizer.eos_token_id, end]
    assert text.encode_answer("yo") == [*text.tokenizer("yo")["input_ids"], text.tokenizer.eos_token_id], "a text, no chat"


@pytest.mark.parametrize(
    ("end_of_turn", "end_of_call", "learnt"),
    [
        ("<|im_end|>\n", "<|tool|>", {"said": "<|im_end|>", "called": "<|tool|>"}),  # as gpt-oss: <|return|> and <|call|>
        ("<|tool|></s>", "<|tool|></s>", {"said": "<|tool|></s>", "called": "<|tool|></s>"}),  # as Cohere's R7B
        ("<|tool|>\n</s>", "", {"said": "<|tool|>", "called": "<|tool|>"}),  # as Phi-3: of a whole text, no turn
    ],
)
def test_a_learnt_turn_has_its_own_end_once_and_whole(load, end_of_turn: str, end_of_call: str, learnt: dict[str, str]) -> None:
    ends = f"{{% if m.tool_calls %}}called{end_of_call}{{% else %}}{{{{ m.content }}}}{end_of_turn}{{% endif %}}"
    text = text_of(load, tokenizer(PLAIN.replace("assistant\n{{ m.content }}<|im_end|>\n", "assistant\n" + ends)))
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for message, said in ((called, "called"), ({**ANSWER, "content": "said"}, "said")):
        prompt, turn = text.encode_turn([USER, message])
        assert (text.show(prompt), text.show(turn)) == (ASKED, said + learnt[said])


def test_thoughts_that_the_template_leaves_out_of_a_learnt_turn_are_refused() -> None:
    """As DeepSeek R1's does with every turn: the model would learn to answer without a thought."""
    thought = {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nyo"}
    drops = chat(PLAIN.replace("assistant\n{{ m.content", "assistant\n{{ m.content.split('</think>')[-1]"))
    with pytest.raises(PolicyFailed, match="leaves out the thoughts") as failed:
        drops.turn([USER, thought])
    assert failed.value.code == "chat_refused"
    assert drops.turn([USER, thought, USER, ANSWER]).answer == "yo ho", "an earlier turn's may go"
    assert drops.turn([USER, {**thought, "content": "<think>\n\n</think>\n\nyo"}]).answer.strip() == "yo"
    assert chat(PLAIN).turn([USER, thought]).answer == thought["content"]


def test_an_answer_that_brings_its_end_gets_no_second_one(text: Text) -> None:
    eos = text.tokenizer.eos_token_id
    assert text.encode_answer("yo</s>") == text.encode_answer("yo") and text.encode_answer("yo")[-2:].count(eos) == 1
    assert text.encode_turn([USER, {**ANSWER, "content": "yo<|im_end|>"}]) == text.encode_turn(
        [USER, {**ANSWER, "content": "yo"}]
    )


def test_a_prompt_that_is_a_rendered_chat_begins_once(load) -> None:
    from tokenizers.processors import TemplateProcessing

    tokens = tokenizer()
    bos = tokens.bos_token_id
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    text = text_of(load, tokens)
    assert text.encode("hi") == text.encode("<s>hi") == [bos, *tokens("hi", add_special_tokens=False)["input_ids"]]


def test_a_prompt_keeps_the_second_end_token_that_it_ends_with(text: Text) -> None:
    ended = text.encode("<|im_start|>user\nhi<|im_end|>")
    assert ended[-1] == text.eos_ids[1] and text.encode("hi</s>")[-1] == text.eos_ids[0]


def test_marks_that_are_special_stay_in_an_answers_text_and_its_frame_does_not(text: Text) -> None:
    ids = text.tokenizer("<s><|tool|>f(<|im_start|>x)<pad></s>")["input_ids"]
    assert text.decode(ids) == "<|tool|>f(<|im_start|>x)"


def test_a_prompt_is_shown_with_all_its_marks(text: Text) -> None:
    assert text.show(text.encode([USER])) == ASKED and text.show(text.encode("<s>hi</s>")) == "<s>hi</s>"


def test_a_special_token_is_a_stop_text_and_so_is_a_text_of_many_tokens(text: Text) -> None:
    special = text.tokenizer.convert_tokens_to_ids("<|tool|>")
    assert text.stop_ids(["<|tool|>", "x", "<s>"]) == [special, text.tokenizer.bos_token_id]
    assert text.stop_ids(["<pad>Human:", "<|tool|>\n"]) == [text.tokenizer.pad_token_id], (
        "the text shows no <pad>, but <|tool|>"
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_no_space_is_put_before_an_answer(load, prefix: bool) -> None:
    """SentencePiece puts one before every text of its own."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "4": 3, "▁4": 4, "▁a": 5, "\n": 6, ":": 7}
    pieces = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "4"), ("▁", "a")], unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    pieces.decoder = decoders.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    text = text_of(load, PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>"))
    assert text.encode_answer("4")[:-1] == [3]
    assert text.encode_answer(" 4")[:-1] == [4]
    assert text.encode("4") == [4 if prefix else 3]


def test_an_answer_begun_in_the_think_block_that_the_template_opens_has_one_block() -> None:
    begun = {"role": "assistant", "content": "<think>\nOkay"}
    assert Chat(tokenizer(OPENS)).prompt([USER, begun]) == ASKED + "<think>\nOkay"
    assert Chat(tokenizer(PLAIN)).prompt([USER, begun]) == ASKED + "<think>\nOkay"
