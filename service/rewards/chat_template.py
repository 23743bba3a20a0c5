"""A model's chat template, rendered as transformers renders it, but without transformers.

It is foreign code and may run without end, so only the sandbox's child renders with this module."""

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]
CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
FILE, FURTHER_FILES = "chat_template.jinja", "additional_chat_templates"
MAX_BYTES = 16 * 2**20  # of each of these files
REASONING = "reasoning_content", "thinking", "reasoning"  # names of the same field of a message


class ChatRefused(TemplateError):
    """The template called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}`, which marks what is learnt and does not change the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """The template of the tokenizer in a folder. Raises OSError, ValueError or LookupError if there is none."""

    def __init__(self, folder: Path) -> None:
        config = _json(folder / CONFIG)
        self._tokens = _special_tokens({**config, **_json(folder / SPECIAL_TOKENS)})
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        texts = _templates(folder, config)
        # Compiled when it is first needed, which the sandbox bounds.
        self._compiled = cache(lambda name: environment.from_string(texts[name]))
        self._for_tools = "tool_use" if "tool_use" in texts else "default"

    def check(self, messages: Messages, opened: bool, options: dict[str, Any]) -> None:
        """Raises ChatRefused if the template refuses the messages in words of its own, as the worker will."""
        try:
            self.render(with_parsed_arguments(messages), opened=opened, **options)
        except ChatRefused:
            self.render(messages, opened=opened, **options)

    def render(self, messages: Messages, *, opened: bool, **options: Any) -> str:
        """The text of the messages. `opened`: with the beginning of the assistant's answer. Raises whatever a template may."""
        template = self._compiled(self._for_tools if options.get("tools") else "default")
        variables = {"tools": None, "documents": None, **self._tokens, **options}
        return template.render(messages=list(map(_aliased, messages)), add_generation_prompt=opened, **variables)


def with_parsed_arguments(messages: Messages) -> Messages:
    """Tool calls with their arguments as objects: OpenAI writes them as JSON text, but most templates expect objects."""
    return [
        {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def _parsed(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files take the place of what the tokenizer's configuration says."""
    files = {path.stem: path for path in (folder / FURTHER_FILES).glob("*.jinja")} | {"default": folder / FILE}
    if texts := {name: _read(path) for name, path in files.items() if path.is_file()}:
        return texts
    given = config["chat_template"]
    return {"default": given} if isinstance(given, str) else {one["name"]: one["template"] for one in given}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_read(path)) if path.is_file() else {}


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB")
    return path.read_text("utf-8")


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise ChatRefused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 (as transformers does)
