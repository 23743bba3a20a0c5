#!/usr/bin/env bash
# transformers 5.23.0 reading GGUF files that gguf 0.19.0 wrote as llama.cpp's own converter lays them out.
#
# Llama 3's scaled positions are in such a file as a tensor, rope_freqs.weight, by which llama.cpp divides the frequencies. One
# would guess that from_pretrained(gguf_file=...) reads it back, or says that it cannot. Seen: it leaves the tensor out
# without a word, the config has plain positions, and the logits are those of another model; the same file of a model without
# scaling is read back to the bit. Of a Qwen3 whose heads have 32 numbers (attention.key_length says so) it expects heads of 128.
#
# Seen on 2026-11-29, Python 3.11: largest difference of logits 0 without scaling, 5.2 with it; head_dim 128.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - "$folder" <<'PY'
import sys
from pathlib import Path

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPE = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=512)
SCALED = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def written(model, architecture, name, head):
    config, folder = model.config, Path(sys.argv[1]) / name
    folder.mkdir()
    writer = GGUFWriter(folder / "model.gguf", architecture.name.lower())
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(96)
    names = get_tensor_name_map(architecture, 2)
    for key, tensor in model.state_dict().items():
        if architecture is MODEL_ARCH.LLAMA and (".q_proj." in key or ".k_proj." in key):
            tensor = tensor.reshape(4, 2, -1, 64).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    if config.rope_parameters["rope_type"] == "llama3":
        rotary = model.model.rotary_emb
        plain = 1.0 / 1e4 ** (torch.arange(0, head, 2) / head)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


torch.manual_seed(0)
tokens = torch.randint(0, 96, (1, 64))
off = {}
for name, rope in (("plain", dict(rope_type="default", rope_theta=1e4)), ("scaled", SCALED)):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()
    for parameter in model.parameters():
        parameter.data = 0.15 * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0)
    back = AutoModelForCausalLM.from_pretrained(written(model, MODEL_ARCH.LLAMA, name, 16), gguf_file="model.gguf",
                                                dtype=torch.float32)
    with torch.no_grad():
        off[name] = float((back(tokens).logits - model(tokens).logits).abs().max())
    print(f"{name}: positions read as {back.config.rope_parameters['rope_type']}, logits differ by up to {off[name]:.2g}")
qwen = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32))
head = AutoConfig.from_pretrained(written(qwen, MODEL_ARCH.QWEN3, "qwen3", 32), gguf_file="model.gguf").head_dim
print(f"Qwen3: the file says heads of 32, the config {head}")
assert off["plain"] == 0 and off["scaled"] > 0.5 and back.config.rope_parameters["rope_type"] == "default" and head == 128, "it changed"
PY
