"""What `ratchet validate` prints of a dry run: facts, warnings, sample rows, and what each grader pays for which answer."""

from collections.abc import Iterator
from typing import Any

from ratchet_client.types import Validation
from service.cli.output import clean, complain, json_text, one_line, print_facts, print_table, say, shown

SAMPLED = ("completions", "sampled_tokens_at_most")  # a supervised job without graders samples nothing
REFERENCE = {"kind": "right", "made": "the reference"}


def print_validation(validation: Validation) -> None:
    say("the spec is valid; nothing was created")
    spec, estimates = validation["spec"], validation["estimates"]
    print_facts(
        {
            "kind": spec.get("kind"),
            "model": spec.get("model", {}).get("source") or spec.get("model", {}).get("from_checkpoint"),
            "objective": spec.get("objective", {}).get("preset"),
            **{name.replace("_", " "): value for name, value in estimates.items() if value or name not in SAMPLED},
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
        learns = spec.get("kind") == "supervised"
        columns = ("row", "prompt", *(["learns"] if learns else []), *(["reference"] if graded or not learns else []))
        columns += ("reward",) if graded else ()
        print_table(columns, [_sample(row, sample, columns) for row, sample in enumerate(samples)], nothing="")
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


def _sample(row: int, sample: dict[str, Any], columns: tuple[str, ...]) -> list[object]:
    cells = {
        "row": row,
        "prompt": one_line(_prompt(sample["prompt"])),
        "learns": one_line(" … ".join(sample.get("learns") or []), 40),
        "reference": one_line(shown(sample["reference"]), 30),
        "reward": shown((sample["graded"] or {}).get("total")),
    }
    return [cells[column] for column in columns]


def _prompt(prompt: str | list[dict[str, Any]]) -> str:
    """A chat as its roles and contents, with the keys beside them as JSON."""
    if isinstance(prompt, str):
        return prompt
    return "  ".join(f"{message['role']}: {_content(message)}" for message in prompt)


def _content(message: dict[str, Any]) -> str:
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return " ".join(filter(None, (message.get("content"), json_text(rest) if rest else "")))


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
