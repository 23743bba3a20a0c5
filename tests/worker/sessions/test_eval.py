"""The operation `eval`: what it answers is what the session's weights sample, graded; it changes no weight."""

from typing import Any

import pytest
from session_operations import loop
from sqlalchemy import select

from ratchet_client.operations import evaluate
from service.rewards import apart
from service.store.tables import Metric
from workers.sessions import evaluating

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
PROMPTS = ["rev 12>", "rev 345>"]


@SQLITE
def test_an_evaluation_grades_what_the_weights_sample_and_changes_nothing(rig: Any) -> None:
    job, quiet = rig.session(), rig.session()
    greedy = {"max_tokens": 5, "temperature": 0.0}
    rig.send(job, *loop(1), {"kind": "sample", "texts": PROMPTS, "sampling": greedy})
    rig.work()
    sampled = rig.answer(job, 4)
    rows = [{"prompt": PROMPTS[0], "answer": sampled["texts"][0]}, {"prompt": PROMPTS[1], "answer": "another"}]
    graders = [
        {"kind": "exact", "reference": "{answer}", "strip": False},
        {"kind": "length", "name": "short", "max_tokens": 4, "weight": 0.5},
        {"kind": "json_schema", "name": "json", "schema": {"type": "object"}, "weight": 2},
    ]
    asked = evaluate(rows, graders, max_tokens=5)
    rig.send(job, asked.head, *loop(1, first=1))
    rig.send(quiet, *loop(2))
    rig.work()
    told = asked.read(rig.answer(job, 5))
    short = [float(len(tokens) <= 4) for tokens in sampled["tokens"]]
    assert told.texts == [[text] for text in sampled["texts"]]
    assert told.rewards == [[1.0 + short[0] / 2], [short[1] / 2]]
    assert told.scores[1] == [{"exact": 0.0, "short": short[1], "json": 0.0}]
    assert told.metrics["eval/reward/mean"] == (1.0 + sum(short) / 2) / 2
    with rig.store.begin(readonly=True) as session:
        points = session.scalars(select(Metric).where(Metric.job_id == job, Metric.name == "eval/reward/exact")).all()
    assert [(point.step, point.value) for point in points] == [(1, 0.5)]
    assert rig.answer(job, 8) == rig.answer(quiet, 6)
    assert rig.job(job).step == 2


@SQLITE
def test_answers_are_drawn_by_the_seed(rig: Any) -> None:
    job = rig.session()
    asked = {"kind": "eval", "rows": [{"prompt": PROMPTS[0]}], "graders": [{"kind": "length", "max_tokens": 3}]}
    how = {"num_samples": 4, "sampling": {"max_tokens": 6, "temperature": 1.0}}
    rig.send(job, *({**asked, **how, "seed": seed} for seed in (1, 1, 2)))
    rig.work()
    first, again, other = (rig.answer(job, seq)["texts"] for seq in (1, 2, 3))
    assert first == again != other and len(set(first[0])) > 1


@SQLITE
def test_grading_that_takes_too_long_ends_and_holds_up_nobody(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "WITHIN_S", 0.2)
    job, beside = rig.session(), rig.session()
    rows = [{"prompt": PROMPTS[0], "answer": "1"}]
    rig.send(job, evaluate(rows, [{"kind": "number", "reference": "{answer}"}], max_tokens=5).head, *loop(1, first=1))
    rig.send(beside, *loop(1))
    rig.work()
    told = rig.answer(job, 1)
    assert told["rewards"] == [[None]] and told["metrics"]["eval/reward/error_rate"] == 1
    assert told["errors"] == [[{"number": "not graded: the answers of an evaluation are graded for 0.2 s in all"}]]
    assert rig.job(job).step == rig.job(beside).step == 1


@SQLITE
def test_others_go_on_while_answers_are_graded(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, beside = rig.session(), rig.session()

    class Slow(apart.GradedApart):
        """Not done before the neighbour is."""

        @property
        def done(self) -> bool:
            return rig.operation(beside, 6).status == "done" and super().done

    monkeypatch.setattr(evaluating, "GradedApart", Slow)
    rig.send(job, evaluate([{"prompt": PROMPTS[0]}], [{"kind": "length", "max_tokens": 9}], max_tokens=5).head, *loop(1))
    rig.send(beside, *loop(2))
    rig.work()
    assert rig.answer(job, 1)["rewards"] == [[1.0]]
    assert rig.operation(job, 1).finished_at >= rig.operation(beside, 6).finished_at
    assert rig.job(job).step == 1
