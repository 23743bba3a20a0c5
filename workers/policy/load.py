"""From a model spec to a model and a tokenizer: the tiny preset, a folder, or a hub id.

Only safetensors files are read, and code that comes with a model is never run.
"""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from service.errors import JobFailed
from service.jobs import hub
from service.jobs.model_folder import INDEX, INDEX_SUFFIX, NAMED, pickled_weights, read_config
from service.jobs.resolve_model import HUB_ID
from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.tiny import tiny_model, tiny_tokenizer

MODEL = "model"  # the folder inside a checkpoint
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Spaces, digits and scripts that tokenizers treat differently.
PLAIN_TEXT = "3+8=11,  it's so:\n\tna\u00efve \u4f60\u597d x_1"
MAX_SHOWN = 500  # characters of a library's error message

HUB_ANSWERS_WITHIN_S = 10.0

log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()
transformers_logging.disable_default_handler()  # its lines quote names from the model's files; our formatters escape them
transformers_logging.enable_propagation()


@dataclass(frozen=True)
class Loaded:
    """A causal language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None  # the commit of a hub model


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def adapter_of(spec: ModelSpec) -> Lora | Full:
    """What is trained: the spec's adapter, or the default."""
    return spec.adapter or (Full() if spec.source == "tiny" else Lora())


def load_model(spec: ModelSpec, device: torch.device, checkpoint: Path | None, revision: str | None = None) -> Loaded:
    """The source's weights, or the full weights of a checkpoint.

    If the checkpoint has an adapter, the source is loaded at the commit that the adapter was trained on, even if the branch
    has moved since.
    """
    if checkpoint is None:
        return _load(spec, device, None, revision)
    adapter = adapter_of(spec)
    folder = model_folder(checkpoint, adapter)
    if isinstance(adapter, Full):
        return _load(spec, device, folder)
    return _load(spec, device, None, saved_adapter(folder).revision)


def model_folder(checkpoint: Path, adapter: Lora | Full) -> Path:
    """The model's folder in a checkpoint (or `checkpoint` itself). It must hold the kind of weights that the job trains."""
    folder = checkpoint / MODEL if (checkpoint / MODEL).is_dir() else checkpoint
    held = "lora" if (folder / ADAPTER_CONFIG).is_file() else "full"
    if held != adapter.kind:
        raise mismatch(
            f"it holds {held} weights and model.adapter asks for {adapter.kind}", f"use model.adapter {{kind: {held}}}"
        )
    return folder


