"""The policy: a base's weights with one of its adapters or none. It samples and scores.

    sample(prompts) -> answers          score(sequences) -> log_probs

A learner is a policy that changes; a reference is one that does not.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.policy.base import Base
from workers.policy.nudge import nudged
from workers.policy.score.layout import Items, Sequence, batches_of, response_mask
from workers.policy.score.log_probs import both
from workers.rollout.engine import Completion, Engine, Request, SamplingParams
from workers.seeds import derive


@dataclass(frozen=True)
class Scores:
    """A policy's log-probs and entropies for the answers of B sequences, padded to the T tokens of the longest answer."""

    log_probs: Tensor  # [B, T] float32, 0 where masked
    entropy: Tensor  # [B, T] float32, of the whole distribution at each token, 0 where masked
    mask: Tensor  # [B, T] bool, True on the answers' tokens


def grouped(answers: list[Completion], group_size: int) -> list[list[Completion]]:
    """The answers of each prompt. Raises what an answer failed with."""
    if failed := next((answer.error for answer in answers if answer.error is not None), None):
        raise failed
    return [answers[start : start + group_size] for start in range(0, len(answers), group_size)]


class Policy:
    """`adapter` names one of the base's adapters; None: the base's own weights."""

    def __init__(self, base: Base, adapter: str | None = None) -> None:
        self.base, self.adapter, self.text = base, adapter, base.text
        self.engine: Engine = base.engine  # what samples; another one may stand in its place

    def sample(self, prompts: list[list[int]], *, group_size: int, **how: Any) -> list[list[Completion]]:
        """`group_size` answers to each prompt; `how` as `requests` takes it. The same arguments give the same answers.

        The log_probs are those of the distribution that was sampled from. At temperature 1 without top_p and top_k, and for
        greedy answers, they are the policy's own. Raises JobFailed non_finite_logits.
        """
        return grouped(self.answer(self.requests(prompts, group_size=group_size, **how)), group_size)

    def requests(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Iterable[str] = (),
        seed: int,
        entropies: bool = False,
    ) -> list[Request]:
        """`group_size` requests for each prompt, each with a seed of its own; temperature 0 is greedy."""
        stop = tuple(stop)
        how = SamplingParams(max_tokens, temperature, top_p, top_k, stop, tuple(self.text.stop_ids(stop)))
        return [
            Request(prompt, how, derive(seed, row * group_size + place, "answer"), self.adapter, entropies=entropies)
            for row, prompt in enumerate(prompts)
            for place in range(group_size)
        ]

    def answer(self, requests: list[Request]) -> list[Completion]:
        """The completions of these requests, in their order."""
        return self.engine.run(requests)

    @torch.no_grad()
    def score(self, sequences: list[Sequence], *, temperature: float = 1.0, nudge: bool = False) -> Scores:
        """The log-probabilities of the answers' tokens, each given the tokens before it.

        With a `nudge` they differ as they do after any change of weights or batch that acts through rounding alone."""
        base = self.base
        mask = response_mask(sequences, base.device)
        log_probs, entropy = torch.zeros((2, *mask.shape), device=base.device)
        with base.adapters.only(self.adapter), nudged(base.model) if nudge else nullcontext():
            how = {"pad_id": base.text.pad_id, "long_prompts": base.long_prompts}
            parts = base.scorer.each(sequences, base.microbatch_tokens, both(temperature), **how)
            for rows, found in parts:
                log_probs[rows], entropy[rows] = found
        return Scores(log_probs, entropy, mask)

    @torch.no_grad()
    def score_targets(self, items: Items) -> Tensor:
        """The log-probs of the items' targets, [N] or [N, K] float32."""
        log_probs = torch.zeros(items.targets_N.shape, device=self.base.device)
        with self.base.adapters.only(self.adapter):
            for rows in batches_of(items.lengths, self.base.microbatch_tokens):
                input_ids, positions, places = items.padded(rows, self.text.pad_id)
                log_probs[places] = self.base.scorer.log_probs(input_ids, positions, items.targets_N[places])
        return log_probs

    def likeliest(self, items: Items, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after each of the items' tokens, and their log-probs: both [N, count]; targets do not matter."""
        ids = torch.zeros(len(items.tokens_N), count, dtype=torch.long, device=self.base.device)
        log_probs = torch.zeros(ids.shape, device=self.base.device)
        with self.base.adapters.only(self.adapter):
            for rows in batches_of(items.lengths, self.base.microbatch_tokens):
                input_ids, positions, places = items.padded(rows, self.text.pad_id)
                ids[places], log_probs[places] = self.base.scorer.likeliest(input_ids, positions, count)
        return ids, log_probs

    def unload(self) -> None:
        """Remove the policy's adapter, if it has one, from the base. The policy cannot be used afterwards."""
        if self.adapter is not None:
            self.base.adapters.remove(self.adapter)
