"""Writes the model of a checkpoint with its adapter merged into the weights, for `ratchet export checkpoint --merged`:

python -m workers.merge FOLDER OUT < the model section of a spec, as JSON
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel

from service.errors import JobFailed
from service.spec.model import Full, ModelSpec
from workers.policy.load import adapter_of, load_model, model_folder


def merge(checkpoint: Path, model: ModelSpec, out: Path) -> None:
    """A plain transformers folder in the dtype in which the base is loaded here. Raises JobFailed if it cannot be loaded."""
    adapter = adapter_of(model)
    loaded = load_model(model, torch.device("cpu"), checkpoint)
    merged = loaded.model
    if not isinstance(adapter, Full):
        merged = PeftModel.from_pretrained(merged, str(model_folder(checkpoint, adapter))).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    try:
        merge(checkpoint, ModelSpec.model_validate({**json.load(sys.stdin), "from_checkpoint": None}), out)
    except JobFailed as error:
        raise SystemExit(f"{error.detail} ({error.hint})" if error.hint else error.detail) from None


if __name__ == "__main__":
    main()
