"""Policies small enough to be made anew in every test, and folders with tiny models of several families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.spec.model import Lora, ModelSpec, TinyConfig
from service.spec.tiny import TINY_CHARACTERS
from service.spec.training import OptimizerSpec, Schedule
from workers.policy.base import Base
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.score.layout import Sequence
from workers.policy.tiny import tiny_tokenizer

TINY = TinyConfig(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=64)
LORA = Lora(rank=4, alpha=8, dropout=0.0)

VOCABULARY = 3 + len(TINY_CHARACTERS)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    "qwen2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    # Soft-capped logits, and a window shorter than the sequences.
    "gemma2": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "max_position_embeddings": 64,
    },
    "granite": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "logits_scaling": 4.0,
        "max_position_embeddings": 64,
    },
    # Its cache holds convolution states beside keys and values.
    "lfm2": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "max_position_embeddings": 64,
    },
    # Its routed experts are no linear layers.
    "gpt_oss": {
        **SMALL,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    },
    # Of this family's routed experts peft puts adapters on all, if all linear layers are asked for.
    "qwen3_moe": {
        **SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    # It has routed experts, and linear layers of the same names in a shared expert and in its first, dense layer.
    "deepseek_v3": {
        **SMALL,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "max_position_embeddings": 64,
    },
    "mixtral": {
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    # Its rotary factors change for a whole batch with one row that is longer than 12 tokens.
    "phi3": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    },
    # These two cannot be sampled: one takes a cache of its own only, the other keeps a state that no cache holds.
    "minimax": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
    },
}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A plain transformers folder with a random model of the family, made once."""
    root = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            tokenizer = tiny_tokenizer(64)
            shape = {**FAMILIES[family], "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
            with torch.random.fork_rng():
                torch.manual_seed(1)
                AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(folder)
            tokenizer.save_pretrained(str(folder))
        return folder

    return make


def load(
    model: ModelSpec | None = None,
    *,
    on: Base | None = None,
    name: str = "mine",
    steps: int = 8,
    seed: int = 0,
    optimizer: OptimizerSpec | None = None,
    learning_rate: float = 1e-2,
    schedule: Schedule | None = None,
    weights_from: Path | None = None,
    optimizer_from: Path | None = None,
    new_schedule: bool = False,
) -> Learner:
    """A learner on a base of its own, or on one that is there."""
    model = model or ModelSpec(source="tiny", tiny=TINY)
    return Learner(
        on or base(model, weights_from),
        adapter_of(model),
        name=name,
        optimizer=optimizer or OptimizerSpec(learning_rate=learning_rate, schedule=schedule or Schedule()),
        steps=steps,
        seed=seed,
        start=Start(weights_from, optimizer_from, new_schedule),
    )


@pytest.fixture(name="load", scope="session")
def load_fixture() -> Callable[..., Learner]:
    return load


def base(model: ModelSpec, checkpoint: Path | None = None) -> Base:
    return Base.load(model, device="cpu", threads=1, checkpoint=checkpoint)


@pytest.fixture(name="base")
def base_fixture() -> Callable[..., Base]:
    return base


def learn(policy: Learner, step: int, **kwargs: Any) -> float:
    """One optimizer step of cross-entropy on sequences that depend on `step` only."""
    sequences = some_sequences(6, seed=step)
    tokens = sum(len(sequence.completion) for sequence in sequences)
    loss = policy.accumulate(sequences, lambda log_probs, rows: -log_probs.sum() / tokens, **kwargs)
    policy.step()
    return loss


def some_sequences(count: int, *, seed: int = 0) -> list[Sequence]:
    """Ragged prompts and answers over the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [Sequence(tokens(1, 9), tokens(1, 11)) for _ in range(count)]


@pytest.fixture(name="learn")
def learn_fixture() -> Callable[..., float]:
    return learn


@pytest.fixture(name="some_sequences")
def some_sequences_fixture() -> Callable[..., list[Sequence]]:
    return some_sequences


def weights(policy: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.base.model.named_parameters()}


@pytest.fixture(name="weights")
def weights_fixture() -> Callable[[Learner], dict[str, torch.Tensor]]:
    return weights


def gradients(policy: Learner) -> dict[str, torch.Tensor]:
    """A copy of the gradients that were accumulated in the float32 weights."""
    return {n: p.grad.clone() for n, p in policy.base.model.named_parameters() if p.grad is not None}


@pytest.fixture(name="gradients")
def gradients_fixture() -> Callable[[Learner], dict[str, torch.Tensor]]:
    return gradients


@pytest.fixture
def tiny_spec() -> ModelSpec:
    return ModelSpec(source="tiny", tiny=TINY)


@pytest.fixture
def tiny_lora_spec() -> ModelSpec:
    return ModelSpec(source="tiny", tiny=TINY, adapter=LORA)
