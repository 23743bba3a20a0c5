#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: LoRA with target_modules="all-linear" on mixtures of experts.
#
# Routed experts are one weight for all of them and no nn.Linear, so one would guess that all-linear leaves them out, and takes
# every nn.Linear but the head. Seen: it adapts the experts of mixtral, qwen3_moe and olmoe, and not those of gpt_oss and
# llama4; and in deepseek_v3 it adapts the experts, and leaves out real nn.Linear layers (gate_proj, up_proj and down_proj of
# the dense layer and of the shared expert). Nothing is said about either.
#
# Seen on 2026-11-28, Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=48, max_position_embeddings=64, eos_token_id=1, bos_token_id=0, pad_token_id=0)
MLA = dict(moe_intermediate_size=48, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
           first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
FAMILIES = {  # its shape, whether its experts get an adapter, and which linear layers get none
    "mixtral": (dict(num_local_experts=4), True, set()),
    "qwen3_moe": (dict(moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=8), True, set()),
    "olmoe": (dict(num_experts=4, num_experts_per_tok=2), True, set()),
    "gpt_oss": (dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8), False, set()),
    "llama4_text": (dict(intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, head_dim=8), False, set()),
    "deepseek_v3": (MLA, True, {"gate_proj", "up_proj", "down_proj"}),
}
for family, (shape, adapts, left_out) in FAMILIES.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **shape}))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    paths = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if ".lora_A" in name}
    experts = any(".experts" in path for path in paths)
    without = {path.rsplit(".", 1)[-1] for path in linear - paths}
    print(f"{family:12} experts adapted: {experts!s:5} linear layers without an adapter: {', '.join(sorted(without)) or 'none'}")
    assert (experts, without) == (adapts, left_out), "it changed"
PY
