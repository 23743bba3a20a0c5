"""What `ratchet validate` prints of a dry run: facts, warnings, sample rows, and what each grader pays for which answer."""

from collections.abc import Iterator
from typing import Any

from ratchet_client.types import Validation
from service.cli.output import clean, complain, one_line, print_facts, print_table, say, shown

REFERENCE = {"kind": "right", "made": "the reference"}


def print_validation(validation: Validation) -> None:
    say("the spec is valid; nothing was created")
    spec = validation["spec"]
    print_facts(
        {
            "kind": spec.get("kind"),
            "model": spec.get("model", {}).get("source") or spec.get("model", {}).get("from_checkpoint"),
            "objective": spec.get("objective", {}).get("preset"),
            **{name.replace("_", " "): value for name, value in validation["estimates"].items()},
            "spec sha256": validation["spec_sha256"],
            "data sha256": validation["data_sha256"],
        }
    )
    for warning in validation["warnings"]:
        complain(f"warning: {clean(warning)}")
    samples = validation["samples"]
    if samples:
        graded = any(sample["graded"] is not None for sample in samples)
        say("\nsample rows, graded as if the reference itself had been answered:" if graded else "\nsample rows:")
        columns = ("row", "prompt", "reference", *(["reward"] if graded else []))
        print_table(columns, [_sample(row, sample)[: len(columns)] for row, sample in enumerate(samples)], nothing="")
    graders = [grader["name"] for grader in (spec.get("reward") or {}).get("graders", [])]
    tried = [(row, answer) for row, sample in enumerate(samples) for answer in _tried(sample)]
    if tried:
        few = any(grader.get("kind") == "http" for grader in spec["reward"]["graders"])
        http = " (http graders are asked about the right answer and `I do not know` only)" if few else ""
        say(f"\nwhat each grader pays for right, near and wrong answers{http}:")
        columns = ("row", "answer", "is", "how it was made", *graders, "reward")
        print_table(columns, [_paid(row, answer, graders) for row, answer in tried], nothing="")
    errors = {(name, why): (row, answer) for row, answer in reversed(tried) for name, why in answer["errors"].items()}
    for (name, why), (row, answer) in reversed(errors.items()):
        complain(f"not graded: row {row}, answer {one_line(answer['answer'], 30)!r}, by {name}: {clean(why)}")


def _sample(row: int, sample: dict[str, Any]) -> tuple[int, str, str, str]:
    reward = (sample["graded"] or {}).get("total")
    return row, one_line(shown(sample["prompt"])), one_line(shown(sample["reference"]), 30), shown(reward)


def _tried(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers that were tried on a row, its reference first."""
    if sample["graded"] is not None:
        yield {**REFERENCE, "answer": sample["reference"], **sample["graded"]}
    yield from sorted(sample["probes"], key=lambda probe: ("right", "near", "wrong", "stand_in").index(probe["kind"]))


def _paid(row: int, answer: dict[str, Any], graders: list[str]) -> tuple[object, ...]:
    """A row of the table. A score is `error` if the grader failed, and empty, as is then the reward, if it was not asked."""
    scores = ["error" if name in answer["errors"] else answer["scores"].get(name, "") for name in graders]
    reward = "error" if "error" in scores else "" if "" in scores else answer["total"]
    text = one_line(answer["answer"], 30) or "(nothing)"
    return row, text, answer["kind"].replace("_", " "), answer["made"], *scores, reward
