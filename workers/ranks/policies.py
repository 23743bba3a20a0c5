"""Policies whose work is split over the ranks of an attempt. To a loop they are like any other.

Each rank samples and scores its share of the prompts and answers. In an update each computes the log-probs of its rows, and
sends them to rank 0, which computes the loss and answers with its gradient; so the loss sees the weights of the whole step,
however it is split. Before the optimizer's step the gradients of the weights are added up, and then all ranks do the same step.
"""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.errors import JobFailed
from workers.policy.base import Base
from workers.policy.learner import Learner, Loss
from workers.policy.optimizer import StepSettings
from workers.policy.policy import Policy, Scores
from workers.policy.score.layout import Sequence as TokenSequence
from workers.policy.score.layout import response_mask
from workers.ranks.opening import Opening
from workers.ranks.ranks import Ranks
from workers.ranks.split import split
from workers.rollout.engine import Completion, Request


class Spread(Policy):
    """A policy that each rank has. `whose` is its name there."""

    ranks: Ranks
    whose: str

    @property
    def in_step(self) -> bool:
        """Whether the ranks take part in each other's passes: each holds a part of the weights."""
        return self.base.shards is not None

    def _meeting(self) -> AbstractContextManager[None]:
        return self.ranks.meeting() if self.in_step else nullcontext()

    def answer(self, requests: list[Request]) -> list[Completion]:
        if self.engine is not self.base.engine:  # a server samples
            return self.engine.run(requests)
        costs = [len(request.prompt) + request.how.max_tokens for request in requests]
        parts = split([request.prompt for request in requests], costs, self.ranks.count)
        mine, *theirs = [[requests[row] for row in part] for part in parts]
        calls = [("sample", share) if share or self.in_step else None for share in theirs]
        found = self.ranks.together(calls, lambda: self._sample(mine))
        by_row = {
            row: completion
            for part, completions in zip(parts, found, strict=True)
            for row, completion in zip(part, completions or [], strict=True)
        }
        return [by_row[row] for row in range(len(requests))]

    def _sample(self, requests: list[Request]) -> list[Completion]:
        with ExitStack() as stack:
            with self._meeting():
                stack.enter_context(self.base.whole())
            return self.engine.run(requests)

    def score(self, sequences: list[TokenSequence], *, temperature: float = 1.0, nudge: bool = False) -> Scores:
        parts = split_sequences(sequences, self.ranks.count)
        mine, *theirs = [[sequences[row] for row in part] for part in parts]
        calls = [("score", self.whose, share, temperature, nudge) if share or self.in_step else None for share in theirs]
        with self._meeting():
            found = self.ranks.together(calls, lambda: super(Spread, self).score(mine, temperature=temperature, nudge=nudge))
        mask = response_mask(sequences, self.base.device)
        log_probs, entropy = torch.zeros((2, *mask.shape), device=self.base.device)
        for rows, scores in zip(parts, found, strict=True):
            if rows:
                width = scores.mask.shape[1]
                log_probs[rows, :width] = scores.log_probs.to(log_probs.device)
                entropy[rows, :width] = scores.entropy.to(entropy.device)
        return Scores(log_probs, entropy, mask)


class SpreadReference(Spread):
    whose = "reference"

    def __init__(self, base: Base, adapter: str | None, ranks: Ranks) -> None:
        super().__init__(base, adapter)
        self.ranks = ranks


