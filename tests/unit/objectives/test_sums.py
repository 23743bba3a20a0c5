"""The named losses of sessions: values and gradients by hand, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.objectives.sums import HIGH, LOSSES, LOW, Inputs


def run(name: str, trained: Any, items: list[int] | None = None, config: Any = None, **tensors: Any) -> tuple[float, Tensor]:
    """The loss and its gradient."""
    lp = torch.tensor(trained, dtype=torch.float64, requires_grad=True)
    of = items or [0] * len(trained)
    loss = LOSSES[name]
    defaults = {key: value for key, value in loss.config.items() if value is not None}
    given = Inputs(
        {key: torch.tensor(value, dtype=torch.float64) for key, value in tensors.items()},
        {**defaults, **(config or {})},
        torch.tensor(of),
        max(of) + 1,
    )
    value = loss.of(lp, given)
    value.backward()
    assert lp.grad is not None
    return float(value.detach()), lp.grad


def close(got: Any, expected: Any) -> bool:
    return torch.allclose(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), atol=1e-12)


def test_cross_entropy_is_a_sum_with_weights_of_any_sign() -> None:
    value, gradient = run("cross_entropy", [-1.0, -2.0, -3.0], weights=[1.0, -0.1, 0.0])
    assert close(value, 1.0 - 0.2)
    assert close(gradient, [-1.0, 0.1, 0.0])


def test_cross_entropy_of_several_targets_a_token() -> None:
    value, gradient = run("cross_entropy", [[-1.0, -2.0], [-0.5, -4.0]], weights=[[0.5, 0.5], [0.0, 2.0]])
    assert close(value, 0.5 + 1.0 + 8.0)
    assert close(gradient, [[-0.5, -0.5], [0.0, -2.0]])


def test_cross_entropy_without_weights() -> None:
    value, gradient = run("cross_entropy", [-1.0, -2.0])
    assert (value, gradient.tolist()) == (3.0, [-1.0, -1.0])


def test_a_weight_that_is_ten_times_smaller_is_ten_times_smaller() -> None:
    one, small = (run("cross_entropy", [-1.0, -2.0], weights=[w, w]) for w in (-1.0, -0.1))
    assert close(small[0] * 10, one[0])
    assert close(small[1] * 10, one[1])


def test_where_the_weight_is_0_an_impossible_target_does_not_matter() -> None:
    value, gradient = run("cross_entropy", [-math.inf, -1.0], weights=[0.0, 1.0])
    assert close(value, 1.0)
    assert close(gradient, [0.0, -1.0])


def test_importance_sampling() -> None:
    value, gradient = run("importance_sampling", [-1.0, -2.0], log_probs=[-1.5, -1.0], advantages=[2.0, -3.0])
    terms = [-math.exp(0.5) * 2.0, math.exp(-1.0) * 3.0]
    assert close(value, sum(terms))
    assert close(gradient, terms)  # d/dlp of r is r


def test_a_token_without_advantage_does_not_spoil_the_sum() -> None:
    """A prompt's token has the advantage 0, and no log-prob of its own: its ratio may overflow."""
    value, gradient = run("importance_sampling", [-1.0, -1.0], log_probs=[-5000.0, -1.0], advantages=[0.0, 1.0])
    assert close(value, -1.0)
    assert close(gradient, [0.0, -1.0])


def test_ppo_takes_the_smaller_of_the_two() -> None:
    """Ratios 2, 0.5, 2, 0.5 and 1.1, with the bounds 0.8 and 1.2: the clipped ones have no gradient."""
    ratios, advantages = [2.0, 0.5, 2.0, 0.5, 1.1], [1.0, 1.0, -1.0, -1.0, 1.0]
    value, gradient = run("ppo", [math.log(r) for r in ratios], log_probs=[0.0] * 5, advantages=advantages)
    assert close(value, -(1.2 + 0.5 - 2.0 - 0.8 + 1.1))
    assert close(gradient, [0.0, -0.5, 2.0, 0.0, -1.1])


def test_ppo_with_bounds_from_the_config() -> None:
    value, gradient = run("ppo", [math.log(2.0)], log_probs=[0.0], advantages=[1.0], config={LOW: 0.5, HIGH: 3.0})
    assert close(value, -2.0)
    assert close(gradient, [-2.0])


