"""The reference: the weights that the job started from, for KL terms. Never what it was resumed from.

LoRA on a plain source: the adapter is switched off. LoRA from a checkpoint: a frozen copy of that checkpoint's adapter.
Full weights: a frozen copy of the model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from service.spec.model import Lora, ModelSpec
from workers.policy.load import START, TRAINED, Loaded, add_start_adapter, load_frozen, model_folder
from workers.policy.log_probs import Scorer

Reference = Callable[[], AbstractContextManager[Scorer]]


def open_reference(loaded: Loaded, spec: ModelSpec, device: torch.device, start: Path | None) -> Reference:
    """A context whose scorer has the reference's weights while it is open. `start`: the checkpoint the job started from."""
    peft = loaded.peft
    if peft is None:
        return partial(nullcontext, Scorer(load_frozen(spec, device, start, loaded.revision)))
    scorer = Scorer(loaded.model)
    if start is not None:
        add_start_adapter(peft, model_folder(start, spec.adapter or Lora()))

    @contextmanager
    def switched() -> Iterator[Scorer]:
        if start is None:
            with peft.disable_adapter():
                yield scorer
            return
        peft.set_adapter(START, inference_mode=True)
        try:
            yield scorer
        finally:
            peft.set_adapter(TRAINED)

    return switched
