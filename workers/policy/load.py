"""From a model spec to a model and a tokenizer: the tiny preset, a folder, or a hub id; LoRA or full weights.

Only safetensors are read and no code that comes with a model is run.
"""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from service.errors import JobFailed
from service.jobs.resolve_model import PICKLED, only_pickled_weights
from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from workers.policy.tiny import tiny_model, tiny_tokenizer
from workers.seeds import derive

MODEL = "model"  # the folder inside a checkpoint
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED = "default"  # peft's name for the adapter that is trained
START = "reference"  # and ours for a frozen copy of the adapter that the job started from

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Loaded:
    """`model` is the causal language model itself; with LoRA the adapters sit inside it and `peft` is the handle on them."""

    model: PreTrainedModel
    peft: PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    revision: str | None  # the commit of a hub model

    @property
    def adapter(self) -> Literal["lora", "full"]:
        return "full" if self.peft is None else "lora"


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_model(spec: ModelSpec, device: torch.device, seed: int, weights_from: Path | None) -> Loaded:
    """The model to train: the source's weights, or those of the checkpoint folder `weights_from`."""
    adapter = spec.adapter or (Full() if spec.source == "tiny" else Lora())
    folder = None if weights_from is None else model_folder(weights_from, adapter)
    if isinstance(adapter, Full):
        return _load_base(spec, device, folder)
    saved = None if folder is None else saved_adapter(folder)
    # The base must be the very one that the adapter was trained on, also when the branch has moved since.
    base = _load_base(spec, device, None, revision=None if saved is None else saved.revision)
    peft = _add_adapter(base.model, adapter, base.revision, seed)
    if folder is not None:
        fill_adapter(peft, folder, TRAINED)
    return Loaded(base.model, peft, base.tokenizer, base.revision)


def load_frozen(spec: ModelSpec, device: torch.device, weights_from: Path | None, revision: str | None) -> PreTrainedModel:
    """Full weights that are never trained: the source's, or those of a checkpoint folder."""
    folder = None if weights_from is None else model_folder(weights_from, Full())
    return _load_base(spec, device, folder, revision=revision).model.requires_grad_(False)


def model_folder(checkpoint: Path, adapter: Lora | Full) -> Path:
    """The model's folder of a checkpoint (or that folder itself); what is in it must be what the job trains."""
    folder = checkpoint / MODEL if (checkpoint / MODEL).is_dir() else checkpoint
    held = "lora" if (folder / ADAPTER_CONFIG).is_file() else "full"
    if held != adapter.kind:
        raise _mismatch(
            f"it holds {held} weights and model.adapter asks for {adapter.kind}", f"use model.adapter {{kind: {held}}}"
        )
    return folder


