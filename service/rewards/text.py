"""Graders that only read the text. They are cheap and bounded, so they need no child process."""

from collections.abc import Callable, Sequence
from typing import Any

import regex

from service.rewards.samples import Grader, GraderContext, NotGraded, Outcome, Sample, one_by_one
from service.spec.reward import ContainsGrader, ExactGrader, LengthGrader, RegexGrader, SimilarityGrader
from service.spec.templates import render

PATTERN_WITHIN_S = 1.0
NUMBER_AT_END = regex.compile(r"\d(?:[.,/:]|[eE][+-]?)?\Z")  # 42, and 42. of 42.5, 4e- of 4e-5


def exact(spec: ExactGrader, sample: Sample) -> float:
    answer, reference = sample.completion, render(spec.reference, sample.row)
    if spec.strip:
        answer, reference = answer.strip(), reference.strip()
    return float(answer == reference if spec.case_sensitive else answer.casefold() == reference.casefold())


def contains(spec: ContainsGrader, sample: Sample) -> Outcome:
    answer, reference = sample.completion, render(spec.reference, sample.row)
    if not reference:
        return NotGraded("the reference is empty, and every answer contains that")
    return float(reference in answer if spec.case_sensitive else reference.casefold() in answer.casefold())


def pattern(spec: RegexGrader, sample: Sample) -> Outcome:
    match = regex.fullmatch if spec.full else regex.search
    try:
        return float(match(spec.pattern, sample.completion, timeout=PATTERN_WITHIN_S) is not None)
    except TimeoutError:
        return _too_slow(spec.pattern)


def length(spec: LengthGrader, sample: Sample) -> float:
    """1 inside the bounds, 0 from `slack` tokens outside, linear in between."""
    outside = max(spec.min_tokens - sample.tokens, sample.tokens - spec.max_tokens, 0)
    return max(0.0, 1 - outside / spec.slack) if spec.slack else float(outside == 0)


def position(spec: SimilarityGrader, sample: Sample) -> float:
    """The share of characters that are right at their position. Missing and extra characters count as wrong."""
    answer, reference = sample.completion, render(spec.reference, sample.row)
    right = sum(a == b for a, b in zip(answer, reference, strict=False))
    return right / max(len(answer), len(reference)) if answer or reference else 1.0


class EachText(Grader):
    """Applies one of the functions above to each sample."""

    def __init__(self, score: Callable[[Any, Sample], Outcome], spec: Any, context: GraderContext) -> None:
        self._score, self._spec = score, spec

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        return one_by_one(lambda sample: self._score(self._spec, sample), samples)


def extract(pattern: str, answer: str, *, cut: bool = False) -> str | NotGraded | None:
    """The last match of the pattern that is not empty; if the pattern has groups, the first group that took part in it.

    None without a match. With `cut` (the token limit ended the answer) also None if the match is a number that may be
    incomplete."""
    last = None
    try:
        for match in regex.finditer(pattern, answer, timeout=PATTERN_WITHIN_S):
            if last is None or match.group():
                last = match
    except TimeoutError:
        return _too_slow(pattern)
    if last is None:
        return None
    group = next((number for number, part in enumerate(last.groups(), 1) if part is not None), None) if last.re.groups else 0
    if group is None:
        return None
    text = last.group(group)
    return None if cut and last.end(group) == len(answer) and NUMBER_AT_END.search(text) else text


def _too_slow(pattern: str) -> NotGraded:
    return NotGraded(f"the pattern {pattern[:80]!r} took longer than {PATTERN_WITHIN_S:g} s on this answer")
