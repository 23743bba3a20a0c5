"""Rows: where they come from, how they become prompts, and which of them a step takes.

Nothing here loads a dataset into memory: an uploaded file is read by the offsets of its lines, a procedural source makes a
row when it is asked for. Every choice derives from (seed, epoch), so a resumed job sees the rows it would have seen.
"""

import json
import os
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, overload

from service.errors import FieldError, InvalidRequest
from service.jobs.gym import check_task, open_task
from service.spec.data import DatasetSource, DataSpec, InlineSource, Message, ReasoningGymSource, SplitSource, TrainSource
from service.spec.templates import render

Row = dict[str, Any]
Messages = list[dict[str, Any]]
# What a chat template may read of a message; ids, times and the like, which data sets have beside them, it does not.
MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}
)
Prompt = str | Messages


class DataRows(Sequence[Row]):
    """Rows by number. `columns` are those of the first row."""

    def _row(self, index: int) -> Row:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(index % len(self))

    @property
    def columns(self) -> list[str]:
        return list(self[0]) if len(self) else []

    def number(self, index: int) -> int:
        """What row `index` is called in messages: its number in the source."""
        return index


class InlineRows(DataRows):
    """Rows that stand in the spec."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _row(self, index: int) -> Row:
        return self._rows[index]


class JsonlRows(DataRows):
    """Rows of a file with one JSON object a line. Only the offsets of the lines are kept in memory."""

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        self._offsets = array("Q", [0])
        with path.open("rb") as file:
            for line in file:
                if max_rows is not None and len(self._offsets) > max_rows:
                    break
                self._offsets.append(self._offsets[-1] + len(line))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def within(self, begin: int, end: int, max_bytes: int) -> int:
        """Where to end so that the rows from `begin` take no more than `max_bytes` in the file; one is always taken."""
        end = min(end, len(self))
        while end > begin + 1 and self._offsets[end] - self._offsets[begin] > max_bytes:
            end -= 1
        return end

    def _row(self, index: int) -> Row:
        start, end = self._offsets[index], self._offsets[index + 1]
        return json.loads(os.pread(self._descriptor, end - start, start))


class ReasoningGymRows(DataRows):
    """Rows that a task of reasoning-gym makes: question, answer, metadata (with the
    task's settings as source_config). Row i is always the same for the same seed."""

    def __init__(self, source: ReasoningGymSource, pointer: str = "/data/train") -> None:
        check_task(source, pointer)
        self._size = min(source.size, source.max_rows or source.size)
        self._config = source.config
        self._parts = {part["name"]: part.get("config", {}) for part in source.config.get("datasets", [])}
        self._task = open_task(source.task, source.config, seed=source.seed, size=source.size)

    def __len__(self) -> int:
        return self._size

    def _row(self, index: int) -> Row:
        row = self._task[index]
        return {**row, "metadata": {**row["metadata"], "source_config": self._config_of(row["metadata"])}}

    def _config_of(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """With what the row was made, which its scorer must know too; a part of a composite has its own."""
        return self._parts.get(metadata.get("source_dataset"), {}) if self._parts else self._config


class Subset(DataRows):
    """Some rows of others, by number."""

    def __init__(self, rows: DataRows, indices: Sequence[int]) -> None:
        self._rows = rows
        self._indices = array("Q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def _row(self, index: int) -> Row:
        return self._rows[self._indices[index]]

    def number(self, index: int) -> int:
        return self._indices[index]


@dataclass(frozen=True)
class Data:
    """The rows of a job and how they are put."""

    train: DataRows
    eval: DataRows | None
    prompt_template: str | None
    chat: list[Message] | str | None
    answer_template: str | None
    learn: Literal["last", "all"] = "last"
    tools: list[dict[str, Any]] | str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: DataSpec, train: DataRows, held_out: DataRows | None) -> "Data":
        rest = spec.learn, spec.tools, spec.chat_template_kwargs
        return cls(train, held_out, spec.prompt, spec.chat, spec.answer, *rest)

    def prompt(self, row: Row) -> Prompt:
        """The text of the prompt, or its chat messages: those of a chat column without the answer that they may end with.
        Raises KeyError for an absent column."""
        if self.prompt_template is not None:
            return render(self.prompt_template, row)
        if isinstance(self.chat, str):
            messages = self._messages(row)
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [{"role": message.role, "content": render(message.content, row)} for message in self.chat or []]

    def answer(self, row: Row) -> str | None:
        """The right answer as text, where the spec or the end of the chat says what it is."""
        if self.answer_template is not None:
            return render(self.answer_template, row)
        if not isinstance(self.chat, str) or (last := self._messages(row)[-1])["role"] != "assistant":
            return None
        return last.get("content")

    @property
    def begins_the_answer(self) -> bool:
        """Whether the prompt is a chat whose last message, in the spec, is the beginning of the assistant's answer."""
        return isinstance(self.chat, list) and self.chat[-1].role == "assistant"

    def learnt_turns(self, row: Row) -> list[Messages]:
        """Of a chat: for each assistant's turn that is to be learnt, the messages up to it, in order."""
        if self.answer_template is not None:
            prompt = self.prompt(row)
            assert not isinstance(prompt, str)
            return [[*prompt, {"role": "assistant", "content": render(self.answer_template, row)}]]
        messages = self._messages(row)
        ends = [place + 1 for place, message in enumerate(messages) if place and message["role"] == "assistant"]
        return [messages[:end] for end in (ends if self.learn == "all" else ends[-1:])]

    def template_options(self, row: Row) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        tools = row.get(self.tools) if isinstance(self.tools, str) else self.tools
        return {**({"tools": tools} if tools else {}), **self.chat_template_kwargs}

    def _messages(self, row: Row) -> Messages:
        """The chat column, with the keys that templates know and that hold something; contents in parts, as OpenAI writes
        them, as one text."""
        assert isinstance(self.chat, str)
        return [
            {
                key: _text_of(value) if key == "content" else value
                for key, value in message.items()
                if key in MESSAGE_KEYS and value is not None
            }
            for message in row[self.chat]
        ]


def open_data(data: DataSpec, seed: int, dataset_path: Callable[[str], Path]) -> Data:
    """Open the sources. `dataset_path` says where an uploaded dataset lies; `seed` draws a held-out split.

    Raises InvalidRequest where reasoning-gym is absent or refuses its task or config, or a split leaves nothing to train on.
    """
    train = open_source(data.train, dataset_path, "/data/train")
    held_out: DataRows | None = None
    if isinstance(data.eval, SplitSource):
        train, held_out = split(train, data.eval.rows, seed)
    elif data.eval is not None:
        held_out = open_source(data.eval, dataset_path, "/data/eval")
    return Data.of(data, train, held_out)


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def open_source(source: TrainSource, dataset_path: Callable[[str], Path], pointer: str) -> DataRows:
    """The rows of one source; `pointer` is where it stands in the spec."""
    match source:
        case DatasetSource():
            return JsonlRows(dataset_path(source.id), source.max_rows)
        case InlineSource():
            return InlineRows(source.rows[: source.max_rows])
        case ReasoningGymSource():
            return ReasoningGymRows(source, pointer)


def split(rows: DataRows, held_out: int, seed: int) -> tuple[DataRows, DataRows]:
    """What is trained on and what is held out, drawn from the seed, both in their old order."""
    if held_out >= len(rows):
        detail = f"the split holds out {held_out} rows of {len(rows)}: nothing would be left to train on"
        raise InvalidRequest(
            detail, [FieldError("/data/eval/rows", detail, "split_too_large", held_out, f"less than {len(rows)}")]
        )
    chosen = set(_random(seed, "split").sample(range(len(rows)), held_out))
    return Subset(rows, [i for i in range(len(rows)) if i not in chosen]), Subset(rows, sorted(chosen))


def prompt_indices(n: int, step: int, count: int, seed: int, shuffle: bool) -> list[int]:
    """Which of `n` rows step number `step` (from 1) takes: the next `count` of an endless walk through epochs.

    Each epoch visits every row once, in an order drawn from (seed, epoch), or in file order without `shuffle`.
    """
    first = (step - 1) * count
    return [_epoch(n, place // n, seed)[place % n] if shuffle else place % n for place in range(first, first + count)]


@lru_cache(maxsize=4)  # a step touches one epoch, or two where they meet
def _epoch(n: int, epoch: int, seed: int) -> "array[int]":
    order = array("Q", range(n))
    _random(seed, f"epoch/{epoch}").shuffle(order)
    return order


def _random(seed: int, purpose: str) -> random.Random:
    digest = blake2b(f"{seed}/data/{purpose}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))
