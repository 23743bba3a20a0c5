"""Checks a transformers model's folder by its JSON files before anything in it is loaded, without torch or reading weights."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from service.validation import quoted, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # what the loader looks for, in this order
NAMED = "transformers_weights"  # unless the config names another file
SAFE, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
ORIGINAL = "original_max_position_embeddings"
CONVERT = "which could run any code when it is read; convert the weights to safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ValueError with the reason if it cannot be read."""
    return _read_object(folder / "config.json", "it is no transformers model")


def pickled_weights(folder: Path, config: dict[str, Any]) -> str | None:
    """Why the folder's weights must not be loaded (they are pickles, or lie outside of the folder); None if they may be.

    Only the files that the loader would open are checked: those that the config or the index names. Only names are checked, so
    a link that the operator put there is followed. Raises ValueError if the index cannot be read.
    """
    named = config.get(NAMED)
    if named is not None and (reason := _refused(named, f"config.json ({NAMED})", (SAFE, INDEX_SUFFIX))):
        return reason
    if named is None and not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        named = INDEX
    if named is not None and named.endswith(INDEX_SUFFIX):
        weight_map = _read_object(folder / named, "config.json names it").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{named} has no weight_map that names the file of each weight")
        return next((reason for file in weight_map.values() if (reason := _refused(file, named, SAFE))), None)
    if named is not None or any(folder.glob(f"*{SAFE}")):
        return None
    pickled = next((path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLED_SUFFIXES), None)
    return None if pickled is None else f"{pickled} is a pickle, {CONVERT}"


def context_of(config: dict[str, Any]) -> int | None:
    """The longest sequence in tokens, prompt and answer together; None if the config gives none.

    With LongRoPE and dynamic NTK the rotary factors change once the longest row of a batch exceeds the original length. That
    length is then the limit, because beyond it a row's results would depend on the other rows of its batch.
    """
    named = (config.get(name) for name in CONTEXT_NAMES)
    lengths = [next((length for length in named if _is_length(length)), None), *_lengths_of_fixed_factors(config)]
    return min((length for length in lengths if length is not None), default=None)


def _lengths_of_fixed_factors(config: dict[str, Any]) -> Iterator[int]:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict):
        return
    for rope_parameters in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        kind = str(rope_parameters.get("rope_type", rope_parameters.get("type"))) if isinstance(rope_parameters, dict) else ""
        if kind in ("longrope", "su") or "dynamic" in kind:
            original = rope_parameters.get(ORIGINAL) or config.get(ORIGINAL)
            if _is_length(original):
                yield original


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refused(file: Any, by: str, suffixes: str | tuple[str, ...]) -> str | None:
    """Why a file named as weights must not be opened. An index must not name an index: the loader would read it as a pickle."""
    if not isinstance(file, str) or not file.endswith(suffixes):
        return f"{by} names {quoted(shown(file))}, and what is no {SAFE} file is read as a pickle, {CONVERT}"
    if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == os.pardir:
        return f"{by} names {quoted(shown(file))}, which lies outside of the folder; put all weights into it, as safetensors"
    return None


def _read_object(path: Path, without_it: str) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name}: {without_it}") from None
    except RecursionError:
        raise ValueError(f"{path.name} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} cannot be read: it is {quoted(shown(content))}, where an object should stand")
    return content
