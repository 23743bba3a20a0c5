"""Probes: answers that a dry run tries on the graders. Right ones, near misses and wrong ones, made from a row's reference."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from service.spec.maths.numerals import numeral
from service.spec.maths.signs import plain
from service.spec.maths.units import is_unit
from service.spec.reward import GraderBase, NumberGrader, ReasoningGymGrader
from service.spec.templates import render

STAND_IN = "This is a stand-in answer."
NO_ANSWER = "I do not know"
MAX_NEAR = 4
DIGIT, SIGN, UNIT, PERCENT, LONGER, SHORTER = (
    "another last digit", "the other sign", "another unit", "without the sign of percent", "one digit more", "one digit less",
)  # fmt: skip
Kind = Literal["right", "near", "wrong", "stand_in"]


@dataclass(frozen=True)
class Probe:
    """An answer to try. `made` says how it was made from `reference`."""

    kind: Kind
    answer: str
    made: str
    reference: str | None = None


def probes(reference: str, *, boxed: bool, others: Sequence[str]) -> list[Probe]:
    """The answers to try, apart from the reference itself. `others` are the references of other rows."""
    made = [Probe("right", rf"\boxed{{{reference}}}", "the reference in a box", reference)] if boxed else []
    near = dict.fromkeys(_near(reference))
    made += [Probe("near", answer, how, reference) for answer, how in list(near)[:MAX_NEAR] if _differs(answer, reference)]
    wrong = [
        ("", "nothing"),
        (NO_ANSWER, "no answer"),
        ("0", "a constant"),
        *((other, "another row's") for other in others[:1]),
    ]
    return made + [Probe("wrong", answer, how, reference) for answer, how in wrong if _differs(answer, reference)]


def _differs(answer: str, reference: str) -> bool:
    """Whether the answer is really different. 0 and 0.0 are different texts, but the same number."""
    one, other = numeral(plain(answer)), numeral(plain(reference))
    return answer.strip() != reference.strip() and (one is None or other is None or one.value != other.value)


def _near(reference: str) -> Iterator[tuple[str, str]]:
    text = reference.strip()
    number = re.search(r"\d+(?:[.,]\d+)*", text)
    if number is not None:
        end = number.end()
        changed = str((int(text[end - 1]) + 1) % 10) if text[end - 1].isascii() else "1"
        yield text[: end - 1] + changed + text[end:], DIGIT
    if (match := re.fullmatch(r"(.*\d)\s+([A-Za-z]+)", text)) and is_unit(match[2]):
        yield f"{match[1]} {'kg' if match[2] != 'kg' else 'm'}", UNIT
    if match := re.fullmatch(r"(.*\d)\s*\\?%", text):
        yield match[1], PERCENT
    if match := re.fullmatch(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])", text):
        yield f"{match[1]}{match[3].strip()}, {match[2].strip()}{match[4]}", "the other way round"
        yield f"{'[' if match[1] == '(' else '('}{match[2]},{match[3]}{match[4]}", "another bracket"
    if numeral(plain(text)) is not None:
        yield (text[1:] if text[0] == "-" else f"-{text}"), SIGN
        if number is not None and number[0] == text.lstrip("-") and number[0].isdigit():
            yield f"{text}1", LONGER
            if len(number[0]) > 1:
                yield text[:-1], SHORTER
    elif number is None and re.search(r"[^\W\d_]", text):
        last = max(i for i, sign in enumerate(text) if sign.isalpha())
        yield text[:last] + ("b" if text[last].lower() == "a" else "a") + text[last + 1 :], "another last letter"


def expected_of(grader: GraderBase, row: dict[str, object]) -> str | None:
    """The answer that the grader treats as right in this row, if it has one."""
    if isinstance(grader, ReasoningGymGrader):
        answer = row.get("answer")
        return answer if isinstance(answer, str) else None
    template = getattr(grader, "reference", None)
    return None if template is None else render(template, row)


def wanted(grader: GraderBase, probe: Probe) -> bool:
    """Whether an option of the grader makes this near miss count as right."""
    if not isinstance(grader, NumberGrader):
        return False
    return (
        (probe.made == UNIT and grader.units == "ignored")
        or (probe.made == PERCENT and grader.percent == "sign")
        or (grader.tolerance > 0 and probe.made == DIGIT)
    )
