"""The axes put together: KL in reward and loss, correction, selection, and the way a training loop uses them."""

import pytest
import torch
from torch.testing import assert_close

from service.spec.presets import PRESETS

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
GROUPS = torch.tensor([0, 0, 1, 1])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    log_probs = -torch.rand(4, 3, generator=generator, dtype=torch.float64)

    def near(scale):
        return log_probs + scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)

    return {
        "log_probs": log_probs,
        "old_log_probs": near(0.1),
        "rollout_log_probs": near(0.2),
        "ref_log_probs": near(0.3),
        "response_mask": MASK,
        "advantages": torch.tensor([1.0, -1.0, -0.5, 2.0], dtype=torch.float64),
        "group_ids": GROUPS,
    }


def test_kl_in_the_reward_is_the_sum_over_the_answers_tokens(batch, make_objective):
    objective = make_objective({"kl": {"place": "reward", "estimator": "k1", "coef": 0.5}})
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    tensors = {name: batch[name] for name in ("old_log_probs", "ref_log_probs", "response_mask")}
    expected = rewards - 0.5 * ((batch["old_log_probs"] - batch["ref_log_probs"]) * MASK).sum(1)
    assert_close(objective.with_kl(rewards, **tensors), expected)
    assert make_objective("gspo").with_kl(rewards, **tensors) is rewards


def test_kl_in_the_loss_adds_coef_times_the_aggregated_kl(batch, compute):
    kl = {"place": "loss", "estimator": "k2", "coef": 0.5}
    with_kl, without = compute({"kl": kl, "aggregate": "seq"}, batch), compute({"aggregate": "seq"}, batch)
    k2 = 0.5 * (batch["log_probs"] - batch["ref_log_probs"]).square()
    assert_close(with_kl[0] - without[0], 0.5 * (k2 * with_kl[2].weights).sum())


def test_correction_weights_touch_the_surrogate_and_never_the_kl(batch, compute):
    correct = {"action": "truncate", "cap": 1.1}
    kl = {"place": "loss", "coef": 0.3}
    both, corrected = compute({"correct": correct, "kl": kl}, batch), compute({"correct": correct}, batch)
    penalised, plain = compute({"kl": kl}, batch), compute({}, batch)
    assert_close(both[0] - corrected[0], penalised[0] - plain[0])
    weights = (batch["old_log_probs"] - batch["rollout_log_probs"]).exp().clamp(max=1.1)
    assert_close(corrected[0], (plain[2].token_loss * plain[2].weights * weights).sum())
    assert_close(corrected[1], plain[1] * weights)


def test_masked_corrections_leave_the_divisor_alone(batch, compute):
    """What survives is not weighted up: the weights still count every token of the answer."""
    masked, plain = compute({"correct": {"action": "mask", "low": 0.9, "high": 1.1}}, batch), compute({}, batch)
    raw = (batch["old_log_probs"] - batch["rollout_log_probs"]).exp()
    kept = (raw >= 0.9) & (raw <= 1.1)
    assert 0 < int((kept & MASK.bool()).sum()) < int(MASK.sum())
    assert_close(masked[2].weights, plain[2].weights)
    assert_close(masked[0], (plain[2].token_loss * plain[2].weights * raw * kept).sum())
    only = compute({"correct": {"action": "mask", "low": 0.9, "high": 1.1, "weigh": False}}, batch)
    assert_close(only[0], (plain[2].token_loss * plain[2].weights * kept).sum())


def test_normalised_corrections_have_mean_one_over_the_step(batch, make_objective):
    objective = make_objective({"correct": {"action": "truncate", "cap": 9.0, "normalize": True}})
    step = objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})
    correction = step.tensors.correction
    assert_close(correction.sum() / MASK.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_correction_statistics_are_taken_before_truncation(batch, make_objective):
    objective = make_objective({"correct": {"action": "truncate", "cap": 1.0}})
    step = objective.prepare(**{name: value for name, value in batch.items() if name != "log_probs"})
    raw = (batch["old_log_probs"] - batch["rollout_log_probs"]).exp()[MASK.bool()]
    measured = step.metrics.finish()
    assert measured["correction/weight_mean"] == pytest.approx(float(raw.mean()))
    assert measured["correction/weight_max"] == pytest.approx(float(raw.max()))
    assert measured["correction/fraction_truncated"] == pytest.approx(float((raw > 1).double().mean()))
    assert measured["rollout/effective_samples"] == pytest.approx(float(raw.sum() ** 2 / (len(raw) * raw.square().sum())))


def test_stale_sequences_with_a_negative_advantage_are_dropped(batch, compute):
    """Mean of old - new over the answer above delta, and A < 0."""
    moved = batch | {
        "old_log_probs": batch["log_probs"] + torch.tensor([0.5, 0.5, -0.5, 0.5], dtype=torch.float64).unsqueeze(1)
    }
    _, gradient, _ = compute({"correct": {"action": "none", "sequence_delta": 0.4}, "surrogate": "none"}, moved)
    assert [bool((row != 0).any()) for row in gradient] == [True, False, True, True]


def test_selection_comes_before_the_weights(make_objective):
    objective = make_objective({"select": {"truncated": True, "zero_variance": True}, "aggregate": "token"})
    mask = objective.select(
        MASK,
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.5]),
        group_ids=GROUPS,
        truncated=torch.tensor([False, True, False, False]),
    )
    assert mask.tolist() == [[True] * 3, [False] * 3, [False] * 3, [False] * 3]
    weights = objective.prepare(response_mask=mask, advantages=torch.ones(4)).tensors.weights
    assert weights is not None
    assert_close(weights[0], torch.full((3,), 1 / 3))