def saved_adapter(folder: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def _load(spec: ModelSpec, device: torch.device, folder: Path | None, revision: str | None = None) -> Loaded:
    dtype = dtype_of(spec, device)
    if folder is None and spec.source == "tiny":
        config = spec.tiny or TinyConfig()
        tokenizer = tiny_tokenizer(config.context)
        return Loaded(_ready(tiny_model(config, tokenizer, dtype), device), tokenizer, None)
    source = str(folder) if folder is not None else spec.source
    if source is None:
        raise PolicyFailed("model_not_found", "the spec names no model", hint="give model.source", subject=Subject.SOURCE)
    return _load_pretrained(source, None if folder is not None else revision or spec.revision, device, dtype)


def dtype_of(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32


def commit_of(source: str, revision: str | None) -> str | None:
    """The commit at which a hub model would be loaded now; None if that cannot be found out."""
    with suppress(OSError):
        path = cached_file(source, "config.json", revision=revision)
        return None if path is None else extract_commit_hash(path, None)
    return None


def _load_pretrained(source: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise _not_found(source, "there is no such folder")
    if not source.startswith(("/", ".", "~")) and os.path.exists(source):  # transformers would load this folder
        raise _not_found(source, "it is a hub id, and also a path below this worker's working directory")
    if HUB_ID.fullmatch(source) and (why := hub.why_not(source, revision, within_s=HUB_ANSWERS_WITHIN_S)):
        raise _not_found(source, why)  # fail at once: the library would ask six times, for half a minute
    with unsupported_if_it_fails(source, "it does not load"):
        # A branch may move between these calls, and before the job resumes, so its commit is used from here on.
        config_path = cached_file(source, "config.json", revision=revision)
        if config_path is None:
            raise _not_found(source, "there is no config.json in it")
        commit = None if Path(source).is_dir() else extract_commit_hash(config_path, None)
        safe: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": False}
        _check_files(source, Path(config_path).parent, commit or revision)
        tokenizer = _load_tokenizer(source, commit or revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
        )
    model, report = loaded
    if missing := report["missing_keys"]:
        raise _unsupported(source, f"weights are missing: {len(missing)}, for example {min(missing)}")
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise _unsupported(source, f"{type(model).__name__} has no key-value cache to sample with")
    return Loaded(_ready(model, device), tokenizer, commit)


@contextmanager
def unsupported_if_it_fails(source: str, what: str) -> Iterator[None]:
    """Report failures inside as faults of the model's files. JobFailed, lack of memory and accelerator errors are passed on."""
    try:
        yield
    except (JobFailed, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except OSError as error:
        raise _not_found(source, str(error) or type(error).__name__) from error
    except Exception as error:
        log.warning("the model %s: %s", source, what, exc_info=True)
        raise _unsupported(source, f"{what}: {type(error).__name__}: {error}") from error


def _load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which treats plain text as its tokenizer.json does. Raises ValueError where there is none.

    transformers builds the tokenizers of some families anew from their class: the result may lose spaces, for example. In that
    case the file is loaded as it stands.
    """
    safe: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    path = cached_file(source, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    if path is not None and (what := _difference(tokenizer, path)):
        log.warning("the model %s: %s; the file is used as it stands", source, what)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **safe)
        if what := _difference(tokenizer, path):
            raise ValueError(what)
    return tokenizer


def _difference(tokenizer: PreTrainedTokenizerBase, path: str) -> str | None:
    """How the tokenizer treats plain text differently from the tokenizer.json at `path`; None if it does not."""
    own: Any = Tokenizer.from_file(path)
    own.no_truncation()
    own.no_padding()
    ids = own.encode(PLAIN_TEXT, add_special_tokens=False).ids
    loaded: Any = tokenizer(PLAIN_TEXT, add_special_tokens=False)["input_ids"]
    if list(loaded) != ids:
        return f"its tokenizer reads {PLAIN_TEXT!r} as other tokens than its tokenizer.json does"
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text != own.decode(ids, skip_special_tokens=False):
        return f"its tokenizer writes {text!r} for the tokens of {PLAIN_TEXT!r}, and its tokenizer.json does not"
    return None


def _check_files(source: str, folder: Path, revision: str | None) -> None:
    """Refuse files that the loader would open but must not. `folder` holds config.json, for a hub model also what is cached."""
    try:
        config = read_config(folder)
        index = str(config.get(NAMED, INDEX))
        if not Path(source).is_dir() and index.endswith(INDEX_SUFFIX):  # fetch the index, to read it
            cached_file(source, index, revision=revision, _raise_exceptions_for_missing_entries=False)
        pickled = pickled_weights(folder, config)
    except ValueError as error:
        raise _not_found(source, str(error)) from error
    if pickled:
        raise PolicyFailed(
            "model_pickled",
            f"the model {source!r} is not loaded: {pickled}",
            hint="load it where you trust it, and save_pretrained(folder, safe_serialization=True)",
            subject=Subject.SOURCE,
        )
    if find_adapter_config_file(source, revision=revision) is not None:  # the loader would follow it to another model
        raise _unsupported(source, f"it holds an adapter ({ADAPTER_CONFIG}); name its base model, or start from_checkpoint")


def _ready(model: Any, device: torch.device) -> PreTrainedModel:
    return model.to(device).eval()


def _not_found(source: str, why: str) -> PolicyFailed:
    return PolicyFailed(
        "model_not_found",
        f"the model {source!r} cannot be loaded: {_shortened(why)}",
        hint="name `tiny`, a folder with config.json, a tokenizer and *.safetensors, or a hub id that the worker can reach",
        subject=Subject.SOURCE,
    )


def _unsupported(source: str, why: str) -> PolicyFailed:
    return PolicyFailed(
        "model_unsupported",
        f"the model {source!r} cannot be trained here: {_shortened(why)}",
        hint="it must load with transformers' AutoModelForCausalLM, without code of its own, from safetensors",
        subject=Subject.SOURCE,
    )


def _shortened(why: str) -> str:
    """On one line, cut to MAX_SHOWN characters."""
    why = " ".join(why.split())
    return why if len(why) <= MAX_SHOWN else f"{why[:MAX_SHOWN]}…"


def mismatch(why: str, hint: str) -> PolicyFailed:
    return PolicyFailed("checkpoint_mismatch", f"the checkpoint does not fit: {why}", hint=hint, subject=Subject.ADAPTER)
