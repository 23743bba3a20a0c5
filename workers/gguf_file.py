"""A merged model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

Tensors and fields are named and laid out as llama.cpp's own converter (convert_hf_to_gguf.py) does it, by the package `gguf`
of that project. Only what the tests prove against llama.cpp is written; anything else is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map, quants
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES

from workers.policy.errors import PolicyFailed, Subject
from workers.policy.load import Loaded

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT16_MAX = float(np.finfo(np.float16).max)
LARGEST = {  # magnitudes: those of q8_0 are at most 127 times a scale in float16
    GGMLQuantizationType.F16: FLOAT16_MAX,
    GGMLQuantizationType.BF16: float(torch.finfo(torch.bfloat16).max),
    GGMLQuantizationType.Q8_0: 127 * FLOAT16_MAX,
}
OTHERWISE = "export it with --merged; llama.cpp's own convert_hf_to_gguf.py reads that folder and knows more models"
LARGER = "export it with --gguf f32 or bf16, if its weights are finite"
CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before its merges, and llama.cpp's name for that, with whether whole words are looked up first.
PRE_TOKENIZERS = {
    (("split", CASES + WORDS % r"\p{N}"), ("bytes", False)): ("qwen2", False),
    (("split", CASES + WORDS % r"\p{N}{1,3}"), ("bytes", False)): ("llama-bpe", True),
    (("digits",), ("bytes", True)): ("smollm", False),
    (("bytes", True),): ("gpt-2", False),
}


def write_gguf(loaded: Loaded, path: Path, outtype: str) -> None:
    """`outtype` is that of the matrices: a key of OUTTYPES; vectors stay float32. Raises PolicyFailed
    (model_unsupported), before it writes, for what is not proved."""
    config: Any = loaded.model.config
    architecture = _architecture(type(loaded.model).__name__, config)
    quantization, file_type = OUTTYPES[outtype]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    _add_tokenizer(writer, loaded.tokenizer, config.vocab_size)
    _add_shape(writer, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)  # of the layout of blocks, which llama.cpp asks for in quantized files
    for name, tensor in _tensors(loaded.model, architecture):
        values = tensor.float().numpy()
        kind = quantization if values.ndim > 1 else GGMLQuantizationType.F32
        if values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16  # as the converter does: rows are no whole number of blocks
        if not float(abs(values).max()) <= LARGEST.get(kind, FLOAT32_MAX):
            raise _refused(f"{name} holds {float(abs(values).max()):g}, which {kind.name.lower()} does not", LARGER)
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(name: str, config: Any) -> MODEL_ARCH:
    if name not in ARCHITECTURES:
        raise _refused(f"{name} is no architecture that is written as GGUF; these are: {', '.join(ARCHITECTURES)}")
    rope = config.rope_parameters
    allowed = ("default", "llama3") if name == "LlamaForCausalLM" else ("default",)
    refused = {
        f"its positions are scaled in the way {rope['rope_type']!r}": rope["rope_type"] not in allowed,
        "only a part of each head is rotated": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "its attention slides over a window": set(getattr(config, "layer_types", None) or ()) - {"full_attention"},
        f"its activation is {config.hidden_act!r}": config.hidden_act != "silu",
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise _refused(f"this {name} is not written as GGUF: {'; '.join(reasons)}")
    return ARCHITECTURES[name]


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: Any, architecture: MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    config, names = model.config, get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise _refused(f"its tensor {name} has no name in a GGUF file of {MODEL_ARCH_NAMES[architecture]}")
        if architecture is MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            tensor = _pairs_side_by_side(tensor, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        yield new, tensor
    if config.rope_parameters["rope_type"] == "llama3":
        rotary = model.model.rotary_emb
        plain, _ = rotary.compute_default_rope_parameters(config)
        yield "rope_freqs.weight", plain / rotary.inv_freq


def _pairs_side_by_side(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads x size, ...]: llama.cpp turns neighbours in a head of Llama; transformers the i-th of each half."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = saved["model"]
    pre = PRE_TOKENIZERS.get(_splits(saved["pre_tokenizer"]))
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    if bpe["type"] != "BPE" or pre is None or any((bpe.get(name) or value) != value for name, value in plain.items()):
        known = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
        raise _refused(f"its tokenizer is none of the byte-level BPE that are written as GGUF: {known}")
    if bpe.get("ignore_merges", False) != pre[1] or (saved["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _refused(f"its tokenizer splits text as {pre[0]}, but treats words in another way than llama.cpp does for it")
    most = max([*bpe["vocab"].values(), *(added["id"] for added in saved["added_tokens"])])
    if most >= vocab_size:
        raise _refused(f"its tokenizer has the token {most}, and the model has rows for {vocab_size}")
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    for token, index in bpe["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for added in saved["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre[0])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    for role in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if (template := tokenizer.chat_template) is not None:  # one, or several by name
        writer.add_chat_template(
            template if isinstance(template, str) else [{"name": name, "template": each} for name, each in template.items()]
        )


def _splits(saved: Any) -> tuple[tuple[Any, ...], ...] | None:
    """What a tokenizer.json's pre_tokenizer does, as a key of PRE_TOKENIZERS; None for what llama.cpp has no name for."""
    steps = saved["pretokenizers"] if saved and saved["type"] == "Sequence" else [saved]
    found: list[tuple[Any, ...]] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                found.append(("bytes", regex))
            case {"type": "Digits", "individual_digits": True}:
                found.append(("digits",))
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                found.append(("split", regex))
            case _:
                return None
    return tuple(found)


def _refused(why: str, hint: str = OTHERWISE) -> PolicyFailed:
    return PolicyFailed("model_unsupported", why, hint=hint, subject=Subject.SOURCE)
