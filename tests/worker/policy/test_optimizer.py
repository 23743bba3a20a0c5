"""AdamW: the schedule, clipping, and gradients that are not finite."""

import math

import pytest
import torch

from service.spec.model import ModelSpec
from service.spec.training import Schedule
from workers.policy.optimizer import learning_rate_ratio


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [1, 1, 1, 1, 1, 1]),
        (Schedule(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Schedule(kind="linear", warmup_steps=2), [0.5, 1, 1, 0.75, 0.5, 0.25]),
        (Schedule(kind="linear", min_ratio=0.4), [1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (
            Schedule(kind="cosine", warmup_steps=2, min_ratio=0.1),
            [0.5, 1, 1, 0.1 + 0.9 * (0.5 + 0.125**0.5), 0.55, 0.1 + 0.9 * (0.5 - 0.125**0.5)],
        ),
        (Schedule(warmup_steps=10), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
)
def test_the_schedule_over_six_steps(schedule, expected):
    assert [learning_rate_ratio(schedule, step, 6) for step in range(6)] == pytest.approx(expected)


def test_steps_beyond_the_planned_ones_keep_the_last_rate():
    schedule = Schedule(kind="cosine", min_ratio=0.1)
    assert learning_rate_ratio(schedule, 60, 6) == pytest.approx(0.1)


def test_an_update_is_that_of_torchs_adamw_with_clipping(load, some_sequences):
    sequences = some_sequences(6)

    def loss(log_probs, rows):
        return -10 * log_probs.sum()

    policy, plain = load(learning_rate=1e-2), load()
    parameters = list(plain.base.model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False, fused=False)
    for _ in range(3):
        policy.accumulate(sequences, loss)
        facts = policy.step()
        plain.accumulate(sequences, loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()
        assert norm > 1 and facts["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert facts["learning_rate"] == 1e-2 and facts["skipped"] is False
    for ours, theirs in zip(policy.base.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_only_the_adapter_is_trained(load, learn, tiny_lora_spec, weights):
    policy = load(tiny_lora_spec)
    before = weights(policy)
    learn(policy, 0)
    learn(policy, 1)
    changed = {name for name, value in weights(policy).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert policy.facts["trainable_parameters"] == sum(before[name].numel() for name in changed)
    assert policy.facts["trainable_parameters"] < policy.facts["parameters"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_is_skipped_and_forgotten(bad, dtype, load, learn, weights, some_sequences):
    policy, untouched = load(ModelSpec(source="tiny", dtype=dtype)), load(ModelSpec(source="tiny", dtype=dtype))
    learn(policy, 0)
    before = weights(policy)
    loss = policy.accumulate(some_sequences(3), lambda log_probs, rows: log_probs.sum() * bad)
    assert not math.isfinite(loss)
    assert policy.step()["skipped"] is True
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())
    learn(policy, 1)  # the next step is an ordinary one
    learn(untouched, 0)
    untouched.step()  # nothing was accumulated: only the count moves on
    learn(untouched, 1)
    after = weights(untouched)
    assert all(torch.equal(value, after[name]) for name, value in weights(policy).items())


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(load, some_sequences, weights):
    policy = load()
    before = weights(policy)
    loss = policy.accumulate(some_sequences(3), lambda log_probs, rows: log_probs.sum() + float("inf"))
    assert math.isnan(loss)
    assert policy.step()["skipped"] is True
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())


def test_a_gradient_that_is_not_finite_is_skipped_though_its_loss_is(load, some_sequences, weights):
    policy = load()
    before = weights(policy)
    # The root's slope at 0 is infinite.
    loss = policy.accumulate(some_sequences(3), lambda log_probs, rows: (log_probs - log_probs.detach()).sum().sqrt())
    assert loss == 0.0
    facts = policy.step()
    assert facts["skipped"] is True and not math.isfinite(facts["grad_norm"])
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())


def test_bfloat16_weights_take_in_updates_smaller_than_their_grid(load, learn, weights):
    policy = load(ModelSpec(source="tiny", dtype="bfloat16"), learning_rate=1e-5)
    name = "model.embed_tokens.weight"
    before = weights(policy)[name]
    large = before.abs() > 2**-5  # where the grid's step is 2**-12 and more, and half of that is ten updates and more
    assert before.dtype == torch.bfloat16 and large.sum() > 100
    learn(policy, 0)
    assert torch.equal(weights(policy)[name][large], before[large])
    for _ in range(40):
        learn(policy, 0)
    assert (weights(policy)[name][large] != before[large]).float().mean() > 0.3
