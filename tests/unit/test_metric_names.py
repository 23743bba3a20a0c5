"""Every metric stands in one table, with what it means; and what is written is what stands there."""

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.metric_names import DRAWN, METRICS, find, is_live, page, taken_from_graders
from service.settings import Settings
from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from workers.loops import known_metrics, managed
from workers.loops.attempt import StepResult
from workers.objectives import Objective

ROOT = Path(__file__).parents[2]
OF_LOSSES = {one.name for one in METRICS if "losses" in one.of}


def test_the_page_is_current() -> None:
    assert page() == (ROOT / "docs" / "metrics.md").read_text(), "docs/metrics.md is not current: make reference"


def test_every_name_stands_once_and_says_what_it_means() -> None:
    assert [name for name, count in Counter(one.name for one in METRICS).items() if count > 1] == []
    for one in METRICS:
        assert one.unit and one.means and "|" not in one.means and one.of, one  # a bar would end the page's cell
        assert find(one.name.replace("{grader}", "mine")) == one


def test_a_graders_name_makes_a_metric_of_its_own() -> None:
    found = find("eval/greedy/reward/my-grader.2")
    assert found is not None and (found.name, found.unit, found.better) == ("eval/greedy/reward/{grader}", "score", "up")
    assert [find(name) for name in ("reward/", "reward/a/b", "eval/reward", "rewards/mean", "x/reward/mean", "")] == [None] * 6


def test_no_grader_may_be_called_as_another_metric_of_the_reward() -> None:
    assert taken_from_graders() == ["mean", "std", "error_rate", "zero_variance_fraction"]
    for name in taken_from_graders():
        found = find(f"reward/{name}")
        assert found is not None and found.name == f"reward/{name}"


def test_what_people_follow_live() -> None:
    told = ("reward/mean", "eval/greedy/reward/mean", "loss", "eval/loss", "policy/clip_fraction_dual_sequence", "kl/ref_k3")
    assert all(map(is_live, told))
    kept = ("reward/std", "reward/loss", "policy/ratio_max", "tokens/sampled", "perf/step_s", "debug/loss")
    assert not any(map(is_live, kept))
    assert all(map(is_live, DRAWN)) and DRAWN[:2] == ("reward/mean", "eval/reward/mean")


# ---------------------------------------------------------------- what is written


def measured(objective: Objective) -> set[str]:
    """The names that a loss request with rewards and every tensor is answered with."""
    some = torch.full((2, 3), -1.0)
    names = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "entropy")
    given: dict[str, Any] = dict.fromkeys(names, some) | {
        "group_ids": torch.tensor([0, 0]),
        "segment_ids": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "selected": torch.tensor([[True, True, False], [True, True, True]]),
    }
    step = objective.prepare(response_mask=torch.ones(2, 3), advantages=torch.ones(2), longest=4, **given)
    _, outputs = objective.loss(some.clone(), step.rows())
    groups = objective.group_metrics(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    return {*(step.metrics + outputs.metrics + groups).finish()}


def objective_of(spec: Any) -> Objective:
    return Objective(ObjectiveSpec.model_validate(spec).resolve())


def test_a_loss_request_measures_all_that_the_table_says_it_may_and_no_more() -> None:
    assert measured(objective_of({"correct": "truncate"})) == OF_LOSSES


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_measures_what_the_table_names(preset: str) -> None:
    objective = objective_of(preset)
    corrections = {name for name in OF_LOSSES if name.startswith("correction/")}
    assert OF_LOSSES - corrections <= measured(objective) <= OF_LOSSES


def attempt(kind: str, *, strict: bool) -> tuple[Any, list[int]]:
    committed: list[int] = []
    tenure = SimpleNamespace(
        settings=SimpleNamespace(strict_metrics=strict), commit_step=lambda step, *_: committed.append(step)
    )
    progress = SimpleNamespace(step=3, evaluated_at=None, implausible=[])
    return SimpleNamespace(tenure=tenure, spec=SimpleNamespace(kind=kind), progress=progress), committed


def test_the_tests_are_strict_about_names() -> None:
    assert Settings().strict_metrics and not Settings.model_fields["strict_metrics"].default


@pytest.mark.parametrize(
    ("kind", "name"), [("rl", "policy/los"), ("rl", "loss"), ("supervised", "reward/mean"), ("rl", "batch/groups")]
)
def test_a_step_with_an_unknown_name_is_not_committed_where_names_are_strict(kind: str, name: str) -> None:
    one, committed = attempt(kind, strict=True)
    with pytest.raises(ValueError, match=rf"kind {kind} writes metrics .* does not name for it: {name}; .*optimizer/skipped"):
        managed._commit(one, StepResult({"optimizer/skipped": 0.0, name: 1.0}))
    assert committed == []
    managed._commit(one, StepResult({"optimizer/skipped": 0.0, "eval/reward/mine": 1.0}))
    assert committed == [3]


def test_elsewhere_it_is_committed_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    one, committed = attempt("rl", strict=False)
    known_metrics._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            managed._commit(one, StepResult({"reward/mean": 0.5, "policy/los": 1.0}))
    assert committed == [3, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "a job of kind rl writes the metric 'policy/los', which service/metric_names.py does not name for it"
    ]