def saved_adapter(folder: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def fill_adapter(peft: PeftModel, folder: Path, name: str) -> None:
    """Put a saved adapter's weights into the adapter `name`, which must have the same shape."""
    saved, ours = saved_adapter(folder), peft.peft_config[name]
    assert isinstance(ours, LoraConfig)
    if (saved.r, saved.lora_alpha) != (ours.r, ours.lora_alpha):
        raise _mismatch(
            f"its adapter has rank {saved.r} and alpha {saved.lora_alpha}; asked for are {ours.r} and {ours.lora_alpha}",
            "leave model.adapter out, or give it the checkpoint's values",
        )
    loaded = set_peft_model_state_dict(peft, load_file(folder / ADAPTER_WEIGHTS), adapter_name=name)
    missing = [key for key in loaded.missing_keys if ".lora_" in key and f".{name}." in key]
    if strangers := missing + loaded.unexpected_keys:
        raise _mismatch(
            f"its adapter does not sit on the same layers as model.adapter.target_modules, for example {strangers[0]}",
            "leave model.adapter out, or give it the checkpoint's values",
        )


def add_start_adapter(peft: PeftModel, folder: Path) -> None:
    """A second, frozen adapter with the weights that the job started from: the reference of a job that goes on from LoRA."""
    peft.add_adapter(START, saved_adapter(folder))
    fill_adapter(peft, folder, START)


def _load_base(spec: ModelSpec, device: torch.device, folder: Path | None, revision: str | None = None) -> Loaded:
    dtype = _dtype(spec, device)
    if folder is None and spec.source == "tiny":
        config = spec.tiny or TinyConfig()
        tokenizer = tiny_tokenizer(config.context)
        return Loaded(_ready(tiny_model(config, tokenizer, dtype), device), None, tokenizer, None)
    source = str(folder) if folder is not None else spec.source
    if source is None:
        raise JobFailed("model_not_found", "the spec names no model", hint="give model.source", pointer="/model/source")
    return _load_pretrained(source, None if folder is not None else revision or spec.revision, device, dtype)


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32


def _load_pretrained(source: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise _not_found(source, "there is no such folder")
    if not source.startswith(("/", ".", "~")) and os.path.exists(source):  # transformers would take it for the model
        raise _not_found(source, "it is a hub id, and also a path below this worker's working directory")
    if os.path.isdir(source) and (pickled := only_pickled_weights(Path(source))):
        raise JobFailed(
            "model_pickled",
            f"the model {source!r} is not loaded: {PICKLED.format(pickled)}",
            hint="load it where you trust it, and save_pretrained(folder, safe_serialization=True)",
            pointer="/model/source",
        )
    try:
        # A branch may move between these calls, and before the job resumes: from here on it is a commit.
        found = cached_file(source, "config.json", revision=revision)
        if found is None:
            raise _not_found(source, "there is no config.json in it")
        commit = None if Path(source).is_dir() else extract_commit_hash(found, None)
        safe: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
        )
    except OSError as error:
        raise _not_found(source, str(error)) from error
    except (ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _unsupported(source, str(error)) from error
    model, report = loaded
    if missing := report["missing_keys"]:
        raise _unsupported(source, f"{len(missing)} weights are missing, for example {min(missing)}")
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise _unsupported(source, f"{type(model).__name__} has no key-value cache to sample with")
    return Loaded(_ready(model, device), None, tokenizer, commit)


def _ready(model: Any, device: torch.device) -> PreTrainedModel:
    return model.to(device).eval()


def _add_adapter(model: PreTrainedModel, adapter: Lora, revision: str | None, seed: int) -> PeftModel:
    modules = adapter.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType] - peft multiplies by it, and takes any number
        lora_dropout=adapter.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 0, "adapter"))
        try:
            peft = get_peft_model(model, config)  # makes float32 adapters, also on a bfloat16 base
        except ValueError as error:
            names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise JobFailed(
                "lora_target_modules",
                f"the adapter cannot be put on {modules}: {error}",
                hint=f"linear layers of this model are: {', '.join(names)}; all-linear takes all but the head",
                pointer="/model/adapter/target_modules",
            ) from error
    assert isinstance(peft, PeftModel)
    peft.eval()
    return peft


def _not_found(source: str, why: str) -> JobFailed:
    return JobFailed(
        "model_not_found",
        f"the model {source!r} cannot be loaded: {why.strip().splitlines()[0]}",
        hint="name `tiny`, a folder with config.json, a tokenizer and *.safetensors, or a hub id that the worker can reach",
        pointer="/model/source",
    )


def _unsupported(source: str, why: str) -> JobFailed:
    return JobFailed(
        "model_unsupported",
        f"the model {source!r} cannot be trained here: {why.strip().splitlines()[0]}",
        hint="it must load with transformers' AutoModelForCausalLM, without code of its own, from safetensors",
        pointer="/model/source",
    )


def _mismatch(why: str, hint: str) -> JobFailed:
    return JobFailed("checkpoint_mismatch", f"the checkpoint does not fit: {why}", hint=hint, pointer="/model/adapter")
