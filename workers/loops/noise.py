"""What rounding alone does to the log ratios of a model in half precision, and a warning where clips lie below it.

The answers of a rollout are scored a second time with a nudge to the model's input that has no effect but through rounding.
In float32 the difference is a few millionths, and nothing is measured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.metric_names import NOISE_LOG_RATIO, NOISE_POOLED
from service.spec.axes import Clipped
from service.spec.job import RLSpec
from workers.loops.attempt import Attempt
from workers.objectives.objective import Objective
from workers.policy.score.layout import Sequence as TokenSequence
from workers.tenure.tenure import EventRow

EVERY_STEPS = 50  # beginning with the first; steps, not attempts, so that a resumed job measures at the same ones
MOST_TOKENS = 4096  # prompts and answers that are scored again


def is_due(attempt: Attempt, step: int) -> bool:
    return attempt.policy.base.dtype != torch.float32 and step % EVERY_STEPS == 1


def noise(
    attempt: Attempt, objective: Objective, sequences: Sequence[TokenSequence], log_probs: Tensor, step: int
) -> tuple[dict[str, float], list[EventRow]]:
    """The metrics policy/noise_*, and once in a job a warning if they exceed the objective's clips.

    `log_probs` [B, T] are the policy's of the sequences, with weights that have not changed since.
    """
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    chosen = _some(sequences, spec.rollout.group_size)
    again = attempt.policy.score([sequences[i] for i in chosen], temperature=spec.rollout.temperature, nudge=True)
    mask, width = again.mask, again.mask.shape[1]
    delta = (again.log_probs - log_probs[chosen, :width]).double() * mask
    metrics = {NOISE_LOG_RATIO: float(delta[mask].square().mean().sqrt())}
    if objective.ratio.constant:
        return metrics, []
    pooled = objective.pooled(delta, mask)
    lengths = mask.sum(1)
    # Each answer counts alike, whether its tokens share a ratio or not.
    metrics[NOISE_POOLED] = float(((pooled.square() * mask).sum(1) / lengths).mean().sqrt())
    surrogate = spec.objective.surrogate
    if not isinstance(surrogate, Clipped) or attempt.progress.noise_told:
        return metrics, []
    low, high = surrogate.clip_low, surrogate.clip_high
    if metrics[NOISE_POOLED] <= min(low, high):
        return metrics, []
    attempt.progress.noise_told = True
    ratio = pooled.exp()
    beyond = float(((((ratio < 1 - low) | (ratio > 1 + high)) & mask).sum(1) / lengths).mean())
    dtype = str(attempt.policy.base.dtype).removeprefix("torch.")
    detail = (
        f"{NOISE_POOLED} is {metrics[NOISE_POOLED]:.2g} at step {step}, and the clips are {low:g} and {high:g}: rounding in "
        f"{dtype} alone takes {beyond:.0%} of the tokens' ratios beyond them, whatever was learned; use model.dtype: float32, "
        "or wider objective.surrogate.clip_low and clip_high"
    )
    return metrics, [("warning", {"step": step, "metric": NOISE_POOLED, "detail": detail})]


def _some(sequences: Sequence[TokenSequence], group_size: int) -> list[int]:
    """Answers of as many groups as possible, one at least, up to MOST_TOKENS."""
    chosen, tokens = list[int](), 0
    for index in sorted(range(len(sequences)), key=lambda index: (index % group_size, index)):
        tokens += len(sequences[index].prompt) + len(sequences[index].completion)
        if chosen and tokens > MOST_TOKENS:
            break
        chosen.append(index)
    return chosen
