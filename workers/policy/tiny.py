"""The `tiny` preset: a small Llama with random weights and a tokenizer of single characters, made from a config and a seed."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.spec.model import TinyConfig
from service.spec.tiny import TINY_CHARACTERS

SPECIAL = PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"  # tokens 0, 1 and 2


def tiny_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token per character of TINY_CHARACTERS; any other character is <unk>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *TINY_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> LlamaForCausalLM:
    """The same config gives the same weights on every machine. The global random state is not changed."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=None,
        eos_token_id=SPECIAL.index(EOS),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not the rotary frequencies: a loaded model has them in float32
    return model
