"""Scores: float32, on the answers' positions only, and the same whatever the batch."""

import pytest
import torch

from service.spec.model import Full, ModelSpec
from workers.policy.score import log_probs as module
from workers.policy.score.layout import Sequence, pad
from workers.policy.score.log_probs import Scorer


def test_a_sequence_scores_the_same_alone_and_among_others(load, some_sequences):
    policy = load()
    sequences = some_sequences(9)
    scores = policy.score(sequences)
    together, mask = scores.log_probs, scores.mask
    assert together.dtype == torch.float32 and together.shape == mask.shape == (9, max(len(s.completion) for s in sequences))
    for row, sequence in enumerate(sequences):
        alone = policy.score([sequence]).log_probs
        torch.testing.assert_close(together[row, : len(sequence.completion)], alone[0], atol=1e-5, rtol=0)


def test_temperature_divides_the_logits(load, some_sequences):
    policy = load()
    sequence = some_sequences(1)[0]
    with torch.no_grad():
        logits = policy.base.model(input_ids=torch.tensor([sequence.prompt + sequence.completion])).logits[0]
    expected = (logits / 0.7).log_softmax(-1)[len(sequence.prompt) - 1 : -1]
    expected = expected.gather(-1, torch.tensor(sequence.completion).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(policy.score([sequence], temperature=0.7).log_probs[0], expected, atol=1e-5, rtol=0)


def test_entropy_is_that_of_the_whole_distribution(load, some_sequences):
    policy = load()
    sequence = some_sequences(1)[0]
    entropy = policy.score([sequence]).entropy
    with torch.no_grad():
        logits = policy.base.model(input_ids=torch.tensor([sequence.prompt + sequence.completion])).logits[0]
    expected = torch.distributions.Categorical(logits=logits[len(sequence.prompt) - 1 : -1]).entropy()
    torch.testing.assert_close(entropy[0], expected, atol=1e-5, rtol=0)


def test_an_empty_answer_is_fully_masked(load):
    scores = load().score([Sequence([5, 6], []), Sequence([5], [7, 8])])
    assert scores.mask.tolist() == [[False, False], [True, True]]
    assert not scores.log_probs[0].any() and scores.log_probs[1].all()


def test_no_sequences_give_empty_tensors(load):
    scores = load().score([])
    assert scores.log_probs.shape == scores.entropy.shape == scores.mask.shape == (0, 0)


def test_an_empty_prompt_is_refused(load):
    with pytest.raises(ValueError, match="sequence 0 has an empty prompt"):
        load().score([Sequence([], [5])])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_never_makes_logits_for_the_whole_batch(family, family_folder, load):
    policy = load(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=Full()))
    rows: list[int] = []
    policy.base.model.lm_head.register_forward_hook(
        lambda layer, inputs, output: rows.append(output.numel() // output.shape[-1])
    )
    policy.score([Sequence(list(range(3, 33)), [5, 6, 7]), Sequence(list(range(3, 33)), [5])])
    assert rows == [4] if family == "llama" else rows == [2 * 3]  # the valid positions; or from the first answer's start


def test_chunks_of_the_head_change_neither_scores_nor_gradients(load, some_sequences, monkeypatch):
    policy = load()
    batch = pad(some_sequences(8), 0, torch.device("cpu"))

    def run():
        policy.base.model.zero_grad()
        log_probs, entropy = Scorer(policy.base.model)(batch)
        alone = Scorer(policy.base.model).log_probs(batch.input_ids_B_L, batch.positions_N, batch.targets_N)
        for each in (log_probs, alone):
            (each * torch.linspace(-1, 1, len(each))).sum().backward()
        return log_probs.detach(), entropy, alone.detach(), [p.grad.clone() for p in policy.base.model.parameters()]

    whole = run()
    for budget in ("CHUNK_BYTES", "TRAINED_CHUNK_BYTES"):
        monkeypatch.setattr(module, budget, 4 * policy.base.model.config.vocab_size * 7)  # seven positions at a time
    chunked = run()
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)


def test_bfloat16_weights_are_scored_with_a_float32_softmax(load, some_sequences):
    sequences = some_sequences(4)
    policy = load(ModelSpec(source="tiny", dtype="bfloat16"))
    scores = policy.score(sequences)
    log_probs, mask = scores.log_probs, scores.mask
    assert log_probs.dtype == torch.float32
    # Rounded to bfloat16 they would lie on a coarse grid.
    assert (log_probs[mask] != log_probs[mask].bfloat16().float()).float().mean() > 0.9
