"""Rollout engines: requests in, completions out, in any order. This is the interface; `local.py` is an engine on our own model.

A request's tokens depend on its own seed, prompt, parameters and weights alone, never on the requests beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.errors import JobFailed

BROKEN = "\ufffd"  # stands in a text for bytes that are no character, or not yet a whole one
TopLogProbs = list[tuple[int, float]]  # tokens and their log-probs, the likeliest first


@dataclass(frozen=True)
class SamplingParams:
    """The distribution to sample from, and where an answer ends: temperature 0 is greedy, top_p 1 and top_k 0 are off."""

    max_tokens: int  # 0: the prompt is read, and nothing is sampled
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # tokens that end an answer, beside the model's own
    ends: bool = True  # False: the model's own end tokens do not end an answer


@dataclass(frozen=True)
class Request:
    """One answer to one prompt. Requests with equal prompts and adapters that wait together share the reading of the prompt."""

    prompt: list[int]
    how: SamplingParams
    seed: int  # any integer; the draw at place t of the answer depends on (seed, t)
    adapter: str | None = None  # the name of an adapter on the base; None: the base's own weights
    prompt_log_probs: bool = False
    top_prompt_log_probs: int = 0  # how many tokens at each place of the prompt
    top_log_probs: int = 0  # how many tokens at each place of the answer
    entropies: bool = False  # of the distribution at each place of the answer


@dataclass(frozen=True)
class Completion:
    """One sampled answer. If it ended so, `tokens` include the end-of-sequence token, and `text` the stop text.

    log_probs and top_log_probs are of the distribution that was sampled from, in float32; for greedy answers they are the
    policy's at temperature 1, because in a greedy distribution they would be 0. Those of the prompt are the policy's at
    temperature 1. Tokens that top_k and top_p rule out are not in top_log_probs.
    """

    tokens: list[int]
    log_probs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_log_probs: list[float | None] | None = None  # None at the first place: nothing stands before it
    top_prompt_log_probs: list[TopLogProbs | None] | None = None
    top_log_probs: list[TopLogProbs] | None = None
    entropies: list[float] | None = None  # of the distribution that was sampled from
    error: JobFailed | None = None  # why there is no answer (non_finite_logits); tokens and text are then empty


class Engine(Protocol):
    """Not safe for several threads. The weights that a request asks for may not change until it has finished."""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Let these requests wait for their turn. Returns a ticket for each.

        Raises ValueError for an empty prompt or an adapter that is not on the base; then none of them waits.
        """
        ...

    def step(self) -> list[tuple[int, Completion]]:
        """Admit what waits, as far as there is room, and move every admitted request on by one token.

        Returns the tickets that finished, with their completions; also those that finished while `run` was at work.
        """
        ...

    def cancel(self, tickets: Sequence[int]) -> None:
        """Forget these requests, waiting or admitted. Tickets that finished or never were are ignored."""
        ...

    def so_far(self, tickets: Sequence[int]) -> dict[int, list[int]]:
        """The tokens that those of these requests have until now that are admitted and have not finished."""
        ...

    @property
    def pending(self) -> int:
        """How many requests have neither been returned by `step` nor cancelled."""
        ...

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of these requests, in their order. Other requests move on with them."""
        ...
