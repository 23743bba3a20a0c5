"""How the graders' scores of a rollout become the rewards that advantages are made of."""

from typing import Any

import torch

from service.rewards.samples import Graded
from service.spec.job import JobSpec, RLSpec
from service.validation import parse
from workers.loops.rl import rewards_of
from workers.loops.sampling import Group
from workers.objectives import Objective

RIGHT, SHORT = [1.0, 0.0, 0.0, 1.0], [0.1, 0.9, 0.5, 0.3]  # of one group; the second grader speaks more softly


def spec(preset: str, on_error: str = "mask", weight: float = 0.5) -> RLSpec:
    parsed = parse(
        JobSpec,
        {
            "kind": "rl",
            "model": {"source": "tiny"},
            "data": {"train": {"source": "inline", "rows": [{"q": "1"}]}, "prompt": "{q}"},
            "objective": {"preset": preset, "kl": "none"},
            "rollout": {"prompts_per_step": 1, "group_size": 4},
            "reward": {
                "graders": [
                    {"kind": "length", "name": "right", "max_tokens": 4},
                    {"kind": "length", "name": "short", "max_tokens": 2, "weight": weight},
                ],
                "on_error": on_error,
            },
            "update": {"minibatches": 1},
        },
    )
    assert isinstance(parsed, RLSpec)
    return parsed


def group(rewards: list[float | None] | None = None, scores: list[dict[str, Any]] | None = None) -> Group:
    scores = scores or [{"right": right, "short": short} for right, short in zip(RIGHT, SHORT, strict=True)]
    totals: list[float | None] = [None if None in one.values() else one["right"] + 0.5 * one["short"] for one in scores]
    return Group({}, [1], [], [Graded(total, one) for total, one in zip(totals, scores, strict=True)], rewards or totals)


def advantages(job: RLSpec, one: Group) -> torch.Tensor:
    rewards, weights = rewards_of(job, [one])
    valid = torch.tensor([reward is not None for reward in one.rewards])
    groups = torch.zeros(4, dtype=torch.long)
    return Objective(job.objective.resolve()).advantages(rewards, groups, valid=valid, reward_weights=weights)


def normalized(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / (values.std() + 1e-6)


def test_gdpo_normalises_the_scores_of_each_grader_before_it_sums_them() -> None:
    right, short = (torch.tensor(values, dtype=torch.float64) for values in (RIGHT, SHORT))
    each = normalized(normalized(right) + 0.5 * normalized(short))
    together = normalized(right + 0.5 * short)
    torch.testing.assert_close(advantages(spec("gdpo"), group()), each)
    torch.testing.assert_close(advantages(spec("grpo"), group()), together)
    assert (each - together).abs().max() > 0.05  # else this says nothing


def test_a_sample_that_could_not_be_graded_is_in_no_statistic_of_either() -> None:
    scores: list[dict[str, Any]] = [{"right": right, "short": short} for right, short in zip(RIGHT, SHORT, strict=True)]
    scores[2] = {"right": 1.0, "short": None}
    left = [0, 1, 3]
    right, short = (torch.tensor([values[i] for i in left], dtype=torch.float64) for values in (RIGHT, SHORT))
    found = advantages(spec("gdpo"), group(scores=scores))
    assert found[2] == 0
    torch.testing.assert_close(found[left], normalized(normalized(right) + 0.5 * normalized(short)))


def test_where_errors_are_worth_zero_every_score_of_such_a_sample_is() -> None:
    scores: list[dict[str, Any]] = [{"right": right, "short": short} for right, short in zip(RIGHT, SHORT, strict=True)]
    scores[2] = {"right": 1.0, "short": None}
    rewards, _ = rewards_of(spec("gdpo", "zero"), [group([1.05, 0.45, 0.0, 1.15], scores)])
    assert rewards[0].tolist() == [1.0, 0.1] and rewards[3].tolist() == [1.0, 0.3]
    assert rewards[2].tolist() == [0.0, 0.0]


def test_a_grader_of_weight_0_is_only_watched() -> None:
    """Where it alone tells answers apart there is nothing to learn, and the metrics and select.zero_variance say so."""
    scores: list[dict[str, Any]] = [{"right": 1.0, "short": short} for short in SHORT]
    rewards, weights = rewards_of(spec("gdpo", weight=0.0), [group(scores=scores)])
    assert weights is not None and weights.tolist() == [1.0]
    assert rewards.tolist() == [[1.0]] * 4
