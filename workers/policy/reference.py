"""The reference model for KL terms: the weights that the job started from, never those it was resumed from.

LoRA on a plain source: the base without an adapter. LoRA from a checkpoint: a frozen copy of that checkpoint's adapter.
Full weights: a base of its own.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from service.spec.model import ModelSpec
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.load import adapter_of, model_folder
from workers.policy.policy import Policy


def open_reference(learner: Learner, model: ModelSpec, start: Path | None, load: Callable[..., Base] = Base.load) -> Policy:
    """`start`: the checkpoint that the job itself started from, even if it is resumed from another; None: the source.
    `load`: in place of `Base.load`."""
    base = learner.base
    if learner.adapter is None:
        threads = torch.get_num_threads()
        device = str(base.device)
        return Policy(load(model, device=device, threads=threads, checkpoint=start, revision=learner.revision))
    if start is None:
        return Policy(base)
    name = f"{learner.adapter}-start"
    base.adapters.add_saved(name, model_folder(start, adapter_of(model)))
    return Policy(base, name)
