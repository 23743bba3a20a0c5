"""Any causal language model of transformers: what the sampler says of its tokens is what the scorer says of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.spec.model import Full, Lora, ModelSpec
from workers.policy.errors import PolicyFailed
from workers.policy.score.layout import Sequence

PROMPTS = ["rev 123>", "a", "what is 7 + 8 ?\n", "b c", "rev 123456>"]
FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "gemma2", "granite", "lfm2"]
POST_PROCESSED = {"gemma2", "granite"}


def by_hand(model, prompt, completion):
    """One sequence alone, no padding, no cache: what everything else must agree with."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_agree_with_scores_and_with_the_plain_model(family, family_folder, load):
    folder = family_folder(family)
    policy = load(ModelSpec(source=str(folder), dtype="float32", adapter=Full()))
    prompts = [policy.text.encode(prompt) for prompt in PROMPTS]
    groups = policy.sample(prompts, group_size=12, max_tokens=14, temperature=1.0, seed=3)
    sequences = [Sequence(prompt, answer.tokens) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    sampled = [answer.log_probs for group in groups for answer in group]
    assert len({len(sequence.completion) for sequence in sequences}) > 2, (
        "answers of several lengths, so that rows were dropped"
    )

    scores = policy.score(sequences)
    log_probs, mask = scores.log_probs, scores.mask
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, sequence in enumerate(sequences):
        length = len(sequence.completion)
        assert mask[row].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        torch.testing.assert_close(log_probs[row, :length], torch.tensor(sampled[row]), atol=1e-4, rtol=0)
        torch.testing.assert_close(log_probs[row, :length], by_hand(plain, *sequence), atol=1e-4, rtol=0)
        assert not log_probs[row, length:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_applied_alone_only_where_forward_adds_nothing(family, family_folder, load):
    policy = load(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=Full()))
    assert policy.facts["head_on_answers_only"] is (family not in POST_PROCESSED)


def test_no_row_gets_where_its_factors_depend_on_the_rows_beside_it(family_folder, load, gradients):
    policy = load(ModelSpec(source=str(family_folder("phi3")), dtype="float32", adapter=Full()))
    assert policy.facts["context"] == policy.text.context == 12  # the config says 64

    def gradient(longest: int, microbatch_tokens: int) -> torch.Tensor:
        rows = [Sequence([5, 6], [7, 8, 9]), Sequence([5] * 2, [4] * (longest - 2))]
        policy._optimizer.zero_grad()
        policy.accumulate(rows, lambda log_probs, _: -log_probs.sum(), microbatch_tokens=microbatch_tokens)
        return torch.cat([one.flatten() for one in gradients(policy).values()])

    torch.testing.assert_close(gradient(12, 1), gradient(12, 1000), atol=1e-4, rtol=0)
    beyond = gradient(14, 1) - gradient(14, 1000)  # the negative control: the last token of a row is not read
    assert beyond.abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "why"), [("minimax", "cache of its own"), ("recurrent_gemma", "a state outside of its cache")]
)
def test_a_model_that_cannot_be_sampled_is_refused_at_load(family, why, family_folder, base):
    with pytest.raises(PolicyFailed, match="cannot be sampled") as failed:
        base(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=Full()))
    assert failed.value.code == "model_unsupported"
    assert why in failed.value.detail


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "lfm2"])
def test_a_lora_adapter_learns_on_every_family(family, family_folder, load, learn):
    adapter = Lora(rank=4, alpha=8, target_modules="all-linear")
    policy = load(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=adapter))
    losses = [learn(policy, 0) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1
