"""Checks that every row fills the spec's templates, and that the tiny model can read its characters within its context."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from service.errors import FieldError
from service.jobs.data import Data, DataRows, Row, Subset
from service.spec.data import DatasetSource, ReasoningGymSource, SplitSource
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.templates import columns_of
from service.spec.tiny import TINY_CHARACTERS, strange_characters
from service.store.tables import Dataset
from service.validation import did_you_mean
from service.validation.words import counted

MAX_SHOWN = 20  # columns in a message
TOO_LONG = ("prompt_too_long", "sequence_too_long")
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("/data/prompt", "/data/answer", "/data/chat/")  # pointers to the templates whose text the model reads


def check_rows(spec: RLSpec | SupervisedSpec, data: Data, uploaded: dict[str, Dataset]) -> list[FieldError]:
    """All errors in the rows, each once, with the number of the first row that has it."""
    errors: dict[tuple[str, str], FieldError] = {}
    templates = templates_of(spec)
    for part, rows in (("train", data.train), ("eval", data.eval)):
        if rows is None:
            continue
        source = spec.data.train if part == "train" or isinstance(spec.data.eval, SplitSource) else spec.data.eval
        complaints = [] if _known_complete(source, templates, spec, uploaded) else _missing_columns(rows, part, templates)
        if not complaints and not isinstance(source, ReasoningGymSource):
            complaints = [
                *_lists_in_texts(templates, source, rows, part, uploaded),
                *_bad_chats(spec, rows, part),
                *_unreadable(spec, data, rows, part),
            ]
        elif not complaints and spec.model.source == "tiny" and source is getattr(spec.data, part):
            detail = "the tiny model reads digits, small letters and a few signs only; rows of reasoning_gym hold others"
            complaints = [FieldError(f"/data/{part}/source", detail, "unknown_character")]
        for error in complaints:
            errors.setdefault((error.pointer, error.code + str(error.got)), error)
    return [*errors.values(), *_unknown_tools(spec.data.tools, data)]


def templates_of(spec: RLSpec | SupervisedSpec) -> dict[str, list[str]]:
    """The columns that each template names, by the template's JSON pointer."""
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
    """Whether the upload's check already found every named column, with a value, in every row."""
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
    detail = f"column {column!r} is absent or null in {gap.rows} of {counted(rows, 'row')} of data.{part}; "
    detail += f"it is {what} in row {gap.first}"
    return FieldError(pointer, detail, "column_missing", column)


# ---------------------------------------------------------------- chat columns


def _lists_in_texts(
    templates: dict[str, list[str]], source: Any, rows: DataRows, part: str, uploaded: dict[str, Dataset]
) -> Iterator[FieldError]:
    """For each column in a text template, the first row where it holds a list: the model would read its JSON."""
    dataset = uploaded.get(source.id) if isinstance(source, DatasetSource) else None
    for pointer, columns in templates.items():
        for column in dict.fromkeys(columns) if pointer.startswith(TEXTS) else ():
            if dataset is not None and "array" not in dataset.columns[column]["types"]:
                continue
            index = next((index for index, row in enumerate(rows) if isinstance(row[column], list)), None)
            if index is not None:
                detail = (
                    f"column {column!r} of row {rows.number(index)} of data.{part} holds a list, which a text cannot show; "
                )
                is_chat = what_is_no_chat(rows[index][column]) is None
                detail += f"a list of messages is given as `data.chat: {column}`" if is_chat else "write it as text in the row"
                yield FieldError(pointer, detail, "list_in_text", column)


def _bad_chats(spec: RLSpec | SupervisedSpec, rows: DataRows, part: str) -> Iterator[FieldError]:
    """The first row whose chat column is not a list of messages that fits the job, and the first whose tools are invalid."""
    data = spec.data
    if isinstance(column := data.chat, str):
        learns = isinstance(spec, SupervisedSpec)
        for index, row in enumerate(rows):
            if (what := what_is_no_chat(row[column]) or _what_does_not_fit(spec, row[column], learns)) is not None:
                detail = f"column {column!r} of row {rows.number(index)} of data.{part} {what}"
                yield FieldError("/data/chat", detail, "not_a_chat", column)
                break
    if isinstance(column := data.tools, str):
        for index, row in enumerate(rows):
            tools = row.get(column)
            if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
                detail = f"column {column!r} of row {rows.number(index)} of data.{part} must be a list of JSON schemas, or null"
                yield FieldError("/data/tools", detail, "not_tools", column)
                break


def _unknown_tools(column: Any, data: Data) -> Iterator[FieldError]:
    """An error if every row lacks the column of tools. If only some lack it, those rows have no tools."""
    parts = [data.train] if data.eval is None else [data.train, data.eval]
    if isinstance(column, str) and not any(column in row for rows in parts for row in rows):
        columns = sorted({name for rows in parts for row in rows for name in row})
        yield _absent("/data/tools", column, _Gap(0), "train", columns, len(data.train))


def what_is_no_chat(value: Any) -> str | None:
    """Why the value is not a list of messages in OpenAI's form; None if it is one."""
    if not isinstance(value, list) or not value:
        return f'is no chat; it must be a list of {{"role": {" | ".join(ROLES)}, "content": text}}, and not empty'
    for number, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f'is no chat: message {number} must be an object with a "role" that is one of {", ".join(ROLES)}'
        content, calls = message.get("content"), message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            return f"is no chat: tool_calls of message {number} must be a list of objects"
        if isinstance(content, list) and not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
        ):
            return f"holds content of another kind than text in message {number}; only text is taken"
        if not isinstance(content, str | list) and not (content is None and calls and message["role"] == "assistant"):
            return f"is no chat: content of message {number} must be a text"
    return None


