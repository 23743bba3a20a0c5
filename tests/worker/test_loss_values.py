"""The loss worker gives what the objective itself gives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loss_orders import F64, WORKED, assert_same, directly, drawn, flattened, item, result, results
from service.spec.presets import PRESETS


def test_the_worked_example() -> None:
    found = result(WORKED)
    assert found["loss"] == pytest.approx((math.exp(0.2) - 1.0004) / 2, abs=1e-12)
    assert_close(found["log_importance_ratio"], torch.tensor([0.15] * 4 + [0.2] * 3, dtype=F64))
    assert_close(found["ratio"], torch.tensor([math.exp(0.15)] * 4 + [math.exp(0.2)] * 3, dtype=F64))
    assert found["clipped"].tolist() == [True] * 4 + [False] * 3
    assert_close(found["gradients/log_probs"], torch.tensor([0.0] * 4 + [math.exp(0.2) / 6] * 3, dtype=F64))
    assert_close(found["token_loss"], torch.tensor([-1.0004] * 4 + [math.exp(0.2)] * 3, dtype=F64))
    assert_close(found["weights"], torch.tensor([1 / 8] * 4 + [1 / 6] * 3, dtype=F64))
    assert found["metrics"]["policy/ratio_mean"] == pytest.approx((4 * math.exp(0.15) + 3 * math.exp(0.2)) / 7)
    assert found["cu_seqlens"].tolist() == [0, 4, 7]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_what_the_objective_gives(preset: str) -> None:
    """From rewards, from advantages of sequences and of tokens."""
    batch = drawn()
    of_sequences, of_tokens = torch.randn(6, dtype=F64), torch.randn(6, 5, dtype=F64)
    sent = [batch, batch | {"advantages": of_sequences}, batch | {"advantages": of_tokens}]
    found = results(*(item(one, preset) for one in sent))
    for one, advantages in zip(found, (None, of_sequences, of_tokens), strict=True):
        assert_same(one, directly(preset, batch, advantages))


@pytest.mark.parametrize(
    "objective",
    [
        {"preset": "gspo", "ratio": {"kind": "segment"}},
        {"preset": "gspo", "ratio": {"kind": "segment", "chunk": 2}},
        {"preset": "grpo", "aggregate": "prompt"},
        {"preset": "dapo", "select": {"top_entropy": 0.5}},
        {"preset": "gspo", "select": {"top_entropy": 0.5}},
        {"preset": "grpo", "correct": {"level": "segment", "action": "truncate", "cap": 1.01, "normalize": True}},
        {"preset": "grpo", "correct": {"action": "none", "sequence_delta": 0.01}},
        {"preset": "gspo", "kl": {"place": "reward", "coef": 0.5}},
    ],
    ids=str,
)
def test_axes_beside_the_presets_too(objective: dict[str, Any]) -> None:
    assert_same(result(drawn(), objective), directly(objective, drawn()))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [(5, 3, 5, 1, 2, 4), (4, 4, 4, 4)], ids=["uneven", "even"])
def test_ragged_is_padded_without_the_padding(preset: str, lengths: tuple[int, ...]) -> None:
    batch = drawn(lengths)
    mask = batch["response_mask"].bool()
    padded, flat = results(item(batch, preset), item(flattened(batch), preset))
    assert_same(flat, {name: values[mask] if isinstance(values, Tensor) else values for name, values in padded.items()})


def test_interior_holes_may_be_sent_ragged_too() -> None:
    batch = drawn((5, 5, 5, 5))
    batch["response_mask"][:, 2] = 0
    ids = {"cu_seqlens": torch.arange(0, 21, 5)}
    flat = {name: values.flatten() if values.dim() == 2 else values for name, values in batch.items()}
    padded, found = results(item(batch), item(flat | ids))
    assert_same(found, {name: v.flatten() if isinstance(v, Tensor) else v for name, v in padded.items()})


def test_several_rewards_and_their_weights() -> None:
    batch, weights = drawn(), torch.tensor([1.0, 0.25], dtype=F64)
    two = torch.stack([batch["rewards"], batch["rewards"].flip(0)], dim=1)
    both = {**batch, "rewards": two, "reward_weights": weights}
    expected = directly("grpo", {**batch, "rewards": two @ weights})
    found = result(both, "grpo")
    assert_close(found["advantages"], expected["advantages"])
    in_reward = {"preset": "grpo", "kl": {"place": "reward", "coef": 0.5}}
    found = result(both, in_reward)
    assert_close(found["advantages"], directly(in_reward, {**batch, "rewards": two @ weights})["advantages"])


def test_minus_log_p_needs_no_advantages_and_takes_token_weights() -> None:
    found = result({"log_probs": WORKED["log_probs"]}, "cross_entropy")
    assert found["loss"] == pytest.approx(11.3)
    weights = [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 2.0]]
    found = result({"log_probs": WORKED["log_probs"], "weights": weights}, "cross_entropy")
    assert found["loss"] == pytest.approx(2.0 + 0.75 + 2.6)
    assert found["gradients/log_probs"].tolist() == [-1.0, 0.0, -0.5, 0.0, 0.0, 0.0, -2.0]


SPLITTABLE = [name for name in PRESETS if name not in ("clip_cov", "kl_cov")]


@pytest.mark.parametrize("preset", SPLITTABLE)
def test_micro_batches_with_the_weights_of_the_step_add_up_to_it(preset: str) -> None:
    whole = drawn((5, 3, 5, 1, 2, 4, 6, 6))
    ids = whole["group_ids"]
    step = result(whole, preset)
    parts = [ids < 1, (ids >= 1) & (ids < 3), ids >= 3]
    found = results(*(item({name: v[rows] for name, v in (whole | sent(step)).items()}, preset) for rows in parts))
    assert sum(part["loss"] for part in found) == pytest.approx(step["loss"], abs=1e-12)
    gradient = torch.cat([part["gradients/log_probs"] for part in found])
    assert_close(gradient, step["gradients/log_probs"], rtol=1e-12, atol=1e-12)
    assert_close(torch.cat([part["weights"] for part in found]), step["weights"], rtol=0, atol=0)


def test_the_weights_of_the_step_weigh_one_loss_a_sequence_too() -> None:
    """With one advantage and one ratio a sequence no loss of a token is ever made."""
    whole = drawn() | {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.5], dtype=F64)}
    step = result(whole)
    batch = whole | {"weights": step["weights"]}
    found = results(*(item({name: values[rows] for name, values in batch.items()}) for rows in torch.arange(6).split(4)))
    assert sum(part["loss"] for part in found) == pytest.approx(step["loss"], abs=1e-12)
    assert_close(
        torch.cat([part["gradients/log_probs"] for part in found]), step["gradients/log_probs"], rtol=1e-12, atol=1e-12
    )


def sent(step: dict[str, Any]) -> dict[str, Tensor]:
    """What a step's answer tells its micro-batches: those of whole batches cannot make it of their rows."""
    return {"weights": step["weights"], "advantages": step["advantages"]}


def test_what_looks_at_the_step_all_the_same_is_warned_of() -> None:
    batch = drawn() | {"weights": torch.ones(6, 5, dtype=F64)}
    normalized = {"preset": "grpo", "correct": {"action": "truncate", "normalize": True}}
    found = results(item(batch, normalized), item(batch, "clip_cov"), item(batch, "grpo"))
    said = [" ".join(one.get("warnings", [])) for one in found]
    assert "correct.normalize" in said[0] and "clip_cov" in said[1] and not said[2]


def test_tokens_drawn_by_covariance_follow_the_seed() -> None:
    drawn_by = {"preset": "clip_cov", "surrogate": {"share": 0.1, "cov_low": 1e-6}}
    batch = drawn((8,) * 8)
    losses = [one["loss"] for one in results(*(item(batch, drawn_by, seed=seed) for seed in (1, 1, 2, 3)))]
    assert losses[0] == losses[1] and len(set(losses)) > 1
