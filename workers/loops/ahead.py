"""A rollout one step ahead (rollout.max_staleness 1): while a step is graded and learnt from, a server samples the next one's
answers, with the weights from before that step.

What was sampled ahead is in no checkpoint. A resumed job samples its first step anew, with the weights that it has.
"""

import logging
from dataclasses import dataclass, replace
from time import perf_counter

from service.errors import LeaseLost
from service.jobs.data import prompt_indices
from service.spec.job import RLSpec
from workers.loops import rescore
from workers.loops.attempt import Attempt
from workers.loops.sampling import Asked, ask, draw_of
from workers.rollout.engine import Completion
from workers.rollout.vllm import VllmEngine
from workers.rollout.vllm_server import Underway
from workers.tenure.outcome import Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ahead:
    """A later step's answers, which are being sampled."""

    step: int
    asked: Asked
    engine: VllmEngine
    underway: Underway[list[Completion]]

    def end(self) -> int:
        """Nobody needs them any more. Returns how many tokens were sampled for nothing, as far as they came."""
        self.underway.end()
        return sum(len(completion.tokens) for completion in self.engine.came)


@dataclass(frozen=True)
class Rollout:
    """A step's answers. `seconds` is how long they were sampled for, `waited_s` how long the step waited for them."""

    asked: Asked
    completions: list[Completion]
    staleness: int  # steps that the policy has learnt since it sampled them
    seconds: float
    waited_s: float


def rollout(attempt: Attempt, step: int) -> Rollout:
    """This step's answers: those that were sampled ahead, if any. The next step's are begun, where the spec wants that."""
    since, ahead = perf_counter(), attempt.ahead
    if ahead is not None and ahead.step == step:
        completions = ahead.engine.result(ahead.underway)
        attempt.ahead = None
        found = Rollout(ahead.asked, completions, 1, ahead.underway.seconds, perf_counter() - since)
    else:
        asked = asked_of(attempt, step)
        completions = attempt.policy.answer(asked.requests)
        seconds = perf_counter() - since
        found = Rollout(asked, completions, 0, seconds, seconds)
    attempt.tenure.meter.sampled(sum(len(completion.tokens) for completion in completions))
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    if spec.rollout.max_staleness and step < spec.limits.max_steps:
        attempt.ahead = _begun(attempt, step + 1)
    return found


def _begun(attempt: Attempt, step: int) -> Ahead | None:
    """None if that step cannot be sampled now; it will tell why when its turn comes."""
    engine = attempt.policy.engine
    assert isinstance(engine, VllmEngine)
    try:
        asked = asked_of(attempt, step)
        return Ahead(step, asked, engine, engine.begin(asked.requests))
    except (LeaseLost, Interrupted):
        raise
    except Exception:
        log.warning("step %d of %s could not be sampled ahead", step, attempt.tenure.job.id, exc_info=True)
        return None


def asked_of(attempt: Attempt, step: int) -> Asked:
    """What a training step samples."""
    spec, rows = attempt.spec, attempt.data.train
    assert isinstance(spec, RLSpec)
    indices = prompt_indices(len(rows), step, spec.rollout.prompts_per_step, spec.seed, spec.data.train.shuffle)
    draw = replace(draw_of(attempt, purpose="rollout"), entropies=rescore.may_be_left_out(attempt))
    return ask(attempt, [rows[i] for i in indices], [rows.number(i) for i in indices], draw, done=step - 1)
