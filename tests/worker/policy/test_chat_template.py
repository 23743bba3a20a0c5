"""The template as the API renders it, in the sandbox, beside what transformers renders and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from policy_chats import ANSWER, OPENS, PLAIN, THINKS, USER, tokenizer
from transformers import PreTrainedTokenizerFast

from service.rewards.chat_template import ChatRefused, ChatTemplate

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a <b> & 'c'"}}]
# The usual shapes: no system message (Gemma), strict alternation (Llama 2, Mistral), calls as JSON (Qwen), thoughts (gpt-oss).
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + PLAIN
)
ALTERNATES = """{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '[INST] ' + m.content | trim + ' [/INST]' if m.role == 'user' else m.content + eos_token }}
{%- endfor %}
"""
TOOL_CALLS = """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}
{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}
    {%- for call in m.tool_calls or [] %}
        {%- if call.function.arguments is string %}{{ raise_exception('arguments must be an object') }}{% endif %}
        {{- call.function.arguments | tojson(indent=2) }}
        {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- endfor %}
{%- endfor %}
"""
THOUGHTS = "{% for m in messages %}{% if m.thinking and m.content %}{{ raise_exception('not both') }}{% endif %}{% endfor %}"
BROKEN = "{{ messages[0].content + absent }}"
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {}),
    ([SYSTEM, USER], {}),
    ([USER, ANSWER, USER], {"enable_thinking": False}),
    ([USER, USER], {}),
    ([USER, CALLS], {"tools": TOOLS}),
    ([USER, {**ANSWER, "reasoning": "hm"}], {}),
]


def in_words(render: Any, *args: Any, **options: Any) -> tuple[str, str]:
    """What became of it: the text, or the kind of error and its words."""
    try:
        return "text", render(*args, **options)
    except Exception as error:
        return type(error).__name__.replace("ChatRefused", "TemplateError"), str(error)


@pytest.mark.parametrize("kept", ["file", "config", "named"])
@pytest.mark.parametrize("template", [PLAIN, THINKS, OPENS, NO_SYSTEM, ALTERNATES, TOOL_CALLS, THOUGHTS, BROKEN])
def test_a_template_renders_and_refuses_as_transformers_does(template: str, kept: str, tmp_path: Path) -> None:
    saved = tokenizer(template if kept != "named" else None)
    if kept == "named":
        saved.chat_template = {"default": template, "tool_use": TOOL_CALLS}
    saved.save_pretrained(str(tmp_path))
    if kept == "config":
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(str(tmp_path)), ChatTemplate(tmp_path)
    kinds: set[str] = set()
    for messages, options in CHATS:
        for opened in (False, True):
            told = in_words(theirs.apply_chat_template, messages, tokenize=False, add_generation_prompt=opened, **options)
            assert in_words(ours.render, messages, opened=opened, **options) == told
            kinds.add(told[0])
    refuses = template in (NO_SYSTEM, ALTERNATES, THOUGHTS, TOOL_CALLS) or kept == "named"
    assert kinds == ({"text"} if template != BROKEN else {"UndefinedError"}) | ({"TemplateError"} if refuses else set())


def test_only_what_the_template_refuses_in_both_forms_of_a_call_is_refused(tmp_path: Path) -> None:
    tokenizer(TOOL_CALLS).save_pretrained(str(tmp_path))
    ChatTemplate(tmp_path).check([USER, CALLS], False, {})  # the arguments are given as an object
    broken: Any = {**CALLS, "tool_calls": [{"function": {"arguments": "1"}}]}
    with pytest.raises(ChatRefused, match="arguments must be an object"):
        ChatTemplate(tmp_path).check([USER, broken], False, {})
