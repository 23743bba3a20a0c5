"""Advice on curves made by hand: each rule fires on what it is for, and not on a sound run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from service import signals
from service.metric_names import find
from service.signals import SIGNS, Curve, advise, signs_of

SOUND: Mapping[str, Sequence[float]] = {
    "reward/mean": [0.2 + 0.02 * i for i in range(30)],
    "reward/std": [0.4] * 30,
    "reward/zero_variance_fraction": [0.1] * 30,
    "reward/error_rate": [0.0] * 30,
    "completion/length_mean": [6.0 + 0.05 * i for i in range(30)],
    "completion/truncated_fraction": [0.02] * 30,
    "policy/entropy": [1.5 - 0.02 * i for i in range(30)],
    "policy/ratio_min": [0.9] * 30,
    "policy/ratio_max": [1.1] * 30,
    "policy/clip_fraction_low": [0.1] * 30,
    "policy/clip_fraction_high": [0.1] * 30,
    "policy/approx_kl_k3": [0.001] * 30,
    "rollout/approx_kl_k3": [1e-9] * 30,
    "optimizer/grad_norm": [0.5] * 30,
    "optimizer/skipped": [0.0] * 30,
    "eval/reward/mean": [0.2 + 0.02 * i for i in range(30)],
}
FALLEN = [0.2 + 0.03 * i for i in range(15)] + [0.1] * 15

WRONG: Mapping[str, Mapping[str, Sequence[float]]] = {
    "no_spread": {"reward/zero_variance_fraction": [0.1] * 5 + [1.0] * 25},
    "all_truncated": {"completion/truncated_fraction": [1.0] * 30},
    "zero_gradient": {"optimizer/grad_norm": [0.5] * 20 + [0.0] * 10},
    "constant_reward": {"reward/std": [0.0] * 30},
    "ratio_is_one": {"policy/ratio_min": [1.0] * 30, "policy/ratio_max": [1.0] * 30},
    "clip_never_acts": {"policy/clip_fraction_low": [0.0] * 30, "policy/clip_fraction_high": [0.0] * 30},
    "collapse": {"reward/mean": FALLEN},
    "entropy_gone": {"policy/entropy": [1.5] * 10 + [0.01] * 20},
    "length_drift": {"completion/length_mean": [6.0 + i for i in range(30)]},
    "length_hacking": {"completion/length_mean": [6.0 + i for i in range(30)], "eval/reward/mean": [0.2] * 30},
    "overfitting": {"eval/reward/mean": [0.6] * 15 + [0.3] * 15},
    "few_groups_teach": {"reward/zero_variance_fraction": [0.8] * 30},
    "many_truncated": {"completion/truncated_fraction": [0.5] * 30},
    "grader_errors": {"reward/error_rate": [0.05] * 30},
    "updates_skipped": {"optimizer/skipped": [0.0] * 29 + [2.0]},
    "sampler_disagrees": {"rollout/approx_kl_k3": [0.05] * 30},
    "steps_too_large": {"policy/approx_kl_k3": [0.001] * 10 + [0.5] * 20},
    "huge_kl": {"kl/ref_k3": [0.02] * 29 + [12.0]},
}


def found(curves: Mapping[str, Sequence[float]], updates: int = 4) -> set[str]:
    given = {name: Curve.of(range(1, len(values) + 1), list(values)) for name, values in curves.items()}
    return {advice.rule for advice in advise(given, updates=updates, no_signal_steps=10)}


def test_nothing_stands_out_in_a_sound_run() -> None:
    assert found(SOUND) == set()
    a_step_ahead = {"rollout/approx_kl_k3": [0.05] * 30, "rollout/staleness": [0.0, *[1.0] * 29]}
    assert found({**SOUND, **a_step_ahead}) == set()
    assert found({}) == set()
    assert found({name: values[:3] for name, values in SOUND.items()}) == set()


def test_a_huge_kl_is_told_with_its_steps_and_its_highest_value() -> None:
    """Also where one step leaves no trend, in a curve too short for one."""
    curves = {"policy/approx_kl_k3": Curve.of([1, 2, 3, 4], [0.1, 40.0, 11.0, 0.1]), "kl/ref_k3": Curve.of([1, 2], [9.9, 10.0])}
    [advice] = advise(curves, updates=1, no_signal_steps=10)
    assert (advice.rule, advice.metric, advice.from_step, advice.to_step) == ("huge_kl", "policy/approx_kl_k3", 2, 3)
    assert advice.detail == "policy/approx_kl_k3 reached 40 nats a token"


@pytest.mark.parametrize("rule", WRONG)
def test_rule_fires_on_what_it_is_for(rule: str) -> None:
    assert rule in found({**SOUND, **WRONG[rule]})


def test_every_rule_is_tried() -> None:
    source = Path(signals.__file__).read_text()
    assert set(SIGNS) <= set(WRONG)
    assert all(f'"{rule}"' in source for rule in WRONG)


def test_signs_end_with_the_newest_step_that_does_not_show_them() -> None:
    assert "no_spread" not in found({**SOUND, "reward/zero_variance_fraction": [1.0] * 29 + [0.9]})
    assert "no_spread" not in found({**SOUND, "reward/zero_variance_fraction": [0.5] * 21 + [1.0] * 9})


def test_one_update_a_rollout_cannot_move_a_ratio() -> None:
    still = {
        "policy/ratio_min": 1.0,
        "policy/ratio_max": 1.0,
        "policy/clip_fraction_low": 0.0,
        "policy/clip_fraction_high": 0.0,
    }
    assert signs_of(still, 1) == []
    assert signs_of(still, 2) == ["ratio_is_one", "clip_never_acts"]


def test_a_solved_task_is_no_collapse_of_entropy() -> None:
    solved = {
        **SOUND,
        "policy/entropy": [1.5] * 10 + [0.01] * 20,
        "reward/mean": [0.5] * 10 + [1.0] * 20,
        "reward/zero_variance_fraction": [0.1] * 10 + [0.95] * 20,
    }
    given = {name: Curve.of(range(1, 31), list(values)) for name, values in solved.items()}
    (gone,) = [advice for advice in advise(given, updates=4, no_signal_steps=10) if advice.rule == "entropy_gone"]
    assert (gone.severity, gone.cause) == ("notice", "the task is solved")


def test_every_metric_that_is_looked_at_is_in_the_table() -> None:
    assert [name for name in signals.NEEDED if find(name) is None] == []


def test_the_page_names_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "advice.md").read_text()
    assert [rule for rule in WRONG if f"`{rule}`" not in page] == []
