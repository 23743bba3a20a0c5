"""Rows that cannot move the policy stay out of the forward pass: the same loss, gradient and counts as if all went through."""

import pytest
import torch

from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from workers.loops.nonfinite import Suspects
from workers.loops.update import Experience, How, accumulate, prepare
from workers.objectives import Objective
from workers.objectives.metrics import Metrics
from workers.objectives.surrogate import SURROGATES

HOW = How(temperature=1.0, microbatch_tokens=60, longest=10, seed=0, step=1)
OBJECTIVES = {
    **{name: name for name in PRESETS},
    "a KL in the loss": {"kl": {"place": "loss", "coef": 0.1}},
    "dro": {"surrogate": "dro"},
    "kl_cov": {"surrogate": {"kind": "kl_cov", "share": 0.3}},
    "clip_cov": {"surrogate": {"kind": "clip_cov", "share": 0.3}},
    "corrected": {"preset": "grpo", "correct": {"action": "truncate", "cap": 1.05}},
}
FEWER = "policy/ratio", "policy/clip", "policy/approx_kl", "kl/ref"  # metrics of the rows that go through


def objective_of(spec):
    return Objective(ObjectiveSpec.model_validate(spec).resolve())


def experience(sequences, *, flat):
    """Answers in groups of three; the groups in `flat` have no advantage, and the last row is masked."""
    count, width = len(sequences), max(len(sequence.completion) for sequence in sequences)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([len(sequence.completion) for sequence in sequences])
    mask = torch.arange(width) < lengths.unsqueeze(1)
    mask[-1] = False
    old, rollout, ref = (-3 - torch.rand(count, width, generator=generator, dtype=torch.float64) for _ in range(3))
    groups = torch.arange(count) // 3
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    advantages[torch.isin(groups, torch.tensor(flat))] = 0
    return Experience(sequences, mask, old, rollout, ref, advantages, groups)


@pytest.fixture
def policy(load):
    policy = load()
    policy.base.model.double()
    return policy


def plain(policy, objective, data, chosen, prepared):
    """The loss, the metrics and the gradients if every row goes through the model."""
    measured = Metrics()

    def loss(log_probs, rows):
        nonlocal measured
        value, outputs = objective.loss(log_probs, prepared.rows(rows))
        measured += outputs.metrics
        return value

    total = policy.accumulate([data.sequences[i] for i in chosen], loss, microbatch_tokens=60)
    return total, (prepared.metrics + measured).finish()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_all_rows(name, policy, some_sequences, gradients):
    objective, data = objective_of(OBJECTIVES[name]), experience(some_sequences(12), flat=[0, 2])
    chosen = [7, 0, 3, 11, 10, 1, 8, 4, 6]
    prepared = prepare(objective, data, chosen, HOW)
    before, counted = plain(policy, objective, data, chosen, prepared)
    wanted = gradients(policy)
    policy.base.model.zero_grad()
    total, measured = accumulate(policy, objective, data, chosen, prepared, HOW, Suspects())
    found = (prepared.metrics + measured).finish()
    assert total == pytest.approx(before, abs=1e-12)
    torch.testing.assert_close(gradients(policy), wanted, atol=1e-12, rtol=1e-12)
    for metric in counted:
        if not metric.startswith(FEWER):
            assert found[metric] == pytest.approx(counted[metric], abs=1e-12), metric


def test_only_rows_that_teach_are_read(policy, some_sequences, monkeypatch):
    objective, data = objective_of("gspo"), experience(some_sequences(12), flat=[0, 2])
    chosen = list(range(12))
    seen = []
    read = policy.accumulate
    monkeypatch.setattr(
        policy, "accumulate", lambda *args, rows, **kwargs: seen.extend(rows) or read(*args, rows=rows, **kwargs)
    )
    accumulate(policy, objective, data, chosen, prepare(objective, data, chosen, HOW), HOW, Suspects())
    assert seen == [3, 4, 5, 9, 10]


def test_where_no_row_teaches_the_gradient_is_a_zero_and_the_moments_go_on(policy, some_sequences, gradients, weights):
    objective, data = objective_of("gspo"), experience(some_sequences(6), flat=[1])
    for chosen in ([0, 1, 2], [3, 4, 5]):
        accumulate(policy, objective, data, chosen, prepare(objective, data, chosen, HOW), HOW, Suspects())
        last, before = gradients(policy), weights(policy)
        policy.step()
    assert not any(gradient.any() for gradient in last.values())
    assert any((weight != before[name]).any() for name, weight in weights(policy).items())


@pytest.mark.parametrize("kind", SURROGATES)
def test_the_surrogates_that_move_a_row_without_an_advantage_are_the_ones_named(kind, some_sequences):
    objective = objective_of({"surrogate": {"kind": kind, **({"share": 0.9} if kind == "kl_cov" else {})}})
    data = experience(some_sequences(6), flat=[0, 1])
    data.advantages[:1] = 1e-9  # covariances exist, and hardly a gradient
    prepared = prepare(objective, data, list(range(6)), HOW)
    log_probs = (data.old_log_probs - 0.3).requires_grad_()
    objective.loss(log_probs, prepared.rows())[0].backward()
    moved = (log_probs.grad != 0).any(1)
    assert not moved[~objective.teaching(prepared.tensors)].any()
    assert moved[objective.teaching(prepared.tensors)].any()
