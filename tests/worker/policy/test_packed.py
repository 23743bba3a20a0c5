"""Packed sequences: the same log-probs and gradients as padded ones, for models where that can be."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm
from transformers import PhimoeConfig, PhimoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from service.spec.model import Full, Lora, ModelSpec
from workers.policy.score.layout import Sequence
from workers.policy.score.log_probs import Scorer, both
from workers.policy.score.packed import packed_batches

PROMPTS = [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7], [13]
ANSWERS = [20, 21, 22, 23, 24], [20], [25, 26, 27], [], [21, 20]
ROWS = st.lists(st.tuples(st.sampled_from(PROMPTS), st.sampled_from(ANSWERS)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def models(load):
    """A full and a LoRA learner with float64 weights."""
    found = [load(), load(ModelSpec(source="tiny", adapter=Lora(rank=4, alpha=8, dropout=0.0)))]
    for policy in found:
        policy.base.model.double()
        for module in policy.base.model.modules():
            if isinstance(module, LlamaRMSNorm):  # which computes in float32, whatever it gets
                shape, weight, eps = module.weight.shape, module.weight, module.variance_epsilon
                setattr(module, "forward", partial(rms_norm, normalized_shape=shape, weight=weight, eps=eps))  # noqa: B010
        assert policy.base.scorer.packs
    with torch.no_grad():
        for name, weight in found[1].base.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    return found


def learnt(policy, sequences, tokens):
    """The loss and its gradients, every token with a weight of its own."""
    longest = max(len(sequence.completion) for sequence in sequences)
    weights = torch.randn(len(sequences), longest, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    policy.base.model.zero_grad()
    loss = policy.accumulate(sequences, lambda lp, rows: (lp * lp.exp() * weights[rows]).sum(), microbatch_tokens=tokens)
    return loss, {name: p.grad.clone() for name, p in policy.base.model.named_parameters() if p.grad is not None}


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, tokens=st.sampled_from([1, 12, 25, 4096]), lora=st.booleans())
def test_packed_gradients_are_the_padded_ones(models, rows, tokens, lora):
    policy, sequences = models[lora], [Sequence(*row) for row in rows]
    results = []
    for packs in (True, False):
        policy.base.scorer.packs = packs
        results.append(learnt(policy, sequences, tokens))
    policy.base.scorer.packs = True
    (loss, packed), (plain_loss, plain) = results
    assert loss == pytest.approx(plain_loss, abs=1e-12)
    torch.testing.assert_close(packed, plain, atol=1e-12, rtol=1e-12)


@given(rows=ROWS, tokens=st.integers(1, 60))
def test_every_row_is_in_one_batch_of_so_many_real_tokens(rows, tokens):
    sequences = [Sequence(*row) for row in rows]
    batches = packed_batches(sequences, tokens)
    if batches is None:
        return
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        prompts = {tuple(sequences[row].prompt) for row in batch}
        answers = {(tuple(sequences[row].prompt), tuple(sequences[row].completion)) for row in batch}
        assert len(batch) == 1 or sum(map(len, prompts)) + sum(len(answer) for _, answer in answers) <= tokens


def test_a_long_prompt_is_read_once_though_it_leaves_no_room_for_its_answers():
    group = [Sequence([5] * 1024, [6 + answer] * 64) for answer in range(8)]
    assert packed_batches(group, 768, long_prompts=True) == [list(range(8))]
    assert packed_batches(group, 768) is None, "each would stand alone"
    more = [Sequence([5] * 1024, [6 + answer] * 64) for answer in range(20)]  # 1280 tokens of answers
    batches = packed_batches([*more, Sequence([4] * 8, [9])], 768, long_prompts=True)
    assert batches is not None and [len(batch) for batch in batches[:2]] == [10, 10] and batches[2:] in ([], [[20]])
    short = [Sequence([5] * 240, [6 + answer] * 63) for answer in range(16)]  # which have room in twos
    assert packed_batches(short, 768, long_prompts=True) == packed_batches(short, 768)
    some_short = [Sequence([5] * 380, [6 + answer] * length) for answer, length in enumerate([100] * 5 + [3] * 5)]
    assert packed_batches(some_short, 768, long_prompts=True) == [list(range(10))]
    many = [Sequence([5] * 1024, [6 + answer]) for answer in range(40)]  # 41,000 keys
    batches = packed_batches(many, 768, long_prompts=True)
    assert batches is not None and max(map(len, batches)) * 1025 <= 16 * 1025


@pytest.mark.parametrize(("tokens", "passes"), [("auto", 1), (24, 3)])
def test_how_many_tokens_are_asked_for_is_kept_to(load, monkeypatch, tokens, passes):
    policy, read = load(), []
    monkeypatch.setattr(policy.base, "microbatch_tokens", 24)
    policy.base.model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: read.append(inputs[0].numel()))
    policy.accumulate(
        [Sequence([5] * 20, [6, 7, 8 + answer]) for answer in range(3)],
        lambda log_probs, rows: log_probs.sum(),
        microbatch_tokens=tokens,
    )
    assert len(read) == passes


def test_batches_are_few_and_of_about_one_size():
    sequences = [Sequence([prompt] * 64, [1] * (8 * prompt)) for prompt in range(1, 9)]  # 800 tokens
    batches = packed_batches(sequences, 768)
    assert batches is not None
    assert [sum(sum(map(len, sequences[row])) for row in batch) for batch in batches] == [440, 360]


def test_a_shared_prompt_and_equal_answers_are_read_once(load):
    policy, read = load(), []
    policy.base.model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: read.append(inputs[0].numel()))
    scores = policy.score([Sequence([5] * 20, [6, 7, 8]), Sequence([5] * 20, [7]), Sequence([5] * 20, [6, 7, 8])])
    assert read == [20 + 2]
    assert torch.equal(scores.log_probs[0], scores.log_probs[2])


def test_a_window_that_only_the_mask_knows_is_kept() -> None:
    """The trial at load is shorter than any window, so that it cannot show one."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    experts: dict[str, Any] = {
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    scorer = Scorer(PhimoeForCausalLM(PhimoeConfig(**sizes, **experts, sliding_window=16)).eval())
    sequences = [Sequence(list(range(1, 31)), [5 + answer, 6, 7]) for answer in range(8)]
    with torch.no_grad():
        [(rows, [found, _])] = scorer.each(sequences, 4096, both(), pad_id=0)
        [(_, [plain, _])] = scorer.each(sequences, 4096, both(), pad_id=0, share=False)
    assert sorted(rows) == list(range(8)) and not scorer.packs
    assert torch.equal(found, plain)


def test_rows_with_dropout_are_not_shared(load):
    policy, read = load(ModelSpec(source="tiny", adapter=Lora(rank=4, alpha=8, dropout=0.1))), []
    policy.base.model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: read.append(inputs[0].numel()))
    policy.accumulate([Sequence([5] * 20, [6, 7])] * 3, lambda log_probs, rows: log_probs.sum())
    assert read == [3 * 21]


@pytest.mark.parametrize(
    ("family", "packs"),
    [
        ("llama", True),
        ("qwen2", True),
        ("qwen3", True),
        ("gpt2", True),
        ("qwen3_moe", True),
        ("mixtral", True),
        ("gemma2", False),
        ("granite", False),
        ("lfm2", False),
        ("gpt_oss", False),
        ("phi3", False),
    ],
)
def test_a_trial_at_load_decides_which_models_are_packed(family, packs, family_folder, base, some_sequences):
    model = base(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=Full()))
    assert model.scorer.packs is packs
    assert model.model.config._attn_implementation != "ratchet_packed"
