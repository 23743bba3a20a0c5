"""Chats through the model's template: prompts that the model continues, and the turns that a supervised job learns.

A template is a program. It may put an empty think block before an answer, drop the thoughts of earlier turns, or open a think
block in the prompt. So a turn is cut out of the rendered text, and never built from a guess of what the template writes.
"""

import re
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from service.rewards.chat_template import Messages, with_parsed_arguments
from workers.policy.errors import PolicyFailed, Subject

THOUGHTS = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
MAX_SHOWN = 500  # characters of a template's error message
MARK = "an answer that nobody gives"
PLAIN_KEYS = frozenset({"content", "name", "tool_call_id"})  # a template may leave out the last two without loss
PLAIN_ROLES = frozenset({"system", "user", "assistant"})


class Turn(NamedTuple):
    """The text before an assistant's turn, and the turn itself without the template's end of turn. `closed`: the template ended
    it as it ends a plain answer; some have another end for calls of tools, which then stays in the answer."""

    prompt: str
    answer: str
    closed: bool = True


class Chat:
    """A tokenizer's chat template. Raises PolicyFailed about the chat: no_chat_template, chat_refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._shown: dict[tuple[str, str], bool] = {}  # by role and key
        self._left_out: dict[tuple[str, ...], int | None] = {}  # by the roles of a chat

    def prompt(self, messages: Messages, **options: Any) -> str:
        """The text that the model continues. If the last message is the assistant's, it is the beginning of the answer."""
        self.check(messages, **options)
        if messages[-1]["role"] != "assistant":
            return self._render(messages, opened=True, **options)
        begun = messages[-1]["content"]
        before, opening = self._opened(messages[:-1], **options)
        if begun.strip().startswith("<") and opening.rstrip().endswith(begun.strip()):
            return before + opening  # the template already opens the think block
        if (tag := re.search(r"<\w+>\s*\Z", opening)) and begun.lstrip().startswith(tag[0].strip()):
            return before + opening[: tag.start()] + begun.lstrip()  # and the answer goes on in it
        shown = self._continued(messages, before, **options).removeprefix(before + opening)
        space = shown[: len(shown) - len(shown.lstrip())]  # some templates put whitespace before an answer
        return before + opening + (space if shown.strip() == begun.strip() and not begun[:1].isspace() else "") + begun

    def turn(self, messages: Messages, **options: Any) -> Turn:
        """The last message, an assistant's turn, and the prompt before it, both as the template renders them."""
        self.check(messages, **options)
        whole = self._render(messages, opened=False, **options)
        closed = whole.endswith(self.ending)
        whole = whole.removesuffix(self.ending)
        prompt = self._render(messages[:-1], opened=True, **options)
        if (thoughts := THOUGHTS.match(messages[-1].get("content") or "")) and thoughts[1].strip() not in whole:
            raise self._refused("leaves out the thoughts (<think> ... </think>) of the assistant's turn that is learnt")
        if whole.startswith(prompt):
            return Turn(prompt, whole[len(prompt) :], closed)
        # The prompt opens a think block; the turn has none or a closed one. Split where they differ first, but not in a tag.
        start = prompt[: next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))]
        if start.rfind("<") > start.rfind(">"):
            start = start[: start.rfind("<")]
        asked = messages[-2].get("content") if len(messages) > 1 else None
        before = self._render(messages[:-1], opened=False, **options)
        if isinstance(asked, str) and start.count(asked.strip()) < before.count(asked.strip()):
            raise self._refused("does not show the assistant's last turn behind its prompt")
        return Turn(start, whole[len(start) :], closed)

    @cached_property
    def ending(self) -> str:
        """What the template writes after an assistant's last turn; empty if it refuses a plain question and answer."""
        try:
            whole = self._render(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}], opened=False, tools=None
            )
        except PolicyFailed:
            return ""
        return whole.rpartition(MARK)[2]

    def check(self, messages: Messages, *, tools: list[dict[str, Any]] | None = None, **options: Any) -> None:
        """Raises PolicyFailed if the template silently leaves out a key or role of the messages, the tools or an option."""
        names = [*(["tools"] if tools else []), *options]
        template = self._tokenizer.get_chat_template(tools=tools) if names else ""
        for name in names:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                out = "data.tools" if name == "tools" else f"{name} of data.chat_template_kwargs"
                raise self._refused(f"takes no {name!r}: whatever is given, it writes the same", instead=f"leave out {out}")
        for number, message in enumerate(messages):
            for key in sorted(key for key, value in message.items() if value is not None and key not in PLAIN_KEYS):
                if not self._shows(messages[:number], message, key):
                    what = f"the key {key!r}" if key != "role" else "messages"
                    raise self._refused(f"leaves out {what} of the role {message['role']!r} (message {number})")
        if (number := self._first_left_out(messages, tools=tools, **options)) is not None:
            role = messages[number]["role"]
            raise self._refused(f"leaves out the key 'content' of the role {role!r} (message {number})")

    def _first_left_out(self, messages: Messages, **options: Any) -> int | None:
        """The first message whose text is nowhere in the rendered chat; one that the template moves elsewhere is there.
        A text beside tool calls is not looked for: templates differ in what they keep of it."""
        marks = {
            number: f"{MARK} {number}."
            for number, message in enumerate(messages)
            if message["role"] in PLAIN_ROLES and message.get("content") and not message.get("tool_calls")
        }
        shape = tuple(message["role"] if number in marks else "" for number, message in enumerate(messages))
        if shape not in self._left_out:
            marked = [message | ({"content": marks[n]} if n in marks else {}) for n, message in enumerate(messages)]
            try:
                text = self._render(marked, opened=False, **options)
            except PolicyFailed:
                return None  # the messages themselves are rendered next, and refused with the template's words
            self._left_out[shape] = next((number for number, mark in marks.items() if mark not in text), None)
        return self._left_out[shape]

    def _shows(self, before: Messages, message: dict[str, Any], key: str) -> bool:
        """Whether this key of the message (for the key `role`: the message itself) changes the rendered text."""
        role = message["role"]
        if key == "role":
            if role in PLAIN_ROLES:
                return True
            others = before
        else:
            before = [{"role": "user", "content": "?"}]
            others = [*before, {name: value for name, value in message.items() if name != key}]
        if (role, key) not in self._shown:
            self._shown[role, key] = self._text([*before, message]) != self._text(others)
        return self._shown[role, key]

    def _text(self, messages: Messages) -> str:
        return self._render(messages, opened=False) if messages else ""

    def _opened(self, messages: Messages, **options: Any) -> tuple[str, str]:
        """The rendered messages, and the text with which the template opens the assistant's turn."""
        before = self._render(messages, opened=False, **options)
        opened = self._render(messages, opened=True, **options)
        return (before, opened[len(before) :]) if opened.startswith(before) else (opened, "")

    def _continued(self, messages: Messages, before: str, **options: Any) -> str:
        """The rendered chat up to the end of its last message; empty if the template changes that message, for example removes
        its thoughts."""
        try:
            return self._render(messages, opened=False, continue_final_message=True, **options)
        except PolicyFailed:
            asked = messages[-2].get("content") if len(messages) > 1 else None
            if isinstance(asked, str) and asked.strip() not in before:
                raise
            return ""

    def _render(self, messages: Messages, *, opened: bool, **options: Any) -> str:
        if not self._tokenizer.chat_template:
            raise PolicyFailed(
                "no_chat_template",
                "messages were given, and the model's tokenizer has no chat template",
                hint="use data.prompt, or an instruction-tuned model",
                subject=Subject.CHAT,
            )
        refusals: list[str] = []
        for form in (with_parsed_arguments(messages), messages):
            try:
                return self._tokenizer.apply_chat_template(form, add_generation_prompt=opened, tokenize=False, **options)
            except MemoryError:
                raise
            except Exception as error:  # a template may raise anything: its own messages or Python's errors
                refusals.append(str(error)[:MAX_SHOWN] or type(error).__name__)
        roles = ", ".join(message["role"] for message in messages)
        raise self._refused(f"refuses the messages ({roles}): {refusals[0]}")

    def _refused(self, what: str, *, instead: str = "change the messages") -> PolicyFailed:
        return PolicyFailed(
            "chat_refused",
            f"the model's chat template {what}",
            hint=f"{instead}, or use a model whose template takes what is given",
            subject=Subject.CHAT,
        )
