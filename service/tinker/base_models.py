"""Base models as clients of the Tinker wire name them: which layers an adapter sits on, and where the tokenizer is."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from service.jobs.model_folder import context_of, read_config
from service.settings import Settings
from service.spec.model import TinyConfig
from service.spec.tiny import TINY_CHARACTERS
from service.tinker.requests import LoraConfig

ALPHA = 32  # of every adapter, whatever its rank
ATTENTION, FEED_FORWARD, HEAD = "attn", "mlp", "unembed"

# The linear layers by the model_type of a config.json; most families have Llama's.
LLAMA = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj"),
    FEED_FORWARD: ("gate_proj", "up_proj", "down_proj"),
    HEAD: ("lm_head",),
}
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {ATTENTION: ("c_attn",), FEED_FORWARD: ("c_fc", "mlp.c_proj"), HEAD: ("lm_head",)},
    "gpt_neox": {
        ATTENTION: ("query_key_value", "attention.dense"),
        FEED_FORWARD: ("dense_h_to_4h", "dense_4h_to_h"),
        HEAD: ("embed_out",),
    },
    "phi3": {ATTENTION: ("qkv_proj", "o_proj"), FEED_FORWARD: ("gate_up_proj", "down_proj"), HEAD: ("lm_head",)},
}


def adapter(source: str, config: LoraConfig) -> dict[str, Any]:
    """The adapter section of a spec. `source`: resolved. Raises ValueError if nothing is to be trained."""
    wanted = ((ATTENTION, config.train_attn), (FEED_FORWARD, config.train_mlp), (HEAD, config.train_unembed))
    layers = LAYERS.get(_config(source).get("model_type", ""), LLAMA)
    names = [name for part, wants in wanted if wants for name in layers[part]]
    if not names:
        raise ValueError("train_attn, train_mlp and train_unembed are all false: nothing would be trained")
    return {"kind": "lora", "rank": config.rank, "alpha": ALPHA, "target_modules": names}


def trained_parts(target_modules: Iterable[str] | str) -> dict[str, bool]:
    """What `adapter` was asked for, read from its layers."""
    if isinstance(target_modules, str):  # all-linear: all but the head
        return {"train_attn": True, "train_mlp": True, "train_unembed": False}
    names = set(target_modules)
    tables = (LLAMA, *LAYERS.values())
    return {f"train_{part}": any(names.issuperset(table[part]) for table in tables) for part in (ATTENTION, FEED_FORWARD, HEAD)}


def architecture(source: str) -> str | None:
    return "llama" if source == "tiny" else _config(source).get("model_type")


def context(source: str, tiny: dict[str, Any] | None) -> int | None:
    """The longest sequence in tokens; None if it is not known here."""
    if source == "tiny":
        return TinyConfig.model_validate(tiny or {}).context
    return context_of(_config(source))


def _config(source: str) -> dict[str, Any]:
    """The config.json of a folder; {} for others, whose config only a worker can read."""
    try:
        return read_config(Path(source)) if Path(source).is_absolute() else {}
    except ValueError:
        return {}


def offered(settings: Settings) -> list[tuple[str, int | None]]:
    """The models that are named to who asks: the built-in one and the operator's folders, with their context lengths."""
    folders = sorted(path.parent for path in settings.local_models_dir.glob("**/config.json"))
    names = [(str(folder.relative_to(settings.local_models_dir)), context(str(folder), None)) for folder in folders]
    return [("tiny", context("tiny", None)), *names]


# ---------------------------------------------------------------- tokenizers


def tokenizer_id(source: str, settings: Settings) -> str:
    """What a client's AutoTokenizer can load: a hub id, or a folder, which the client must be able to read."""
    return str(tiny_tokenizer(settings)) if source == "tiny" else source


def tiny_tokenizer(settings: Settings) -> Path:
    """A folder with the tokenizer of the built-in model, written at first use."""
    folder = (settings.data_dir / "tokenizers" / "tiny").absolute()
    if not (folder / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", _tiny()), ("tokenizer_config.json", TINY_CONFIG)):
            temporary = folder / f"{name}.{uuid4().hex}"  # several processes and threads may find it missing
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(folder / name)
    return folder


PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TINY_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": EOS,
    "unk_token": UNKNOWN,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}


def _tiny() -> dict[str, Any]:
    special = (PAD, EOS, UNKNOWN)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **added} for index, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate((*special, *TINY_CHARACTERS))},
            "unk_token": UNKNOWN,
        },
    }
