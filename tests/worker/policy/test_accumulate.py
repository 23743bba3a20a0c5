"""Gradients: the same for every split into micro-batches, and nothing from rows that have no answer."""

import math

import pytest
import torch

from service.spec.model import Full, ModelSpec
from workers.policy.score.layout import Sequence, microbatches


def policy_loss(sequences):
    """A loss with different weights for every token, normalised over the whole list."""
    generator = torch.Generator().manual_seed(7)
    longest = max(len(sequence.completion) for sequence in sequences)
    weights = torch.randn(len(sequences), longest, generator=generator) / len(sequences)

    def loss(log_probs, rows):
        assert log_probs.shape == (len(rows), longest)
        return (log_probs.exp() * log_probs * weights[rows]).sum()

    return loss


@pytest.mark.parametrize("microbatch_tokens", [1, 17, 40, 64])
@pytest.mark.parametrize("spec", ["tiny_spec", "tiny_lora_spec"])
def test_micro_batches_change_neither_the_loss_nor_the_gradient(
    spec, microbatch_tokens, request, load, some_sequences, gradients
):
    sequences = some_sequences(11)
    results = []
    for tokens in (100_000, microbatch_tokens):
        policy = load(request.getfixturevalue(spec))
        results.append((policy.accumulate(sequences, policy_loss(sequences), microbatch_tokens=tokens), gradients(policy)))
    (loss, whole), (split_loss, split) = results
    assert len(list(microbatches(sequences, microbatch_tokens))) > 1
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    assert whole.keys() == split.keys() and any(gradient.abs().max() > 1e-4 for gradient in whole.values())
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_the_plain_model(load, some_sequences, gradients):
    sequences = some_sequences(5)
    policy = load()
    policy.accumulate(sequences, policy_loss(sequences), microbatch_tokens=30)
    ours = gradients(policy)
    plain = load().base.model
    longest = max(len(sequence.completion) for sequence in sequences)
    rows = []
    for prompt, completion in sequences:
        log_probs = plain(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = log_probs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        rows.append(torch.cat([chosen, chosen.new_zeros(longest - len(completion))]))
    policy_loss(sequences)(torch.stack(rows), torch.arange(len(sequences))).backward()
    torch.testing.assert_close(ours, {n: p.grad for n, p in plain.named_parameters()}, atol=1e-6, rtol=1e-5)


def test_calls_add_up(load, some_sequences, gradients):
    sequences = some_sequences(6)
    policy = load()
    policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum())
    once = gradients(policy)
    policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum())
    torch.testing.assert_close(gradients(policy), {name: 2 * gradient for name, gradient in once.items()}, atol=1e-4, rtol=1e-5)


def test_log_probs_handed_to_the_loss_are_the_scores(load, some_sequences):
    sequences = some_sequences(7)
    policy = load()
    scores = policy.score(sequences)
    seen = torch.full_like(scores.log_probs, float("nan"))

    def loss(log_probs, rows):
        seen[rows] = log_probs.detach()
        return log_probs.sum() * 0

    policy.accumulate(sequences, loss, microbatch_tokens=25)
    torch.testing.assert_close(seen, scores.log_probs, atol=1e-5, rtol=0)
    assert scores.mask.any()


def test_rows_without_an_answer_bring_a_zero_with_a_graph(load, gradients):
    policy = load()
    loss = policy.accumulate([Sequence([5, 6], []), Sequence([7], [])], lambda log_probs, rows: log_probs.sum())
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients(policy).values())
    assert policy.step()["skipped"] is False


def test_an_empty_list_is_a_loss_of_zero(load):
    assert load().accumulate([], lambda log_probs, rows: log_probs.sum()) == 0.0


def test_models_with_dropout_of_their_own_learn_without_it(family_folder, load, some_sequences):
    spec = ModelSpec(source=str(family_folder("gpt2")), dtype="float32", adapter=Full())  # 0.1 by default
    policy = load(spec)
    assert policy.base.model.config.resid_pdrop == 0.1
    sequences = some_sequences(4)
    losses = {policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum()) for _ in range(2)}
    assert len(losses) == 1
    assert math.isclose(losses.pop(), policy.score(sequences).log_probs.sum().item(), rel_tol=1e-5)
