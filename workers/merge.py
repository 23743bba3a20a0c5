"""Writes the model of a checkpoint with its adapter merged into the weights, for `ratchet export checkpoint --merged` and
`--gguf`: a transformers folder, or one GGUF file if a type of its weights is given.

python -m workers.merge FOLDER OUT [f32|f16|bf16|q8_0] < the model section of a spec, as JSON
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from service.errors import JobFailed
from service.spec.model import Full, ModelSpec
from workers.policy.load import Loaded, adapter_of, load_model, model_folder


def merge(checkpoint: Path, model: ModelSpec, out: Path) -> None:
    """A plain transformers folder in the dtype in which the base is loaded here. Raises JobFailed if it cannot be loaded."""
    loaded = merged(checkpoint, model)
    loaded.model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)


def merged(checkpoint: Path, model: ModelSpec) -> Loaded:
    adapter = adapter_of(model)
    loaded = load_model(model, torch.device("cpu"), checkpoint)
    if isinstance(adapter, Full):
        return loaded
    adapted = PeftModel.from_pretrained(loaded.model, str(model_folder(checkpoint, adapter)))
    return replace(loaded, model=adapted.merge_and_unload(safe_merge=True))


def main() -> None:
    checkpoint, out, *outtype = sys.argv[1:]
    model = ModelSpec.model_validate({**json.load(sys.stdin), "from_checkpoint": None})
    try:
        if outtype:
            from workers.gguf_file import write_gguf  # needs the package `gguf`, which an export to a folder does not

            write_gguf(merged(Path(checkpoint), model), Path(out), outtype[0])
        else:
            merge(Path(checkpoint), model, Path(out))
    except JobFailed as error:
        raise SystemExit(f"{error.detail} ({error.hint})" if error.hint else error.detail) from None
    except (OSError, SafetensorError) as error:  # a full disk
        raise SystemExit(f"it cannot be read or written: {error}") from None


if __name__ == "__main__":
    main()
