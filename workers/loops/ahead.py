"""A rollout one step ahead (rollout.max_staleness 1): while a step is graded and learnt from, a server samples the next one's
answers, with the weights from before that step.

What was sampled ahead is in no checkpoint. A resumed job samples its first step anew, with the weights that it has.
"""

from dataclasses import dataclass, replace
from time import perf_counter

from service.jobs.data import prompt_indices
from service.spec.job import RLSpec
from workers.loops import rescore
from workers.loops.attempt import Attempt
from workers.loops.sampling import Asked, ask, draw_of
from workers.rollout.engine import Completion
from workers.rollout.vllm import VllmEngine
from workers.rollout.vllm_server import Underway


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
    spec, engine = attempt.spec, attempt.policy.engine
    assert isinstance(spec, RLSpec)
    if spec.rollout.max_staleness and step < spec.limits.max_steps:
        assert isinstance(engine, VllmEngine)
        asked = asked_of(attempt, step + 1)
        attempt.ahead = Ahead(step + 1, asked, engine, engine.begin(asked.requests))
    return found


def asked_of(attempt: Attempt, step: int) -> Asked:
    """What a training step samples."""
    spec, rows = attempt.spec, attempt.data.train
    assert isinstance(spec, RLSpec)
    indices = prompt_indices(len(rows), step, spec.rollout.prompts_per_step, spec.seed, spec.data.train.shuffle)
    draw = replace(draw_of(attempt, purpose="rollout"), entropies=rescore.may_be_left_out(attempt))
    return ask(attempt, [rows[i] for i in indices], [rows.number(i) for i in indices], draw, done=step - 1)
