"""The learner: a policy with an optimizer, which can train and save itself.

    accumulate(sequences, loss) -> loss      step() -> what the update did      save(folder)

It trains its own adapter on a base that others may share, or all weights of a base that it does not share. Everything random
derives from a seed and a step, so a loaded learner continues bit for bit as the saved one would have.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from service.spec.model import Full, Lora
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.load import MODEL, model_folder
from workers.policy.optimizer import FILE, WHOLE, AddUp, HandOut, Optimizer, Part, StepSettings
from workers.policy.policy import Policy
from workers.policy.score.layout import Items, Sequence, batches_of
from workers.policy.score.log_probs import LogProbsAlone
from workers.seeds import derive

TRAINER = "trainer.json"

# (log_probs [b, T] of some rows, the rows' indices in the list) -> the rows' share of the loss, a scalar with a graph.
Loss = Callable[[Tensor, Tensor], Tensor]
# The same for items: (log_probs [n] or [n, K], where in all N tokens these stand [n]) -> the items' share of the loss.
TargetLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """What a learner starts from: folders of checkpoints, or nothing."""

    weights: Path | None = None  # None: a new adapter, or the source's weights
    optimizer: Path | None = None  # to continue exactly: moments, masters, and the count of steps
    new_schedule: bool = False  # take only moments and masters, restart the learning rate's schedule (a fork)


class Learner(Policy):
    """`kind` is lora or full; `revision` is the commit of a hub model; `facts` lists the resolved settings."""

    def __init__(
        self,
        base: Base,
        adapter: Lora | Full,
        *,
        name: str,
        optimizer: OptimizerSpec,
        steps: int,
        seed: int,
        start: Start = Start(),
        part: Part = WHOLE,
    ) -> None:
        """A learner for `steps` optimizer steps. `name` is its adapter's name, unique on the base; `part`: of the optimizer's
        step, where other processes do the rest.

        Raises PolicyFailed checkpoint_mismatch or lora_target_modules; a base with other learners is then unchanged.
        """
        super().__init__(base, None if isinstance(adapter, Full) else name)
        self.kind, self._seed = adapter.kind, seed
        self.sharded = self.adapter is None and base.shards is not None  # each rank holds a part of what is trained
        self.rank = 0  # of this process among those that train the same weights: each draws its own dropout
        self._accumulated, self._poisoned = 0, False  # since the last step
        trained = self._weights(adapter, start.weights)
        try:
            are_masters = self.sharded and base.dtype != torch.float32
            self._optimizer = Optimizer(trained, optimizer, steps, part, are_masters=are_masters)
            trainer: dict[str, Any] = {}
            if start.optimizer is not None:
                trainer = orjson.loads((start.optimizer / TRAINER).read_bytes())
                self._optimizer.load(start.optimizer)
                self._optimizer.steps_done = 0 if start.new_schedule else trainer["optimizer_steps"]
        except BaseException:
            self.unload()
            raise
        self.revision = base.revision or trainer.get("revision")
        self._dropouts = [] if self.adapter is None else base.adapters.dropouts(self.adapter)
        self.facts = self._facts(sum(weight.numel() for weight in trained.values()))
        if self.adapter is not None and isinstance(adapter, Lora):
            self.facts["adapted_modules"] = base.adapters.on_modules(self.adapter)
            self.facts["adapted_parameters"] = base.adapters.on_parameters(self.adapter)
            self.facts["warnings"] = base.adapters.warnings(self.adapter, adapter)

    def accumulate(
        self,
        sequences: list[Sequence],
        loss: Loss,
        *,
        rows: Iterable[int] | None = None,
        temperature: float = 1.0,
        microbatch_tokens: int | Literal["auto"] = "auto",
    ) -> float:
        """Add the gradient of the loss. Returns the loss, nan if it is not finite.

        `loss` gets the log_probs [b, T] of some rows and the rows' indices [b] in `sequences`, and returns these rows' share
        of the loss. T is the longest answer of all `sequences`. The sum of the shares must not depend on how the list is
        split, so compute weights from the whole list. `rows`: only these go through the model, because the loss of the others
        is 0; default: all.
        """
        wanted = list(range(len(sequences)) if rows is None else rows)
        with closing(self._shares(sequences, loss, wanted, temperature, microbatch_tokens)) as shares:
            return self._add(shares)

    def _shares(
        self,
        sequences: list[Sequence],
        loss: Loss,
        wanted: list[int],
        temperature: float,
        microbatch_tokens: int | Literal["auto"],
    ) -> Generator[Tensor]:
        """The shares of these rows in the loss, one micro-batch after the other."""
        base, long_prompts = self.base, False
        if microbatch_tokens == "auto":
            microbatch_tokens, long_prompts = base.microbatch_tokens, base.long_prompts
        some, share = [sequences[row] for row in wanted], not self._dropouts  # with dropout each row has its own draws
        width = max((len(completion) for _, completion in sequences), default=0)
        of = LogProbsAlone(temperature)
        how = {"pad_id": base.text.pad_id, "share": share, "long_prompts": long_prompts}
        for part, (found,) in base.scorer.each(some, microbatch_tokens, of, **how):
            log_probs = pad(found, (0, width - found.shape[1]))
            yield loss(log_probs, torch.tensor([wanted[place] for place in part], device=base.device))

    def accumulate_targets(self, items: Items, loss: TargetLoss) -> tuple[float, Tensor]:
        """Add the gradient of a loss over the items' targets. Returns the loss (nan if it is not finite), and the log-probs
        [N] or [N, K] that it was computed of.

        `loss` gets the log-probs [n] or [n, K] of some items, and where in the N tokens these stand [n]. No item is split.
        """
        base, seen = self.base, torch.zeros(items.targets_N.shape, device=self.base.device)

        def shares() -> Iterator[Tensor]:
            for rows in batches_of(items.lengths, base.microbatch_tokens):
                input_ids, positions, places = items.padded(rows, base.text.pad_id)
                log_probs = base.scorer.log_probs(input_ids, positions, items.targets_N[places])
                seen[places] = log_probs.detach()
                yield loss(log_probs, places)

        return self._add(shares()), seen

    def _add(self, shares: Iterable[Tensor]) -> float:
        """Add the gradients of these parts of a loss, each computed when its turn comes. Returns their sum."""
        done: list[Tensor] = []
        with self.base.adapters.only(self.adapter), self._dropout():
            for share in shares:
                share.backward()
                done.append(share.detach())
        total = math.fsum(map(float, done)) if all(torch.isfinite(share) for share in done) else math.nan
        self._accumulated += 1
        self._poisoned |= not math.isfinite(total)
        return total

    @property
    def updates(self) -> int:
        """How often the weights were updated, or an update was skipped."""
        return self._optimizer.steps_done

    def step(self, settings: StepSettings | None = None, *, poisoned: bool | None = None) -> dict[str, float | bool]:
        """One optimizer step, unless loss or gradient is not finite: grad_norm (before clipping), learning_rate, skipped.

        settings  for this step, in place of the spec's and its schedule
        poisoned  whether the loss was not finite, where another process knows it
        """
        result = self._optimizer.step(settings, poisoned=self._poisoned if poisoned is None else poisoned)
        self._accumulated, self._poisoned = 0, False
        return result

    def add_up_gradients(self, add_up: AddUp) -> None:
        """Call this before each optimizer step: it adds the gradients of other processes to these."""
        self._optimizer.add_up = add_up

    def hand_out_weights(self, hand_out: HandOut) -> None:
        """Call this after each optimizer step of which this learner does a part: it brings the weights of the others."""
        self._optimizer.hand_out = hand_out

    def optimizer_state(self) -> dict[str, Tensor]:
        """What this process keeps of it, by the names on the disk."""
        return self._optimizer.state()

    def base_state(self) -> dict[str, Tensor] | None:
        """The whole weights of the model, if they are sharded, as `gathered` gives them."""
        return None if self.base.shards is None else self.base.shards.state(self.base.dtype)

    def digest(self) -> bytes:
        """Of the weights that are trained and not sharded: learners with the same one have the same weights, to the bit."""
        return self._optimizer.digest()

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write model/ (a plain transformers folder, or a plain peft adapter), the optimizer's state and trainer.json.

        optimizer  False: leave its state out; training cannot go on exactly from such a folder
        """
        if self.adapter is None:
            weights = self.base_state()
            self.base.model.save_pretrained(folder / MODEL, state_dict=weights)
            if weights is not None:  # whose dtype is not that of the parts
                self.base.model.config.dtype = self.base.dtype
                self.base.model.config.save_pretrained(folder / MODEL)
        else:
            self.base.adapters.save(self.adapter, folder / MODEL)
        self.text.save(folder / MODEL)
        if optimizer:
            save_file(self.optimizer_state(), folder / FILE)
        trainer = {
            "optimizer_steps": self._optimizer.steps_done,
            "source": self.base.source,
            "revision": self.revision,
            "adapter": self.kind,
        }
        (folder / TRAINER).write_bytes(orjson.dumps(trainer, option=orjson.OPT_INDENT_2))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone, as a plain peft folder."""
        assert self.adapter is not None
        self.base.adapters.save(self.adapter, folder)

    def _weights(self, adapter: Lora | Full, folder: Path | None) -> dict[str, nn.Parameter]:
        """The weights to train, by their names on the disk."""
        if self.adapter is None or isinstance(adapter, Full):
            if folder != self.base.full_from:
                raise ValueError(
                    f"full weights come with their base, which was loaded from {self.base.full_from}, not {folder}"
                )
            return self.base.take_over()
        saved = None if folder is None else model_folder(folder, adapter)
        seed = derive(self._seed, 0, "adapter")
        self.base.adapters.add(self.adapter, adapter, revision=self.base.revision, seed=seed, weights=saved)
        return self.base.adapters.parameters(self.adapter)

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Turn on the adapter's dropout for training. Its draws derive from the optimizer step, so a resumed run repeats them.

        The model's own dropout stays off: it would move the log_probs away from the old ones without benefit.
        """
        if not self._dropouts:
            yield
            return
        device, rank = self.base.device, f"/rank/{self.rank}" if self.rank else ""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive(self._seed, self._optimizer.steps_done, f"dropout/{self._accumulated}{rank}"))
            try:
                for module in self._dropouts:
                    module.train()
                yield
            finally:
                for module in self._dropouts:
                    module.eval()

    def _facts(self, trained: int) -> dict[str, Any]:
        base = self.base
        return {
            "source": base.source,
            "revision": self.revision,
            "architecture": type(base.model).__name__,
            "parameters": base.parameters + (0 if self.adapter is None else trained),
            "trainable_parameters": trained,
            "adapter": self.kind,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
            "threads": torch.get_num_threads(),
            "context": self.text.context,
            "eos_token_ids": self.text.eos_ids,
            "microbatch_tokens": base.microbatch_tokens,
            "head_on_answers_only": base.scorer.head_on_answers_only,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        }
