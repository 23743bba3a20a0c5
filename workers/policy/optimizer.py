"""AdamW over the trained weights: gradient clipping, the schedule, and no update from a non-finite gradient.

Weights in bfloat16 have float32 master copies here. A relative step of 1e-5 is lost in bfloat16's 8 bits, so the update goes
to the master, and the weight is its rounded copy. Gradients are summed over micro-batches in float32, too.

Several processes that train the same weights may share the work of the step: each keeps masters and moments of some of the
weights, steps these, and gets the others from their owners. The result is the same to the bit. Of weights that are sharded each
keeps and steps its part of every one.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from service.spec.training import OptimizerSpec, Schedule
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.shards import gathered, part_of

FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what torch's AdamW keeps for each weight
MASTER = "master"


def learning_rate_ratio(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0, of `steps`) as a share of the full rate.

    The first step has the share 1 / warmup_steps, not 0. The decay reaches min_ratio at step `steps`, one after the last step,
    so that no step has a rate of 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    shape = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape


class StepSettings(NamedTuple):
    """AdamW's settings for one step, in place of the spec's and its schedule."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled
    max_grad_norm: float | None  # None: gradients are not scaled


# Adds the gradients of other processes to those of these weights.
AddUp = Callable[[list[nn.Parameter]], None]
# Replaces each of these weights by its owner's; the owners are numbers of processes.
HandOut = Callable[[list[nn.Parameter], list[int]], None]


class Part(NamedTuple):
    """Which of the processes that share the step this one is."""

    rank: int
    ranks: int


WHOLE = Part(0, 1)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """For each weight the process that keeps its moments: the largest first, each to the one that has least."""
    loads, found = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found[place] = loads.index(min(loads))
        loads[found[place]] += sizes[place]
    return found


class Optimizer:
    """`steps_done` counts the calls of `step`, including skipped ones."""

    add_up: AddUp | None = None
    hand_out: HandOut | None = None  # needed if the step is shared

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        spec: OptimizerSpec,
        steps: int,
        part: Part = WHOLE,
        *,
        are_masters: bool = False,
    ) -> None:
        """`are_masters`: these float32 weights are the masters of what the model computes with."""
        self._spec, self._steps, self._are_masters = spec, steps, are_masters
        self._parameters = dict(parameters)
        self._owners = owners([parameter.numel() for parameter in self._parameters.values()], part.ranks)
        self._is_shared = part.ranks > 1
        own = {name for name, owner in zip(self._parameters, self._owners, strict=True) if owner == part.rank}
        self._masters = {name: _master(weight, hollow=name not in own) for name, weight in self._parameters.items()}
        self._own = {name: self._masters[name] for name in self._masters if name in own}
        self.steps_done = 0
        betas = (spec.betas[0], spec.betas[1])
        trained = [{"params": list(self._own.values())}]  # none, where there are more processes than weights
        # Fused: one pass over all weights, four times as fast as the plain loop on small models.
        self._adamw = torch.optim.AdamW(trained, spec.learning_rate, betas, spec.eps, spec.weight_decay, fused=True)

    def zero_grad(self) -> None:
        for master in self._masters.values():
            master.grad = None

    def step(self, settings: StepSettings | None = None, *, poisoned: bool = False) -> dict[str, float | bool]:
        """One update from the summed gradients, which are then cleared. `poisoned`: their loss was not finite.

        settings  for this step; the moments go on whatever they are. Default: the spec's, by its schedule
        """
        if self.add_up is not None:
            self.add_up(list(self._masters.values()))
        how = settings or self._scheduled()
        # Scaled by 1 at most, and thus not at all, where there is no limit.
        most = math.inf if how.max_grad_norm is None else how.max_grad_norm
        total = nn.utils.clip_grad_norm_(self._masters.values(), most)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        skipped = poisoned or not math.isfinite(norm)
        if not skipped:
            for group in self._adamw.param_groups:
                group |= {"lr": how.learning_rate, "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay}
            self._adamw.step()
            self._copy_masters()
            if self._is_shared:
                assert self.hand_out is not None
                self.hand_out(list(self._parameters.values()), self._owners)
        self.zero_grad()
        self.steps_done += 1
        return {"grad_norm": norm, "learning_rate": how.learning_rate, "skipped": skipped}

    def _scheduled(self) -> StepSettings:
        spec = self._spec
        rate = spec.learning_rate * learning_rate_ratio(spec.schedule, self.steps_done, self._steps)
        return StepSettings(rate, (spec.betas[0], spec.betas[1]), spec.eps, spec.weight_decay, spec.max_grad_norm)

    def digest(self) -> bytes:
        """The sha256 of all masters; of all weights, where the step is shared; of none that are sharded."""
        whole = hashlib.sha256()
        for weight in (self._parameters if self._is_shared else self._masters).values():
            if isinstance(weight, DTensor):
                continue
            whole.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return whole.digest()

    def state(self) -> dict[str, Tensor]:
        """Moments and masters that this process keeps, by their names on the disk; of shards what `gathered` gives."""
        tensors: dict[str, Tensor] = {}
        for name, master in self._own.items():
            tensors |= {f"{kind}/{name}": gathered(value).contiguous() for kind, value in self._adamw.state[master].items()}
            if self._has_master(name):
                tensors[f"{MASTER}/{name}"] = gathered(master.detach())
        return tensors

    def load(self, folder: Path) -> None:
        """Load moments and masters. The learning rate and all other settings stay those of this optimizer's spec."""
        tensors = load_file(folder / FILE)
        for name, master in self._masters.items():
            state = {kind: tensors.pop(f"{kind}/{name}") for kind in MOMENTS if f"{kind}/{name}" in tensors}
            saved_master = tensors.pop(f"{MASTER}/{name}", None)
            for value in (*(state[kind] for kind in MOMENTS[:2] if kind in state), saved_master):
                if value is not None and value.shape != master.shape:
                    raise _mismatch(
                        f"{name} has shape {list(master.shape)} in the model and {list(value.shape)} in the optimizer"
                    )
            if name not in self._own:
                continue
            if state:
                self._adamw.state[master] = {kind: part_of(value, master) for kind, value in state.items()}
            if saved_master is not None and self._has_master(name):
                master.data.copy_(part_of(saved_master, master))
        if tensors:
            raise _mismatch(
                f"it holds state of weights that are not trained here, for example {next(iter(tensors)).split('/', 1)[1]}"
            )
        self._copy_masters()

    def _has_master(self, name: str) -> bool:
        return self._are_masters or self._masters[name] is not self._parameters[name]

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, master in self._own.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)


def _master(parameter: nn.Parameter, *, hollow: bool) -> nn.Parameter:
    """The weight itself if it is float32; else a float32 copy, which collects the weight's gradients. A hollow one holds no
    numbers and does that alone."""
    if parameter.dtype == torch.float32:
        return parameter
    one = parameter.new_zeros((), dtype=torch.float32)
    master = nn.Parameter(one.expand(parameter.shape) if hollow else parameter.detach().float())

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
    return master


def _mismatch(why: str) -> PolicyFailed:
    return PolicyFailed(
        "checkpoint_mismatch",
        f"the checkpoint's optimizer does not fit this model: {why}",
        hint="start with model.from_checkpoint.load: weights, or with the adapter of the checkpoint",
        subject=Subject.OPTIMIZER,
    )
