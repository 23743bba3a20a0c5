"""What runs inside the sandbox's child: for each kind a factory (which imports what it needs) of a scoring function."""

import json
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

READ_CHARACTERS = 4096  # the end of an answer, where its result stands


def number() -> Callable[[str, str], float]:
    """1 if the answer's last number or formula equals the reference's."""
    from math_verify import parse, verify

    logging.disable()  # math-verify warns that somebody else must keep the time: the sandbox does

    @lru_cache(maxsize=4096)  # a group's answers repeat, and they share the reference
    def read(text: str) -> list[Any]:
        # LaTeX outside of math mode would be read as the numbers that stand in it.
        bare = "\\" in text and not any(sign in text for sign in ("$", "\\(", "\\[", "\\boxed", "\\begin"))
        return (parse(f"${text}$", parsing_timeout=0) if bare else []) or parse(text, parsing_timeout=0)

    @lru_cache(maxsize=4096)
    def score(answer: str, reference: str) -> float:
        expected = read(reference)
        if not expected:
            raise ValueError(f"the reference {reference[:80]!r} holds no number or formula")
        return float(verify(expected, read(answer[-READ_CHARACTERS:]), timeout_seconds=0))

    return score


def json_schema(schema: dict[str, Any]) -> Callable[[str], float]:
    """1 if the answer is JSON that fits the schema."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    validator = validator_for(schema)(schema, registry=Registry())  # an empty registry: nothing is ever fetched

    def score(answer: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return score


def similarity(metric: str) -> Callable[[str, str], float]:
    """rapidfuzz's measures, scaled to 0 to 1."""
    from rapidfuzz import fuzz
    from rapidfuzz.distance import JaroWinkler

    if metric == "jaro_winkler":
        return JaroWinkler.similarity
    measure = getattr(fuzz, metric)
    return lambda answer, reference: measure(answer, reference) / 100


def reasoning_gym() -> Callable[[str, dict[str, Any]], float]:
    """The scorer of the task that the row's metadata names."""
    from reasoning_gym.factory import get_score_answer_fn

    @cache
    def scorer(task: str) -> Any:
        return get_score_answer_fn(task)

    def score(answer: str, row: dict[str, Any]) -> float:
        metadata = row.get("metadata")
        task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if task is None:
            raise ValueError("the row was not made by reasoning-gym: its metadata names no source_dataset")
        return scorer(task)(answer.strip(), row)

    return score


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


SCORERS: dict[str, Callable[..., Callable[..., float]]] = {
    "number": number,
    "json_schema": json_schema,
    "similarity": similarity,
    "reasoning_gym": reasoning_gym,
}
