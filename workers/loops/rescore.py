"""Old log_probs for nothing: the sampler's, as long as they are those that the trainer would compute.

Sampler and trainer use the same weights. In float32, without top_p and top_k, their log_probs differ by rounding alone, a few
millionths. At each rollout a sample of the answers is scored to prove it. Where it fails, this rollout and all later ones of
the job are scored.
"""

from collections.abc import Sequence

import torch

from service.metric_names import RESCORE_DIFFERENCE
from service.spec.job import RLSpec
from service.spec.tensors import OF_A_JOB, uses
from workers.loops.attempt import Attempt
from workers.loops.update import pad
from workers.objectives.kernels import bounded_exp
from workers.objectives.reductions import Reductions
from workers.policy.policy import Scores
from workers.policy.score.layout import Sequence as TokenSequence
from workers.policy.score.layout import response_mask
from workers.rollout.engine import Completion
from workers.tenure.tenure import EventRow

BOUND = 1e-4  # nats between a token's two log_probs; rounding in float32 was seen to give 1e-6 to 1e-5
SHARE, LEAST = 16, 2  # one answer in so many is scored, but at least so many


def may_be_left_out(attempt: Attempt) -> bool:
    """Whether the sampler's log_probs are of the policy's own distribution, and nothing else compares the two."""
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    rollout = spec.rollout
    return (
        rollout.rescore == "auto"
        and rollout.engine == "local"
        and not attempt.progress.rescores
        and (rollout.top_p, rollout.top_k) == (1, 0)
        and attempt.policy.base.dtype == torch.float32
        and "rollout_log_probs" not in uses(spec.objective, OF_A_JOB).needed
    )


def sampled(
    attempt: Attempt, sequences: Sequence[TokenSequence], completions: Sequence[Completion], step: int
) -> tuple[Scores | None, dict[str, float], list[EventRow]]:
    """The answers' scores by the sampler, None if they are to be computed; what the proof measured; a warning if it failed."""
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    if not may_be_left_out(attempt):
        return None, {}, []
    device = attempt.policy.base.device
    log_probs = pad([completion.log_probs for completion in completions]).to(device)
    chosen = _some(len(sequences), step)
    again = attempt.policy.score([sequences[row] for row in chosen], temperature=spec.rollout.temperature)
    mask, width = again.mask, again.mask.shape[1]
    difference = (again.log_probs - log_probs[chosen, :width]) * mask
    greatest = float(difference.abs().max())
    if not greatest <= BOUND:  # also where it is NaN
        attempt.progress.rescores = True
        detail = (
            f"{RESCORE_DIFFERENCE} is {greatest:.2g} at step {step}, allowed are {BOUND:g}: sampler and trainer disagree "
            "about the same weights; from now on all answers are scored again, as with rollout.rescore: always"
        )
        return (
            None,
            {RESCORE_DIFFERENCE: greatest},
            [("warning", {"step": step, "metric": RESCORE_DIFFERENCE, "detail": detail})],
        )
    measured = Reductions(mask, difference.dtype)
    measured.kl("rollout/approx_kl", -difference)
    measured.effective("rollout/effective_samples", bounded_exp(difference))
    entropy = pad([completion.entropies or [] for completion in completions]).to(device)
    scores = Scores(log_probs, entropy, response_mask(list(sequences), device))
    return scores, measured.metrics.finish() | {RESCORE_DIFFERENCE: greatest}, []


def _some(count: int, step: int) -> list[int]:
    """Answers from all over the rollout, others at each step."""
    most = min(count, max(LEAST, count // SHARE))
    return [(step + place * count // most) % count for place in range(most)]
