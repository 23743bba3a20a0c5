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
from workers.policy.policy import Policy, Sequence
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
    steps: int = 8,
    seed: int = 0,
    learning_rate: float = 1e-2,
    schedule: Schedule | None = None,
    reference: bool = False,
    reference_from: Path | None = None,
    weights_from: Path | None = None,
    optimizer_from: Path | None = None,
    **more: Any,
) -> Policy:
    return Policy.load(
        model or ModelSpec(source="tiny", tiny=TINY),
        optimizer=OptimizerSpec(learning_rate=learning_rate, schedule=schedule or Schedule()),
        optimizer_steps=steps,
        seed=seed,
        device="cpu",
        threads=1,
        reference=reference,
        reference_from=reference_from,
        weights_from=weights_from,
        optimizer_from=optimizer_from,
        **more,
    )


@pytest.fixture(name="load")
def load_fixture() -> Callable[..., Policy]:
    return load


def learn(policy: Policy, step: int, **kwargs: Any) -> float:
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


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


@pytest.fixture(name="weights")
def weights_fixture() -> Callable[[Policy], dict[str, torch.Tensor]]:
    return weights


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """A copy of the gradients that were accumulated in the float32 weights."""
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.fixture(name="gradients")
def gradients_fixture() -> Callable[[Policy], dict[str, torch.Tensor]]:
    return gradients


@pytest.fixture
def tiny_spec() -> ModelSpec:
    return ModelSpec(source="tiny", tiny=TINY)


@pytest.fixture
def tiny_lora_spec() -> ModelSpec:
    return ModelSpec(source="tiny", tiny=TINY, adapter=LORA)
