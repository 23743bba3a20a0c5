"""A tokenizer of bytes with marks, and chat templates of the shapes that models ship."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workers.policy.text import Text

HEAD = "{% for m in messages %}"
ASK = "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
# ChatML; the same with an empty think block in the last turn (Qwen3); one whose prompt opens the block (DeepSeek R1).
PLAIN = HEAD + ASK + "{% else %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n" + TAIL + "{% endif %}"
NO_THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
EMPTY_BLOCK = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
THINKS = PLAIN.replace("{% else %}<|im_start|>assistant\n", "{% else %}<|im_start|>assistant\n" + EMPTY_BLOCK)
THINKS = THINKS.removesuffix("{% endif %}") + NO_THINKING + "{% endif %}"
OPENS = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo ho"}
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """One token a byte, and marks that are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|tool|>"]})
    made.chat_template = template
    return made


def text_of(load, tokens: PreTrainedTokenizerFast) -> Text:
    model = load().base.model
    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    model.generation_config.eos_token_id = None
    return Text(tokens, model)


def chat_model(folder: Path, **config: float) -> str:
    """A plain transformers folder: a small Llama with random weights, that tokenizer and a chat template."""
    tokens = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, **config}
    shaped = AutoConfig.for_model("llama", vocab_size=len(tokens), max_position_embeddings=128, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(shaped).save_pretrained(folder)
    tokens.save_pretrained(str(folder))
    return str(folder)