def test_ppo_with_bounds_a_token() -> None:
    tensors: dict[str, Any] = {LOW: [0.9, 0.1], HIGH: [1.5, 1.1]}
    value, gradient = run("ppo", [math.log(2.0)] * 2, log_probs=[0.0] * 2, advantages=[1.0] * 2, config={HIGH: 9.0}, **tensors)
    assert close(value, -(1.5 + 1.1))
    assert close(gradient, [0.0, 0.0])


def test_cispo_keeps_the_gradient_where_it_clips() -> None:
    ratios = [8.0, 0.5]
    log_probs = [math.log(r) - 10 for r in ratios]
    value, gradient = run("cispo", log_probs, log_probs=[-10.0] * 2, advantages=[1.0, -2.0])
    assert close(value, -(4.0 * log_probs[0] - 2 * 0.5 * log_probs[1]))
    assert close(gradient, [-4.0, 1.0])


def test_dro() -> None:
    value, gradient = run("dro", [-1.0, -2.0], log_probs=[-1.5, -2.0], advantages=[2.0, 0.0], config={"beta": 0.1})
    assert close(value, -(-2.0 - 0.05 * 0.25))
    assert close(gradient, [-2.0 + 0.1 * 0.5, 0.0])


def test_dro_counts_the_square_where_the_advantage_is_0_unless_masked() -> None:
    given: dict[str, Any] = {"log_probs": [0.0, -1.0], "advantages": [0.0, 1.0], "config": {"beta": 1.0}}
    assert close(run("dro", [-2.0, -1.0], **given)[0], 1.0 + 2.0)
    assert close(run("dro", [-2.0, -1.0], **given, mask=[0.0, 1.0])[0], 1.0)


def test_gspo_has_one_ratio_a_sequence_and_a_gradient_a_token() -> None:
    """Two items: the first moves by the mean of 2e-4 and 4e-4 (its third token is a prompt's), the second is clipped."""
    moved = [2e-4, 4e-4, 5.0, 0.01]
    sampled = [-1.0, -2.0, 0.0, -1.0]
    value, gradient = run(
        "gspo",
        [q + d for q, d in zip(sampled, moved, strict=True)],
        items=[0, 0, 0, 1],
        log_probs=sampled,
        advantages=[1.0, 1.0, 1.0, 2.0],
        mask=[1.0, 1.0, 0.0, 1.0],
    )
    ratio = math.exp(3e-4)
    assert close(value, -(2 * ratio + 2 * (1 + 4e-4)))
    assert close(gradient, [-ratio, -ratio, 0.0, 0.0])


def test_gspo_of_an_item_without_any_token_is_0() -> None:
    value, gradient = run("gspo", [-1.0], log_probs=[-2.0], advantages=[1.0], mask=[0.0])
    assert (value, gradient.tolist()) == (0.0, [0.0])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_what_the_mask_leaves_out_may_be_anything(name: str) -> None:
    config = {"beta": 0.3} if name == "dro" else {}
    whole = run(name, [-1.0], log_probs=[-1.1], advantages=[0.7], mask=[1.0], config=config)
    masked = run(name, [-1.0, -9.0], log_probs=[-1.1, math.nan], advantages=[0.7, math.nan], mask=[1.0, 0.0], config=config)
    assert masked[0] == whole[0]
    assert masked[1].tolist() == [*whole[1].tolist(), 0.0]


@pytest.mark.parametrize("name", list(LOSSES))
def test_parts_add_up_to_the_whole(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[float]:
        return torch.randn(count, generator=generator, dtype=torch.float64).tolist()

    config = {"beta": 0.3} if name == "dro" else {}
    lp = some(6)
    tensors: dict[str, Any] = {key: some(6) for key in LOSSES[name].needs or ("weights",)}
    if "mask" in tensors:
        tensors["mask"] = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    whole = run(name, lp, items=[0, 0, 0, 1, 1, 1], config=config, **tensors)
    parts = [run(name, lp[a:b], config=config, **{k: v[a:b] for k, v in tensors.items()}) for a, b in ((0, 3), (3, 6))]
    assert close(parts[0][0] + parts[1][0], whole[0])
    assert close(torch.cat([parts[0][1], parts[1][1]]), whole[1])
