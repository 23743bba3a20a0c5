"""The reward of a job: each grader's scores, and their weighted sum."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr

from service.rewards import sandboxed, text
from service.rewards.samples import Graded, Grader, GraderContext, NotGraded, Outcome, Sample, one_by_one
from service.spec.addresses import Networks
from service.spec.reward import GraderBase, RewardSpec
from service.spec.section import MOST


def _similarity(spec: Any, context: GraderContext) -> Grader:
    return text.EachText(text.position, spec, context) if spec.metric == "position" else sandboxed.similarity(spec, context)


def _http(spec: Any, context: GraderContext) -> Grader:
    from service.rewards.http import HttpRewards  # it takes a third of the time to start of a process that only grades

    return HttpRewards(spec, context)


GRADERS: dict[str, Callable[[Any, GraderContext], Grader]] = {
    "exact": partial(text.EachText, text.exact),
    "contains": partial(text.EachText, text.contains),
    "regex": partial(text.EachText, text.pattern),
    "length": partial(text.EachText, text.length),
    "similarity": _similarity,
    "number": sandboxed.number,
    "json_schema": sandboxed.json_schema,
    "reasoning_gym": sandboxed.reasoning_gym,
    "http": _http,
}


class Rewards:
    """The graders of one job. Not for use by several threads at once."""

    def __init__(self, spec: RewardSpec, *, job_id: str, secrets: Mapping[str, SecretStr], networks: Networks = ()) -> None:
        """Starts and connects nothing yet. For http graders: `secrets` are the operator's, by name, for signatures; `networks`
        are those that they may reach in addition to public addresses."""
        self._specs = {grader.name or grader.kind: grader for grader in spec.graders}
        self._graders = {
            name: GRADERS[grader.kind](grader, GraderContext(job_id, name, f"/reward/graders/{number}", secrets, networks))
            for number, (name, grader) in enumerate(self._specs.items())
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def grade(self, samples: Sequence[Sample], *, only: Collection[str] | None = None) -> list[Graded]:
        """One Graded per sample, in order, by all graders or `only` these. A sample that cannot be graded has its errors.

        Raises JobFailed only if a grader cannot work at all (its service is down, its package is missing)."""
        asked = self._graders if only is None else {name: self._graders[name] for name in only}
        outcomes = {name: self._outcomes(self._specs[name], grader, samples) for name, grader in asked.items()}
        return [self._graded({name: column[i] for name, column in outcomes.items()}) for i in range(len(samples))]

    def close(self) -> None:
        for grader in self._graders.values():
            grader.close()

    def _outcomes(self, spec: GraderBase, grader: Grader, samples: Sequence[Sample]) -> list[Outcome]:
        """Grade the part of each answer that `extract` finds. An answer in which it finds nothing gets 0."""
        if spec.extract is None:
            return [_finite(outcome) for outcome in grader.grade(samples)]
        pattern = spec.extract
        parts = one_by_one(lambda sample: text.extract(pattern, sample.completion, cut=sample.truncated), samples)
        outcomes: list[Outcome] = [part if isinstance(part, NotGraded) else 0.0 for part in parts]
        places = [i for i, part in enumerate(parts) if isinstance(part, str)]
        left = [replace(sample, completion=part) for sample, part in zip(samples, parts, strict=True) if isinstance(part, str)]
        for i, outcome in zip(places, grader.grade(left), strict=True):
            outcomes[i] = _finite(outcome)
        return outcomes

    def _graded(self, outcomes: dict[str, Outcome]) -> Graded:
        scores: dict[str, float | None] = {
            name: None if isinstance(outcome, NotGraded) else outcome for name, outcome in outcomes.items()
        }
        errors = {name: outcome.detail for name, outcome in outcomes.items() if isinstance(outcome, NotGraded)}
        total = None if errors else sum(self._specs[name].weight * score for name, score in scores.items() if score is not None)
        return Graded(total, scores, errors)


def _finite(outcome: Outcome) -> Outcome:
    if isinstance(outcome, float) and not math.isfinite(outcome):
        return NotGraded(f"the score is {outcome}, not a finite number")
    if isinstance(outcome, float) and abs(outcome) > MOST:
        return NotGraded(f"the score is {outcome:g}; it must lie between {-MOST:g} and {MOST:g}")
    return outcome
