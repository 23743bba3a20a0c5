"""GGUF files, read by llama.cpp itself: the same tokens of texts, the same log-probs, the same greedy answers."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from service.errors import JobFailed
from service.spec.model import TinyConfig
from workers.gguf_file import PRE_TOKENIZERS, write_gguf
from workers.policy.load import Loaded
from workers.policy.tiny import tiny_model, tiny_tokenizer

xllamacpp: Any = import_module("xllamacpp")

TEXT = (
    "<|im_start|>user\nWe'Ve  3 33 333 3333.5 tests, I'LL say it's so:\n\n\n \t\t 🚀 (normal) 😶\u200d🌫️ ✅ កាន់តែ ?我想在"
    "apple工作1314151天～ "
    "------======= нещо на Български ''''```\"\"\"...!!!???<|im_end|>   "
)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def tokenizer_that_splits_as(name: str) -> PreTrainedTokenizerFast:
    steps: list[Any] = []
    (splits, whole_words), *_ = ((key, value[1]) for key, value in PRE_TOKENIZERS.items() if value[0] == name)
    for kind, *of in splits:
        if kind == "bytes":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=of[0]))
        else:
            steps.append(
                pre_tokenizers.Split(Regex(of[0]), "isolated") if of else pre_tokenizers.Digits(individual_digits=True)
            )
    tokenizer: Any = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    if name == "llama-bpe":  # begins texts, as Llama 3's does
        tokenizer.post_processor = processors.TemplateProcessing(f"{special[1]} $A", special_tokens=[(special[1], 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2],
        chat_template="{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}",
    )  # fmt: skip


def model_of(kind: str, vocabulary: int) -> Any:
    """Random weights, large enough that positions, norms and biases matter."""
    shape: dict[str, Any] = {"vocab_size": vocabulary, **SHAPE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True)),
            "llama3": lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=LLAMA3, tie_word_embeddings=True)),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
            "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32)),
        }[kind]()
        for parameter in model.parameters():
            parameter.data = 0.15 * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


@contextmanager
def llama_cpp(file: Path) -> Iterator[Any]:
    """Asks llama.cpp's server in this process: (path, body) -> answer. Float32 in its cache, as in ours."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(file), 512, 1, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.port = False, 0
    server = xllamacpp.Server(params)

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield ask


@pytest.mark.parametrize(
    ("kind", "splits", "outtype", "within"),
    [
        ("llama", "smollm", "f32", 1e-4),
        ("llama3", "llama-bpe", "f32", 1e-4),
        ("llama", "gpt-2", "bf16", 0.1),
        ("qwen2", "qwen2", "f32", 1e-4),
        ("qwen3", "qwen2", "f32", 1e-4),
        ("qwen3", "qwen2", "f16", 0.02),
        ("qwen3", "qwen2", "q8_0", 0.2),
    ],
)
def test_llama_cpp_reads_the_same_model(kind: str, splits: str, outtype: str, within: float, tmp_path: Path) -> None:
    tokenizer = tokenizer_that_splits_as(splits)
    model = model_of(kind, len(tokenizer) + 7)  # as of models whose embeddings are padded
    write_gguf(Loaded(model, tokenizer, None), tmp_path / "model.gguf", outtype)
    tokens = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
        likeliest = [str(tokenizer.decode([token])) if token > 2 else "" for token in logits.argmax(-1).tolist()]
        # llama.cpp does not report a token that is special, or only a part of a character.
        asked = tokens[: next(n for n in range(48, 8, -1) if likeliest[n - 1] and likeliest[n - 1].isascii())]
        expected = torch.log_softmax(logits[len(asked) - 1], -1)
        greedy = model.generate(torch.tensor([asked]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, len(asked) :]
    with llama_cpp(tmp_path / "model.gguf") as ask:
        assert ask("/tokenize", content=TEXT, add_special=True, parse_special=True)["tokens"] == tokens
        answer = ask("/completion", prompt=asked, n_predict=16, temperature=0, n_probs=8, return_tokens=True)
        chat = ask("/apply-template", messages=[{"role": "user", "content": "Hi"}])
    found = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
    assert found == pytest.approx({token: expected[token].item() for token in found}, abs=within)
    assert len(found) == 8
    # It leaves out what begins every text anyway: Llama 3's first token, here of the template's, too.
    assert chat["prompt"].removeprefix("<|im_start|>") == "user\nHi<|im_end|>\n"
    if outtype == "f32":
        assert answer["tokens"] == greedy.tolist()


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_splits_as("qwen2")
    model = model_of("qwen2", len(tokenizer))
    write_gguf(Loaded(model, tokenizer, None), tmp_path / "model.gguf", "f32")
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_named_chat_templates_are_all_there(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_splits_as("qwen2")
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    write_gguf(Loaded(model_of("qwen2", len(tokenizer)), tokenizer, None), tmp_path / "model.gguf", "f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    found = {name: fields[name].contents() for name in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")}
    assert list(found.values()) == ["plain", "with tools"]


def test_what_is_not_proved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_splits_as("qwen2")
    tiny = tiny_tokenizer(64)
    yarn = model_of("qwen2", len(tokenizer))
    yarn.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    unknown = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=len(tokenizer)))
    whole = tokenizer_that_splits_as("qwen2")
    whole.backend_tokenizer.model.ignore_merges = True
    large, few = model_of("qwen2", len(tokenizer)), model_of("qwen2", len(tokenizer) - 1)
    large.model.layers[0].mlp.up_proj.weight.data[3, 4] = 7e4
    for model, of, says in (
        (few, tokenizer, f"has the token {len(tokenizer) - 1}, and the model has rows for {len(tokenizer) - 1}"),
        (large, tokenizer, "holds 70000, which f16 does not"),
        (unknown, tokenizer, "GPT2LMHeadModel is no architecture.*LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        (yarn, tokenizer, "'yarn'"),
        (tiny_model(TinyConfig(), tiny, torch.float32), tiny, "none of the byte-level BPE.*qwen2, llama-bpe, smollm, gpt-2"),
        (model_of("qwen2", len(whole)), whole, "treats words in another way"),
    ):
        with pytest.raises(JobFailed, match=says):
            write_gguf(Loaded(model, of, None), tmp_path / "model.gguf", "f16")
    assert not any(tmp_path.iterdir())
