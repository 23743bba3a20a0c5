"""Grading in a process of its own: the same grades, within a time, and nothing compiled here."""

from pathlib import Path
from time import monotonic

import pytest
import regex

from service.errors import JobFailed
from service.rewards import apart
from service.rewards.apart import GradedApart
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.spec.reward import RewardSpec
from service.validation import parse


def reward(*graders: dict[str, object]) -> RewardSpec:
    return parse(RewardSpec, {"graders": list(graders)})


def answers(*texts: str) -> list[Sample]:
    row = {"answer": "12"}
    return [Sample("?", text, 3, False, row) for text in texts]


def test_grades_are_those_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = reward(
        {"kind": "exact", "reference": "{answer}", "extract": r"\d+"},
        {"kind": "regex", "pattern": "^1", "weight": 0.5},
        {"kind": "number", "reference": "{answer}"},
        {"kind": "json_schema", "schema": {"type": "integer"}},
        {"kind": "contains", "name": "empty", "reference": ""},
    )
    samples = answers("12", "it is 12", "\u00e9\ud800", "")
    with Rewards(spec, job_id="job", secrets={}) as rewards:
        here = rewards.grade(samples)
    monkeypatch.setattr(regex, "search", None)
    monkeypatch.setattr(regex, "finditer", None)
    assert GradedApart(spec, samples, job_id="job").result() == here


def test_what_is_graded_when_the_time_is_over_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "WITHIN_S", 4.0)
    began = monotonic()
    spec, samples = reward({"kind": "regex", "pattern": "(a|aa)+$|b"}), answers("b", *["a" * 60 + "c"] * 20)
    quick, *rest = GradedApart(spec, samples, job_id="job").result()
    assert 4 <= monotonic() - began < 12
    assert quick == Graded(1.0, {"regex": 1.0})
    assert len(rest) == 20 and all(one.total is None for one in rest)
    assert rest[-1].errors == {"regex": "not graded: the answers of an evaluation are graded for 4 s in all"}


def test_a_process_that_dies_and_graders_that_cannot_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [one] = GradedApart(reward({"kind": "regex", "pattern": "("}), answers("b"), job_id="job").result()
    assert one.errors == {"regex": "not graded: the graders' process ended with status 1"}
    (tmp_path / "rapidfuzz.py").write_text("raise ImportError('it is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobFailed, match="the grader similarity cannot work here: it is broken"):
        GradedApart(reward({"kind": "similarity", "reference": "{answer}"}), answers("b"), job_id="job").result()