def test_ungraded_samples_are_never_learned_from(make_objective):
    rewards = torch.tensor([1.0, float("nan"), 0.5, 0.0])
    mask = make_objective("gspo").select(MASK, rewards=rewards, group_ids=GROUPS, valid=torch.tensor([True, True, False, True]))
    assert mask.any(dim=1).tolist() == [True, False, False, True]


def test_top_entropy_keeps_the_highest_share_of_all_tokens(make_objective):
    entropy = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    mask = make_objective({"select": {"top_entropy": 0.3}}).select(MASK, entropy=entropy)
    assert int(mask.sum()) == 3
    assert mask[3].all()


def test_tokens_left_out_of_the_loss_still_belong_to_their_sequences_ratio(batch, make_objective):
    objective = make_objective("gspo")
    selected = MASK.bool().clone()
    selected[0, 1] = False
    step = objective.prepare(selected=selected, **{name: value for name, value in batch.items() if name != "log_probs"})
    log_probs = batch["log_probs"].requires_grad_()
    _, outputs = objective.loss(log_probs, step.rows())
    expected = (batch["log_probs"] - batch["old_log_probs"])[0].mean().exp()
    assert_close(outputs.ratio[0], torch.stack([expected, expected * 0, expected]).detach())


@pytest.mark.parametrize("per_token", [False, True])
def test_what_is_left_out_of_the_loss_is_in_no_count_and_its_advantage_may_be_anything(batch, make_objective, per_token):
    selected = MASK.bool().clone()
    selected[0, 1] = selected[2] = False
    batch["advantages"][2] = torch.nan
    if per_token:
        batch["advantages"] = batch["advantages"].unsqueeze(1).repeat(1, 3)
    objective, log_probs = make_objective("gspo"), batch.pop("log_probs").requires_grad_()
    step = objective.prepare(selected=selected, **batch)
    loss, outputs = objective.loss(log_probs, step.rows())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.isfinite().all() and (gradient[2] == 0).all()
    measured = (step.metrics + outputs.metrics).finish()
    assert (measured["batch/tokens"], measured["batch/sequences"]) == (7, 3)
    moved = (batch["old_log_probs"] - log_probs.detach())[selected]
    assert measured["policy/approx_kl"] == pytest.approx(float(moved.mean()))
    assert measured["policy/approx_kl_k3"] == pytest.approx(float((torch.expm1(-moved) + moved).mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("axis", "name"),
    [
        ({"kl": "loss"}, "ref_log_probs"),
        ({"kl": {"place": "loss", "reference": "rollout"}}, "rollout_log_probs"),
        ({"anchor": "rollout"}, "rollout_log_probs"),
        ({"correct": "truncate"}, "rollout_log_probs"),
        ({}, "old_log_probs"),
    ],
)
def test_missing_log_probs_are_named(axis, name, batch, compute):
    without = {key: value for key, value in batch.items() if key != name}
    with pytest.raises(ValueError, match=f"needs {name}"):
        compute(axis, without)


@pytest.mark.parametrize(
    ("axis", "says"),
    [
        ({"truncated": True}, "`truncated`"),
        ({"zero_variance": True}, "`rewards` and `group_ids`"),
        ({"top_entropy": 0.5}, "`entropy`"),
    ],
)
def test_a_selector_says_what_it_needs(axis, says, make_objective):
    objective = make_objective({"select": axis})
    with pytest.raises(ValueError, match=f"needs {says}"):
        objective.select(MASK)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_loop_raises_the_reward_with_every_preset(preset, make_objective):
    """A policy over four answers of one token, several minibatches a rollout, as the managed loop does it."""
    objective = make_objective({"preset": preset, "select": {"truncated": False, "zero_variance": False}})
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference = logits.detach().log_softmax(0)
    reward_of = torch.tensor([0.0, 0.2, 0.4, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    optimizer, group_ids = torch.optim.SGD([logits], lr=0.5), torch.arange(64) // 16
    sums = objective.aggregate_axis["kind"] == "sum"

    def mean_reward() -> float:
        return float(logits.detach().softmax(0) @ reward_of)

    before = mean_reward()
    for _ in range(8):
        answers = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=generator)
        old = logits.detach().log_softmax(0)[answers].unsqueeze(1)
        given = {"old_log_probs": old, "ref_log_probs": reference[answers].unsqueeze(1), "rollout_log_probs": old}
        mask = torch.ones(64, 1)
        rewards = objective.with_kl(reward_of[answers], response_mask=mask, **given)
        advantages = objective.advantages(rewards, group_ids, lengths=mask.sum(1))
        selected = objective.select(mask, rewards=rewards, group_ids=group_ids)
        for minibatch in torch.arange(64).split(32):
            of = {name: values[minibatch] for name, values in given.items()}
            step = objective.prepare(
                response_mask=selected[minibatch], advantages=advantages[minibatch], group_ids=group_ids[minibatch], **of
            )
            optimizer.zero_grad()
            for micro in torch.arange(32).split(10):
                log_probs = logits.log_softmax(0)[answers[minibatch][micro]].unsqueeze(1)
                loss, _ = objective.loss(log_probs, step.rows(micro))
                (loss / 32 if sums else loss).backward()
            optimizer.step()
    assert mean_reward() > before + 0.002
