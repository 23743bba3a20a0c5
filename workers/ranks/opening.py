"""What the ranks of an attempt open: each the same policies, on its own device."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.spec.model import ModelSpec
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
    sharded_over: int = 1  # ranks that share the optimizer's state and step

    def policies(
        self, device: str, kind: type[Learner] = Learner, load: Callable[..., Base] = Base.load, rank: int = 0
    ) -> tuple[Learner, Policy | None]:
        """A learner on a base of its own, and the reference. `load`: in place of `Base.load`."""
        base = load(self.model, device=device, threads=self.threads, checkpoint=self.start.weights, revision=self.revision)
        learner = kind(
            base,
            adapter_of(self.model),
            name=self.name,
            optimizer=self.optimizer,
            steps=self.steps,
            seed=self.seed,
            start=self.start,
            part=WHOLE if self.sharded_over == 1 else Part(rank, self.sharded_over),
        )
        return learner, open_reference(learner, self.model, self.reference_from) if self.reference else None
