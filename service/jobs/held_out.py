"""Whether held-out rows are held out: none of them may be a training row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from time import monotonic
from typing import Any

from service.errors import FieldError
from service.jobs.data import Data, DataRows, Row, Subset, given_rows
from service.spec.data import DataSpec, ReasoningGymSource, SplitSource
from service.validation.words import counted

ROWS_TOGETHER = {"acre", "gsm_symbolic", "list_functions"}
READ_WITHIN_S = 1.0  # of an API thread, for the rows of each part


@dataclass(frozen=True)
class _Made:
    """A task that a source makes rows of, and the numbers that they are made from."""

    task: str
    config: dict[str, Any]
    numbers: range

    def repeats(self, other: "_Made") -> bool:
        """Whether rows of the same task are made from the same numbers."""
        if self.task in ROWS_TOGETHER:
            return self.numbers.start == other.numbers.start
        return self.numbers.start < other.numbers.stop and other.numbers.start < self.numbers.stop


@dataclass(frozen=True)
class _Shared:
    """Rows that both sources make: what is wrong, which seeds data.eval may have, and whether the configs are alike too."""

    detail: str
    allowed: str
    alike: bool


def check_seeds(data: DataSpec) -> list[FieldError]:
    """An error if both sources make rows of one reasoning-gym task and config from the same numbers.

    In 102 of the 105 tasks of reasoning-gym 0.1.25, row i derives from seed + i alone: those of seed 1 are those of seed 0,
    moved by one. In the others all rows derive from the seed together.
    """
    shared = _shared(data)
    if shared is None or not shared.alike:
        return []
    assert isinstance(data.eval, ReasoningGymSource)
    return [FieldError("/data/eval/seed", shared.detail, "not_held_out", data.eval.seed, shared.allowed)]


def shared_seeds(data: DataSpec) -> Iterator[str]:
    """A warning if both make rows of one task from the same numbers, by other configs: with max_terms 7 for 6, 52 of the first
    60 rows of chain_sum are the same; with numbers of other sizes, none."""
    shared = _shared(data)
    if shared is not None and not shared.alike:
        yield f"data.eval may hold training rows, though its config is another: {shared.detail}"


def _shared(data: DataSpec) -> _Shared | None:
    train, held_out = data.train, data.eval
    if not isinstance(train, ReasoningGymSource) or not isinstance(held_out, ReasoningGymSource):
        return None
    whole = (train.task, train.config) == (held_out.task, held_out.config)
    pairs = [(a, b) for a in _made(train, whole) for b in _made(held_out, whole) if a.task == b.task]
    wrong = sorted((pair for pair in pairs if pair[0].repeats(pair[1])), key=lambda pair: pair[0].config != pair[1].config)
    if not wrong:
        return None
    learnt, measured = wrong[0]
    alike = learnt.config == measured.config
    must = "must" if alike else "should"
    if learnt.task in ROWS_TOGETHER:
        detail, allowed = f"both sources would make the same rows of {learnt.task}; eval.seed must be another", "another"
    else:
        # A part of a composite has seeds of its own, a little above the composite's.
        above = max(a.numbers.stop - (b.numbers.start - held_out.seed) for a, b in pairs)
        below = min(a.numbers.start - (b.numbers.stop - held_out.seed) for a, b in pairs)
        allowed = f"at least {above}" + (f", or at most {below}" if below >= 0 else "")
        common = min(learnt.numbers.stop, measured.numbers.stop) - max(learnt.numbers.start, measured.numbers.start)
        learnt_from = ("" if whole else "up to ") + counted(common, "row")
        detail = (
            f"row i of {learnt.task} is made from seed + i, so {learnt_from} of the {len(measured.numbers)} of data.eval would "
            f"be learnt from (seed {train.seed}, {counted(len(learnt.numbers), 'row')}); eval.seed {must} be {allowed}"
        )
    return _Shared(detail, allowed, alike)


def _made(source: ReasoningGymSource, whole: bool) -> list[_Made]:
    """The source's task, or unless `whole` the parts of a composite: the n-th (from 1) makes row i from seed + n + i."""
    count = min(source.size, source.max_rows or source.size)
    if whole or source.task != "composite":
        return [_Made(source.task, source.config, range(source.seed, source.seed + count))]
    starts = enumerate(source.config["datasets"], source.seed + 1)
    return [_Made(part["name"], part.get("config", {}), range(start, start + count)) for start, part in starts]


def copied_rows(spec: DataSpec, data: Data) -> Iterator[str]:
    """A warning if a split leaves out rows because they are the same as held-out ones."""
    if isinstance(spec.eval, SplitSource) and isinstance(data.train, Subset) and data.eval is not None:
        copies = len(data.train.whole) - len(data.train) - len(data.eval)
        if copies:
            are = "is" if copies == 1 else "are"
            yield f"{counted(copies, 'row')} {are} not trained on, the same as held-out ones (data.eval.copies)"


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
            f"{counted(len(rows), 'row')} of the {len(given['eval'])} of data.eval (for example row "
            f"{given['eval'].number(rows[0])}) {'has' if len(rows) == 1 else 'have'} prompt and answer "
            "of a training row: what is measured on them may be learnt by heart"
        )


def _in_time(rows: DataRows) -> Iterator[tuple[int, Row]]:
    until = monotonic() + READ_WITHIN_S
    return takewhile(lambda _: monotonic() < until, enumerate(rows))


def _known_by(data: Data, row: Row) -> int:
    return hash((repr(data.prompt(row)), data.answer(row)))
