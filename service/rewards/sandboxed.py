"""Graders whose scorers run in the sandbox. This side only makes the requests."""

from collections.abc import Callable, Sequence
from typing import Any

from service.rewards.samples import Grader, GraderContext, Outcome, Sample
from service.rewards.sandbox import Sandbox
from service.spec.reward import JsonSchemaGrader, NumberGrader, ReasoningGymGrader, SimilarityGrader
from service.spec.templates import render


class Sandboxed(Grader):
    """Sends each sample to a child process, one by one."""

    def __init__(self, sandbox: Sandbox, request: Callable[[Sample], tuple[Any, ...]]) -> None:
        self._sandbox, self._request = sandbox, request

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        return self._sandbox.ask_all([self._request(sample) for sample in samples])

    def close(self) -> None:
        self._sandbox.close()


def number(spec: NumberGrader, context: GraderContext) -> Grader:
    options = {"tolerance": spec.tolerance, "units": spec.units, "percent": spec.percent}
    sandbox = Sandbox("number", options, context.pointer)

    def request(sample: Sample) -> tuple[Any, ...]:
        # A match of `extract` is complete: it ignores a match at the end of an answer that was cut off.
        return sample.completion, render(spec.reference, sample.row), sample.truncated and spec.extract is None

    return Sandboxed(sandbox, request)


def similarity(spec: SimilarityGrader, context: GraderContext) -> Grader:
    return _compare(Sandbox("similarity", {"metric": spec.metric}, context.pointer), spec.reference)


def json_schema(spec: JsonSchemaGrader, context: GraderContext) -> Grader:
    return Sandboxed(Sandbox("json_schema", {"schema": spec.json_schema}, context.pointer), lambda sample: (sample.completion,))


def reasoning_gym(spec: ReasoningGymGrader, context: GraderContext) -> Grader:
    return Sandboxed(
        Sandbox("reasoning_gym", {"strict": spec.strict}, context.pointer), lambda sample: (sample.completion, sample.row)
    )


def _compare(sandbox: Sandbox, reference: str) -> Grader:
    return Sandboxed(sandbox, lambda sample: (sample.completion, render(reference, sample.row)))
