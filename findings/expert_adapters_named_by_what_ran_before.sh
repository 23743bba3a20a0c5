#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: the names of LoRA weights on stacked experts (target_parameters).
#
# Two parameters of one module get their adapters nested into each other, so that one of them is saved as
# experts.lora_B.weight and the other as experts.base_layer.lora_B.weight. One would guess that the same config on the same model
# always gives the same weight the same name. Seen: it depends on whether an earlier adapter, on one of the two parameters, has run
# a forward pass before it was unloaded: after that the two names have changed places, so that the same name in a saved adapter
# stands for another weight in a process of the other kind.
#
# Seen on 2026-11-28, Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import GptOssConfig, GptOssForCausalLM

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def outputs_by_name(*, forward: bool) -> dict[str, int]:
    """How many outputs the weight of each saved name has: 64 belong to gate_up_proj, 32 to down_proj."""
    model = get_peft_model(GptOssForCausalLM(GptOssConfig(**SHAPE)), LoraConfig(r=2, target_modules=[], target_parameters=BOTH[:1]))
    if forward:
        model(torch.arange(8)[None])
    again = get_peft_model(model.unload(), LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    saved = get_peft_model_state_dict(again)
    return {name.split(".mlp.")[1]: weight.shape[0] for name, weight in saved.items() if "lora_B" in name}


before, after = outputs_by_name(forward=False), outputs_by_name(forward=True)
for name in before:
    print(f"{name:36} outputs: {before[name]} without a forward pass before, {after[name]} with one")
assert before == {"experts.base_layer.lora_B.weight": 64, "experts.lora_B.weight": 32}, "it changed"
assert after == {"experts.base_layer.lora_B.weight": 32, "experts.lora_B.weight": 64}, "it changed"
PY
