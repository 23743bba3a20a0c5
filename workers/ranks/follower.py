"""`python -m workers.ranks.follower RANK RANKS LINE`: a rank other than 0. It does what rank 0 says and nothing else.

It holds a replica of the policies, and neither lease, store nor graders. It ends with rank 0, however that ends.
"""

import logging
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from service.settings import get_settings
from service.telemetry import configure_logging
from workers.policy.learner import Learner
from workers.policy.optimizer import StepSettings
from workers.policy.policy import Policy, Scores
from workers.policy.score.layout import Sequence as TokenSequence
from workers.ranks.gradients import add_up, device_of, hand_out, join, leave
from workers.ranks.line import hear, portable, say
from workers.ranks.opening import Opening
from workers.rollout.engine import Completion, Request

log = logging.getLogger(__name__)


class Follower:
    """Each public method is a verb of rank 0's; what it returns is the answer."""

    def __init__(self, line: "Connection[Any, Any]", rank: int, ranks: int) -> None:
        self._line, self._rank, self._ranks = line, rank, ranks

    def open(self, opening: Opening, device: str) -> bytes:
        """Load the policies. Answers the digest of the weights to train."""
        self._learner, self._reference = opening.policies(str(device_of(device, self._rank)), rank=self._rank)
        self._learner.rank = self._rank
        self._learner.add_up_gradients(add_up)
        self._learner.hand_out_weights(hand_out)
        return self._learner.digest()

    def ready(self) -> None:
        """Answers once everything is imported."""

    def join(self, folder: Path, device: str) -> None:
        join(folder, self._rank, self._ranks, device_of(device, self._rank))

    def sample(self, requests: list[Request]) -> list[Completion]:
        with self._learner.base.whole():
            return self._learner.base.engine.run(requests)

    def score(self, whose: str, sequences: list[TokenSequence], temperature: float, nudge: bool) -> Scores:
        scores = self._policy(whose).score(sequences, temperature=temperature, nudge=nudge)
        return Scores(scores.log_probs.cpu(), scores.entropy.cpu(), scores.mask.cpu())

    def accumulate(self, sequences: list[TokenSequence], temperature: float, microbatch_tokens: int | Literal["auto"]) -> None:
        """Rank 0 computes the loss: it gets the log-probs of each micro-batch, and answers with their gradient."""

        def loss(log_probs: Tensor, rows: Tensor) -> Tensor:
            say(self._line, ("part", (rows.tolist(), log_probs.detach().cpu())))
            gradient: Tensor = hear(self._line)
            return (log_probs * gradient.to(log_probs.device)).sum()  # whose gradient is this one

        self._learner.accumulate(sequences, loss, temperature=temperature, microbatch_tokens=microbatch_tokens)

    def step(self, settings: StepSettings | None, poisoned: bool) -> None:
        self._learner.step(settings, poisoned=poisoned)

    def digest(self) -> bytes:
        return self._learner.digest()

    def base_state(self) -> None:
        self._learner.base_state()

    def optimizer_state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self._learner.optimizer_state().items()}

    def _policy(self, whose: str) -> Policy:
        policy: Learner | Policy | None = self._learner if whose == "learner" else self._reference
        assert policy is not None
        return policy


def follow(line: "Connection[Any, Any]", rank: int, ranks: int) -> None:
    follower = Follower(line, rank, ranks)
    while True:
        try:
            verb, *arguments = hear(line)
        except (EOFError, OSError):  # rank 0 has no more work
            leave()
            return
        try:
            say(line, ("done", getattr(follower, verb)(*arguments)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            log.warning("rank %d: %s failed", rank, verb, exc_info=True)
            say(line, ("error", portable(error)))
            return


if __name__ == "__main__":
    own_rank, all_ranks, descriptor = map(int, sys.argv[1:])
    configure_logging(get_settings())
    follow(Connection(descriptor), own_rank, all_ranks)
    os._exit(0)  # Python and torch would take a second or two to tidy up what the kernel does