def _what_does_not_fit(spec: RLSpec | SupervisedSpec, messages: list[dict[str, Any]], learns: bool) -> str | None:
    """Why this job cannot use the chat; None if it can."""
    ends = messages[-1]["role"] == "assistant"
    if learns and spec.data.answer is not None and ends:
        return "ends with an assistant's turn, and data.answer is given too: leave out data.answer to learn that turn"
    if len(messages) == 1 and ends:
        return "is an answer to nothing: an assistant's turn needs a message before it"
    if not learns or spec.data.answer is not None:
        return None
    if spec.data.learn == "last" and not ends:
        return "does not end with an assistant's turn to learn; end it with one, or give data.answer, or data.learn: all"
    if all(message["role"] != "assistant" for message in messages[1:]):
        return "holds no assistant's turn to learn"
    return None


# ---------------------------------------------------------------- the tiny model


@dataclass
class _Room:
    """How many tokens fit, and which limits set this."""

    prompt: int
    sequence: int
    why: str
    answers: bool = False  # whether the rows' answers are read too
    cuts: bool = False  # whether prompts that are too long are cut


def _unreadable(spec: RLSpec | SupervisedSpec, data: Data, rows: DataRows, part: str) -> Iterator[FieldError]:
    """Errors for the tiny model, where a character is a token: unknown characters, and texts longer than its context."""
    if spec.model.source != "tiny" or spec.model.tiny is None:
        return
    if spec.data.chat is not None:
        yield FieldError("/data/chat", "the tiny model has no chat template; use data.prompt", "no_chat_template")
        return
    room = _room(spec, spec.model.tiny.context, part)
    reported: set[str] = set()
    skipped = 0
    for index, row in enumerate(rows):
        for error in _row_errors(data, row, rows.number(index), part, room):
            if error.code in TOO_LONG and spec.data.overlong == "skip":
                skipped += 1
            elif error.pointer + error.code not in reported:
                reported.add(error.pointer + error.code)
                yield error
    if skipped == len(rows):
        detail = f"data.overlong is skip, and every row of data.{part} ({counted(skipped, 'row')}) is too long ({room.why})"
        yield FieldError("/data/overlong", detail, "all_rows_overlong", "skip")


def without_overlong(spec: RLSpec | SupervisedSpec, data: Data) -> tuple[Data, list[str]]:
    """For the tiny model: the rows that the job takes of these, without those that are too long if data.overlong is skip; and a
    warning for each split in which rows are too long and data.overlong says what becomes of them."""
    if spec.model.tiny is None or spec.data.overlong == "refuse":
        return data, []
    skips = spec.data.overlong == "skip"
    done = "is left out" if skips else "loses the oldest tokens of its prompt"
    kept: dict[str, DataRows] = {}
    warnings: list[str] = []
    for part, rows in (("train", data.train), ("eval", data.eval)):
        room = _room(spec, spec.model.tiny.context, part)
        found = [index for index, row in enumerate(rows or ()) if _is_too_long(data, row, room)]
        if rows is None or not found:
            continue
        which = f"for example row {rows.number(found[0])}: each {done}"
        warnings.append(
            f"data.overlong: {len(found)} of {counted(len(rows), 'row')} of data.{part} too long ({room.why}), {which}"
        )
        if skips:
            left_out = set(found)
            kept[part] = Subset(rows, [index for index in range(len(rows)) if index not in left_out])
    return replace(data, **kept), warnings


def _room(spec: RLSpec | SupervisedSpec, context: int, part: str) -> _Room:
    answers = 0
    if part == "eval" and spec.reward is not None:
        answers = spec.eval.max_completion_tokens or 0
    elif isinstance(spec, RLSpec):
        answers = spec.rollout.max_completion_tokens
    asked = spec.rollout.max_prompt_tokens if isinstance(spec, RLSpec) else None
    why = f"context {context}, answers of up to {counted(answers, 'token')}" if answers else f"context {context}"
    why += f", rollout.max_prompt_tokens {asked}" if asked is not None else ""
    reads = isinstance(spec, SupervisedSpec) or (part == "eval" and spec.data.answer is not None)
    return _Room(min(context - answers, asked or context), context, why, reads, cuts=spec.data.overlong == "truncate_left")


def _is_too_long(data: Data, row: Row, room: _Room) -> bool:
    return any(error.code in TOO_LONG for error in _row_errors(data, row, 0, "", replace(room, cuts=False)))


def _row_errors(data: Data, row: Row, number: int, part: str, room: _Room) -> Iterator[FieldError]:
    prompt = data.prompt(row)
    assert isinstance(prompt, str)
    answer = data.answer(row) if room.answers else None
    where = f"of row {number} of data.{part}"
    for name, text in (("prompt", prompt), ("answer", answer or "")):
        if strange := strange_characters(text):
            detail = f"the {name} {where} holds {strange[0]!r}; the tiny model can read {TINY_CHARACTERS!r}"
            yield FieldError(f"/data/{name}", detail, "unknown_character", strange[0])
    if not prompt or (
        0 < room.prompt < len(prompt) and not room.cuts
    ):  # if no room is left at all, that is reported as an error of the context
        detail = f"the prompt {where} has {counted(len(prompt), 'token')}; allowed are 1 to {room.prompt} ({room.why})"
        yield FieldError("/data/prompt", detail, "prompt_too_long" if prompt else "prompt_empty", len(prompt), room.prompt)
    elif answer is not None and (1 if room.cuts else len(prompt)) + len(answer) + 1 > room.sequence:
        tokens = len(prompt) + len(answer) + 1
        detail = f"prompt, answer and end token {where} have {tokens} tokens; the context holds {room.sequence}"
        yield FieldError("/data/answer", detail, "sequence_too_long", tokens, room.sequence)
