"""How this machine rounds. Torch's name for the CPU's instructions is not enough: one build of MKL takes other paths on AMD's
processors than on Intel's, both with AVX-512."""

import hashlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def rounding() -> str:
    """A hash of the weights of a small Llama after a few steps of AdamW: the same where results are, bit for bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for length in (3, 7, 12, 20):
            tokens = torch.randint(48, (16, length))
            model(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
