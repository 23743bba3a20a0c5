"""Checks the references of `number` graders before a job is queued. An unreadable one would give no reward, or a wrong one."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from service.errors import FieldError
from service.jobs.data import Data, DataRows, given_rows
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.maths.reading import reference
from service.spec.maths.values import Atom, Listing, Value
from service.spec.reward import NumberGrader
from service.spec.templates import render

READ_WITHIN_S = 5.0  # of an API thread; the worker reads the remaining rows
MAX_FORMULAS = 200


@dataclass(frozen=True)
class Formula:
    """A reference with a formula that only sympy can read, and its place."""

    pointer: str
    where: str
    text: str
    percent: str


def check_references(spec: RLSpec | SupervisedSpec, data: Data) -> tuple[list[FieldError], list[Formula]]:
    """Errors, at most one per grader and part of the data; and the first formulas, which the sandbox must read."""
    errors: list[FieldError] = []
    formulas: dict[tuple[str, str], Formula] = {}
    until = monotonic() + READ_WITHIN_S
    for number, grader in enumerate(spec.reward.graders if spec.reward else []):
        if not isinstance(grader, NumberGrader):
            continue
        pointer = f"/reward/graders/{number}/reference"
        for part, rows in given_rows(spec.data, data):
            if part == "train" and not isinstance(spec, RLSpec):
                continue  # no answers are sampled for these
            first: FieldError | None = None
            bad = 0
            for where, text in _references(grader, rows, part):
                if monotonic() > until:
                    break
                try:
                    read = reference(text, grader.percent)
                except ValueError as error:
                    bad += 1
                    first = first or FieldError(pointer, f"{where}: {error}", "reference_unreadable", text[:200])
                    continue
                asked = text, grader.percent
                if len(formulas) < MAX_FORMULAS and asked not in formulas and not _is_plain(read):
                    formulas[asked] = Formula(pointer, where, *asked)
            if first is not None:
                others = f" ({bad - 1} further rows have such references)" if bad > 1 else ""
                errors.append(FieldError(pointer, first.detail + others, first.code, first.got))
    return errors, list(formulas.values())


def _references(grader: NumberGrader, rows: DataRows, part: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for index, row in enumerate(rows):
        text = render(grader.reference, row)
        if text not in seen:
            seen.add(text)
            yield f"row {rows.number(index)} of data.{part}", text


def _is_plain(read: Value) -> bool:
    """Whether it can be read without algebra."""
    if isinstance(read, Listing):
        return all(map(_is_plain, read.items))
    return not isinstance(read, Atom) or read.numeral is not None or read.base is not None
