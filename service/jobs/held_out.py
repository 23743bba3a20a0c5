"""Whether held-out rows are held out: none of them may be a training row."""

from collections.abc import Iterator
from itertools import takewhile
from time import monotonic

from service.errors import FieldError
from service.jobs.data import Data, DataRows, Row, given_rows
from service.spec.data import DataSpec, ReasoningGymSource

ROWS_TOGETHER = {"acre", "gsm_symbolic", "list_functions"}
READ_WITHIN_S = 1.0  # of an API thread, for the rows of each part


def check_seeds(data: DataSpec) -> list[FieldError]:
    """An error if both sources make rows of one reasoning-gym task from the same numbers.

    In 102 of the 105 tasks of reasoning-gym 0.1.25, row i derives from seed + i alone: those of seed 1 are those of seed 0,
    moved by one. In the others all rows derive from the seed together.
    """
    train, held_out = data.train, data.eval
    if not isinstance(train, ReasoningGymSource) or not isinstance(held_out, ReasoningGymSource):
        return []
    rows, others = _rows(train), _rows(held_out)
    if (train.task, train.config) != (held_out.task, held_out.config) or rows.stop <= others.start or others.stop <= rows.start:
        return []
    if train.task in ROWS_TOGETHER:
        if train.seed != held_out.seed:
            return []
        detail, allowed = f"both sources would make the same rows of {train.task}; eval.seed must be another", "another"
    else:
        allowed = f"at least {rows.stop}"
        allowed += f", or at most {train.seed - len(others)}" if train.seed >= len(others) else ""
        common = min(rows.stop, others.stop) - max(rows.start, others.start)
        detail = (
            f"row i of {train.task} is made from seed + i, so {common} of the {len(others)} rows of data.eval would be "
            f"training rows (seed {train.seed}, {len(rows)} rows); eval.seed must be {allowed}"
        )
    return [FieldError("/data/eval/seed", detail, "not_held_out", held_out.seed, allowed)]


def _rows(source: ReasoningGymSource) -> range:
    return range(source.seed, source.seed + min(source.size, source.max_rows or source.size))


def learnt_rows(spec: DataSpec, data: Data) -> Iterator[str]:
    """A warning if rows of data.eval have the prompt and the answer of a training row. Procedural rows are not made here, and
    rows that READ_WITHIN_S leaves no time for are not looked at."""
    given = dict(given_rows(spec, data))
    if len(given) < 2:
        return
    held_out: dict[int, list[int]] = {}
    for index, row in _in_time(given["eval"]):
        held_out.setdefault(_known_by(data, row), []).append(index)
    learnt = {key for _, row in _in_time(given["train"]) if (key := _known_by(data, row)) in held_out}
    if learnt:
        rows = sorted(index for key in learnt for index in held_out[key])
        yield (
            f"{len(rows)} of the {len(given['eval'])} rows of data.eval (for example row {given['eval'].number(rows[0])}) have "
            "prompt and answer of a training row: what is measured on them may be learnt by heart"
        )


def _in_time(rows: DataRows) -> Iterator[tuple[int, Row]]:
    until = monotonic() + READ_WITHIN_S
    return takewhile(lambda _: monotonic() < until, enumerate(rows))


def _known_by(data: Data, row: Row) -> int:
    return hash((repr(data.prompt(row)), data.answer(row)))
