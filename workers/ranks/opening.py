"""What the ranks of an attempt open: each the same policies, on its own device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from service.spec.model import Full, ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.optimizer import WHOLE, Part
from workers.policy.policy import Policy
from workers.policy.reference import open_reference


@dataclass(frozen=True)
class Opening:
    """All that decides what is loaded, so that every rank ends up with the same numbers."""

    model: ModelSpec
    name: str  # of the adapter
    optimizer: OptimizerSpec
    steps: int  # optimizer steps of the whole job
    seed: int
    start: Start
    threads: int
    reference: bool = False  # whether the objective needs one
    reference_from: Path | None = None  # the checkpoint that the job itself started from
    revision: str | None = None  # the commit of a hub model, once rank 0 has found it out
    ranks: int = 1
    sharding: Literal["none", "optimizer", "full"] = "none"  # what each rank keeps a part of

    def policies(
        self, device: str, kind: type[Learner] = Learner, load: Callable[..., Base] = Base.load, rank: int = 0
    ) -> tuple[Learner, Policy | None]:
        """A learner on a base of its own, and the reference. `load`: in place of `Base.load`."""
        base = self._load(
            load,
            self.model,
            device=device,
            threads=self.threads,
            checkpoint=self.start.weights,
            revision=self.revision,
            trained=isinstance(adapter_of(self.model), Full),
        )
        learner = kind(
            base,
            adapter_of(self.model),
            name=self.name,
            optimizer=self.optimizer,
            steps=self.steps,
            seed=self.seed,
            start=self.start,
            part=Part(rank, self.ranks) if self.sharding == "optimizer" else WHOLE,
        )
        if not self.reference:
            return learner, None
        return learner, open_reference(learner, self.model, self.reference_from, partial(self._load, Base.load))

    def _load(self, load: Callable[..., Base], *what: Any, trained: bool = False, **how: Any) -> Base:
        base = load(*what, **how)
        if self.sharding == "full":
            base.shard(trained=trained)
        return base
