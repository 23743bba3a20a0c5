"""Every row against the templates that will be filled in with it, and for the tiny model against what it can read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from service.errors import FieldError
from service.jobs.data import Data, DataRows, Row
from service.spec.data import DatasetSource, ReasoningGymSource, SplitSource
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.templates import columns_of
from service.spec.tiny import TINY_CHARACTERS, strange_characters
from service.store.tables import Dataset
from service.validation import did_you_mean

MAX_SHOWN = 20  # columns in a message
ROLES = ("system", "user", "assistant")


def check_rows(spec: RLSpec | SupervisedSpec, data: Data, uploaded: dict[str, Dataset]) -> list[FieldError]:
    """Everything that is wrong with the rows, each complaint once, with the number of the first row it applies to."""
    errors: dict[tuple[str, str], FieldError] = {}
    templates = templates_of(spec)
    for part, rows in (("train", data.train), ("eval", data.eval)):
        if rows is None:
            continue
        source = spec.data.train if part == "train" or isinstance(spec.data.eval, SplitSource) else spec.data.eval
        complaints = [] if _known_complete(source, templates, spec, uploaded) else _missing_columns(rows, part, templates)
        if not complaints and not isinstance(source, ReasoningGymSource):
            complaints = [*_bad_chats(spec, rows, part), *_unreadable(spec, data, rows, part)]
        elif not complaints and spec.model.source == "tiny" and source is getattr(spec.data, part):
            detail = "the tiny model reads digits, small letters and a few signs only; rows of reasoning_gym hold others"
            complaints = [FieldError(f"/data/{part}/source", detail, "unknown_character")]
        for error in complaints:
            errors.setdefault((error.pointer, error.code + str(error.got)), error)
    return list(errors.values())


def templates_of(spec: RLSpec | SupervisedSpec) -> dict[str, list[str]]:
    """JSON pointer -> the columns that are named there."""
    data = spec.data
    templates = {"/data/prompt": data.prompt, "/data/answer": data.answer}
    if isinstance(data.chat, list):
        templates |= {f"/data/chat/{number}/content": message.content for number, message in enumerate(data.chat)}
    for number, grader in enumerate(spec.reward.graders if spec.reward else []):
        templates[f"/reward/graders/{number}/reference"] = getattr(grader, "reference", None)
    named = {pointer: columns_of(template) for pointer, template in templates.items() if template is not None}
    return named | ({"/data/chat": [data.chat]} if isinstance(data.chat, str) else {})


def _known_complete(
    source: Any, templates: dict[str, list[str]], spec: RLSpec | SupervisedSpec, uploaded: dict[str, Dataset]
) -> bool:
    """Whether the upload has already seen every named column, with a value, in every row."""
    dataset = uploaded.get(source.id) if isinstance(source, DatasetSource) else None
    if dataset is None:
        return False
    complete = {
        name for name, facts in dataset.columns.items() if facts["rows"] == dataset.rows and "null" not in facts["types"]
    }
    return complete.issuperset(column for columns in templates.values() for column in columns)


@dataclass
class _Gap:
    """A named column that some rows lack."""

    first: int
    rows: int = 0
    null: bool = False


def _missing_columns(rows: DataRows, part: str, templates: dict[str, list[str]]) -> list[FieldError]:
    wanted = {column for columns in templates.values() for column in columns}
    gaps: dict[str, _Gap] = {}
    seen: dict[str, None] = {}
    for index, row in enumerate(rows):
        seen.update(dict.fromkeys(row))
        for column in wanted:
            if row.get(column) is None:
                gap = gaps.setdefault(column, _Gap(rows.number(index), null=column in row))
                gap.rows += 1
    return [
        _absent(pointer, column, gaps[column], part, sorted(seen), len(rows))
        for pointer, columns in templates.items()
        for column in dict.fromkeys(columns)
        if column in gaps
    ]


def _absent(pointer: str, column: str, gap: _Gap, part: str, columns: list[str], rows: int) -> FieldError:
    if column not in columns:
        listed = ", ".join(columns[:MAX_SHOWN]) + (" ..." if len(columns) > MAX_SHOWN else "")
        detail = f"{{{column}}} names no column of the rows of data.{part}; columns: {listed}{did_you_mean(column, columns)}"
        return FieldError(pointer, detail, "unknown_column", column, columns[:MAX_SHOWN])
    what = "null" if gap.null else "absent"
    detail = f"column {column!r} is absent or null in {gap.rows} of {rows} rows of data.{part}; it is {what} in row {gap.first}"
    return FieldError(pointer, detail, "column_missing", column)


# ---------------------------------------------------------------- chat columns


def _bad_chats(spec: RLSpec | SupervisedSpec, rows: DataRows, part: str) -> Iterator[FieldError]:
    """The first row whose chat column is no list of messages."""
    column = spec.data.chat
    if not isinstance(column, str):
        return
    for index, row in enumerate(rows):
        if not _is_chat(row[column]):
            detail = (
                f"column {column!r} of row {rows.number(index)} of data.{part} is no chat; it must be a list of "
                f'{{"role": {" | ".join(ROLES)}, "content": text}}, and not empty'
            )
            yield FieldError("/data/chat", detail, "not_a_chat", column)
            return


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
            for message in value
        )
    )


# ---------------------------------------------------------------- the tiny model


@dataclass
class _Room:
    """How many tokens fit, and who says so."""

    prompt: int
    sequence: int
    why: str
    answers: bool = field(default=False)  # whether answers are read too


def _unreadable(spec: RLSpec | SupervisedSpec, data: Data, rows: DataRows, part: str) -> Iterator[FieldError]:
    """For the tiny model, where a character is a token: what it cannot read, and what does not fit its context."""
    if spec.model.source != "tiny" or spec.model.tiny is None:
        return
    if spec.data.chat is not None:
        yield FieldError("/data/chat", "the tiny model has no chat template; use data.prompt", "no_chat_template")
        return
    room = _room(spec, spec.model.tiny.context, part)
    reported: set[str] = set()
    for index, row in enumerate(rows):
        for error in _row_errors(data, row, rows.number(index), part, room):
            if error.pointer + error.code not in reported:
                reported.add(error.pointer + error.code)
                yield error


def _room(spec: RLSpec | SupervisedSpec, context: int, part: str) -> _Room:
    answers = 0
    if part == "eval" and spec.reward is not None:
        answers = spec.eval.max_completion_tokens or 0
    elif isinstance(spec, RLSpec):
        answers = spec.rollout.max_completion_tokens
    asked = spec.rollout.max_prompt_tokens if isinstance(spec, RLSpec) else None
    why = f"context {context}, answers of up to {answers} tokens" if answers else f"context {context}"
    why += f", rollout.max_prompt_tokens {asked}" if asked is not None else ""
    reads = isinstance(spec, SupervisedSpec) or (part == "eval" and spec.data.answer is not None)
    return _Room(min(context - answers, asked or context), context, why, reads)


def _row_errors(data: Data, row: Row, number: int, part: str, room: _Room) -> Iterator[FieldError]:
    prompt = data.prompt(row)
    assert isinstance(prompt, str)
    answer = data.answer(row) if room.answers else None
    where = f"of row {number} of data.{part}"
    for name, text in (("prompt", prompt), ("answer", answer or "")):
        if strange := strange_characters(text):
            detail = f"the {name} {where} holds {strange[0]!r}; the tiny model can read {TINY_CHARACTERS!r}"
            yield FieldError(f"/data/{name}", detail, "unknown_character", strange[0])
    if not prompt or 0 < room.prompt < len(prompt):  # no room at all is reported as the context's error
        detail = f"the prompt {where} has {len(prompt)} tokens; allowed are 1 to {room.prompt} ({room.why})"
        yield FieldError("/data/prompt", detail, "prompt_too_long" if prompt else "prompt_empty", len(prompt), room.prompt)
    elif answer is not None and len(prompt) + len(answer) + 1 > room.sequence:
        tokens = len(prompt) + len(answer) + 1
        detail = f"prompt, answer and end token {where} have {tokens} tokens; the context holds {room.sequence}"
        yield FieldError("/data/answer", detail, "sequence_too_long", tokens, room.sequence)
