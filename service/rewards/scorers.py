"""The code that runs in the sandbox's child: for each kind, a factory that imports what it needs and returns a scorer."""

import json
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, lru_cache, partial
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

READ_CHARACTERS = 4096  # from the end of an answer, where its result is


def number(tolerance: float, units: str, percent: str) -> Callable[[str, str, bool], float]:
    """1 if the answer's final number or formula equals the reference's. Raises ValueError for an unreadable reference."""
    from service.rewards.formulas import Comparison
    from service.spec.maths.reading import answers

    logging.disable()  # math-verify warns that it has no time limit; the sandbox has one
    comparison = Comparison(tolerance, units)

    read = lru_cache(maxsize=1024)(partial(read_reference, percent=percent))  # the answers of a group share the reference

    @lru_cache(maxsize=4096)
    def score(answer: str, reference: str, cut: bool) -> float:
        """`cut`: the token limit ended the answer, so its last number may be incomplete."""
        expected = read(reference)
        try:
            given = answers(end_of(answer), expected, cut=cut, percent=percent)
            return float(any(comparison.same(expected, final) for final in given))
        except Exception:  # an answer that algebra cannot handle is not the right one
            return 0.0

    return score


def reference() -> Callable[[str, str], float]:
    """1 for a reference that a `number` grader can read. Raises ValueError for others."""
    import_module("service.rewards.formulas")  # before the fence
    logging.disable()

    def score(text: str, percent: str) -> float:
        read_reference(text, percent)
        return 1.0

    return score


def text() -> Callable[[str, Any], float]:
    """1 for a `pattern` or a `schema` of a caller's that is one. Raises ValueError for others."""
    from service.spec.patterns import check_json_schema, check_pattern

    checks: dict[str, Callable[[Any], Any]] = {"pattern": check_pattern, "schema": check_json_schema}

    def score(kind: str, value: Any) -> float:
        checks[kind](value)
        return 1.0

    return score


def chat(folder: str) -> Callable[[list[dict[str, Any]], bool, dict[str, Any]], float]:
    """1 for messages that the chat template in the folder takes. Raises ChatRefused with its words if it refuses them."""
    from service.rewards.chat_template import ChatTemplate

    template = ChatTemplate(Path(folder))

    def score(messages: list[dict[str, Any]], opened: bool, options: dict[str, Any]) -> float:
        template.check(messages, opened, options)
        return 1.0

    return score


def read_reference(text: str, percent: str) -> Any:
    """The value of a reference. Raises ValueError if it has none, or if sympy cannot read its formula."""
    from service.rewards.formulas import unreadable
    from service.spec.maths import reading

    expected = reading.reference(text, percent)
    if (formula := unreadable(expected)) is not None:
        raise ValueError(
            f"the reference {text[:80]!r} holds no formula that can be read: {formula[:80]!r}; allowed are {reading.ALLOWED}"
        )
    return expected


def end_of(answer: str) -> str:
    """The last READ_CHARACTERS, without an incomplete word or number at their start."""
    if len(answer) <= READ_CHARACTERS:
        return answer
    _, _, whole = answer[-READ_CHARACTERS - 1 :].partition(" ")
    return whole


def json_schema(schema: dict[str, Any]) -> Callable[[str], float]:
    """1 if the answer is JSON that fits the schema."""
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    from service.spec.schemas import ending_at_the_end

    # An empty registry: nothing is ever fetched.
    validator = extend(validator_for(schema), {"multipleOf": _multiple_of})(ending_at_the_end(schema), registry=Registry())

    def score(answer: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse_constant, parse_float=_finite)
            return float(validator.is_valid(value))
        except Exception:  # not JSON, or JSON that the validator cannot handle, for example nested too deeply
            return 0.0

    return score


def similarity(metric: str) -> Callable[[str, str], float]:
    """rapidfuzz's measures, scaled to 0 to 1."""
    from rapidfuzz import fuzz
    from rapidfuzz.distance import JaroWinkler

    measure = JaroWinkler.similarity if metric == "jaro_winkler" else getattr(fuzz, metric)
    whole = 1 if metric == "jaro_winkler" else 100
    # Equal texts score 1, even if rapidfuzz finds no words to compare (token_set_ratio of two empty texts is 0).
    parts = str.split if metric.startswith("token_") else str
    return lambda answer, reference: 1.0 if parts(answer) == parts(reference) else measure(answer, reference) / whole


def reasoning_gym(strict: bool) -> Callable[[str, dict[str, Any]], float]:
    """The scorer (0 to 1) of the task that the row's metadata names, with the configuration that made the row."""
    import_module("reasoning_gym")  # before the fence, whose limits also apply to imports
    from service.jobs.gym import open_task

    @cache
    def scorer(task: str, config: str) -> Any:
        return open_task(task, json.loads(config)).score_answer

    def score(answer: str, row: dict[str, Any]) -> float:
        metadata = row.get("metadata")
        if not isinstance(metadata, dict) or (task := metadata.get("source_dataset")) is None:
            raise ValueError("the row was not made by reasoning-gym: its metadata names no source_dataset")
        answer = answer.strip()
        if strict:
            if row.get("answer") is None:
                raise ValueError(f"strict compares with the task's own answer, and {task} gives none")
            return float(answer == str(row["answer"]).strip())
        scored = scorer(task, json.dumps(metadata.get("source_config", {}), sort_keys=True))
        try:
            value = float(scored(answer, row))
        except BaseException:  # scorers raise on unreadable texts, and an evaluated answer may raise SystemExit
            return 0.0
        return min(max(value, 0.0), 1.0) if value == value else 0.0  # spell_backward can give more than 1

    return score


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _multiple_of(validator: Any, factor: float, value: Any, schema: Any) -> Iterator[Any]:
    """The decimals as they are written: jsonschema divides doubles, in which 19.99 is no multiple of 0.01."""
    from jsonschema import ValidationError

    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(factor)):
        yield ValidationError(f"{value} is not a multiple of {factor}")


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


SCORERS: dict[str, Callable[..., Callable[..., float]]] = {
    "number": number,
    "reference": reference,
    "text": text,
    "chat": chat,
    "json_schema": json_schema,
    "similarity": similarity,
    "reasoning_gym": reasoning_gym,
}