class SpreadLearner(Spread, Learner):
    whose = "learner"
    shares_step = False  # whether each rank keeps the optimizer's state of some weights

    def _shares(
        self,
        sequences: list[TokenSequence],
        loss: Loss,
        wanted: list[int],
        temperature: float,
        microbatch_tokens: int | Literal["auto"],
    ) -> Generator[Tensor]:
        ranks, device = self.ranks, self.base.device
        width = max(len(sequence.completion) for sequence in sequences)
        chosen = [sequences[row] for row in wanted]
        parts = split_sequences(chosen, ranks.count)
        loss = _of_some(loss)
        calls = [
            ("accumulate", [chosen[place] for place in part], temperature, microbatch_tokens) if part or self.in_step else None
            for part in parts[1:]
        ]
        own = super()._shares(sequences, loss, [wanted[place] for place in parts[0]], temperature, microbatch_tokens)
        with ranks.sound(), self._meeting():
            ranks.start(calls)
            busy = [rank for rank, call in enumerate(calls, 1) if call is not None]
            # Rank 0's own forward pass comes first, and its backward pass last: so the others do not wait for either. Where all
            # passes are made in step, each rank has one for each of rank 0's, and is heard once between the two.
            while (mine := next(own, None)) is not None or busy:
                for rank in list(busy):
                    kind, value = ranks.hear(rank)
                    if kind == "done":
                        busy.remove(rank)
                        continue
                    places, log_probs = value
                    length = log_probs.shape[1]
                    theirs = pad(log_probs.to(device), (0, width - length)).requires_grad_()
                    rows = [wanted[parts[rank][place]] for place in places]
                    yield loss(theirs, torch.tensor(rows, device=device))
                    assert theirs.grad is not None
                    ranks.tell(rank, theirs.grad[:, :length].cpu())
                if mine is not None:
                    yield mine

    def _add(self, shares: Iterable[Tensor]) -> float:
        with self.ranks.sound() if self.in_step else nullcontext():  # going backward is in step, too
            return super()._add(shares)

    def step(self, settings: StepSettings | None = None, *, poisoned: bool | None = None) -> dict[str, float | bool]:
        poisoned = self._poisoned if poisoned is None else poisoned
        own = super().step
        return self.ranks.meet(("step", settings, poisoned), lambda: own(settings, poisoned=poisoned))[0]

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """As a learner alone does. Raises JobFailed ranks_disagree if the weights of another rank have gone their own way, and
        rank_lost if a part of the optimizer's state went with a rank."""
        if not self.ranks.ended:  # else an attempt that lost a rank saves what it has
            self.ranks.agree(self.ranks.together([("digest",)] * (self.ranks.count - 1), self.digest))
        super().save(folder, optimizer=optimizer)

    def base_state(self) -> dict[str, Tensor] | None:
        own = super().base_state
        return self.ranks.meet(("base_state",), own)[0] if self.in_step else None

    def optimizer_state(self) -> dict[str, Tensor]:
        own = super().optimizer_state
        if self.sharded:
            return self.ranks.meet(("optimizer_state",), own)[0]
        if not self.shares_step:
            return own()
        parts = self.ranks.together([("optimizer_state",)] * (self.ranks.count - 1), own)
        return {name: tensor for part in parts for name, tensor in part.items()}


def _of_some(loss: Loss) -> Loss:
    """The loss, and 0 of no rows."""
    return lambda log_probs, rows: loss(log_probs, rows) if len(rows) else log_probs.sum()


def split_sequences(sequences: list[TokenSequence], ranks: int) -> list[list[int]]:
    return split([sequence.prompt for sequence in sequences], [sum(map(len, sequence)) for sequence in sequences], ranks)


def open_spread(opening: Opening, device: str, ranks: Ranks) -> tuple[SpreadLearner, SpreadReference | None]:
    """The policies of rank 0, opened on all ranks. Raises JobFailed."""
    if device == "cuda" and (there := torch.cuda.device_count()) < ranks.count:
        raise JobFailed("gpus_missing", f"resources.gpus is {ranks.count}, and this worker sees {there}")
    opening = replace(opening, ranks=ranks.count)
    if opening.sharding == "full":
        ranks.join()  # of which the parts are
    learner, reference = opening.policies(device, SpreadLearner)
    assert isinstance(learner, SpreadLearner)
    learner.ranks, learner.shares_step = ranks, opening.sharding == "optimizer"
    ranks.open(opening, learner)
    learner.facts["ranks"] = ranks.count
    if opening.sharding != "none":
        learner.facts["sharding"] = opening.sharding
    return learner, None if reference is None else SpreadReference(reference.base, reference.adapter, ranks)
