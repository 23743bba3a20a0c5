"""A trial at load: a few tokens are sampled and scored, so that a model for which the two disagree is refused before a job.

Some model families keep state outside of the cache, or use another kind of cache. The log-probs of sampling and scoring then
differ, and every gradient is silently wrong. The trial covers what a job does: prompts of several lengths, groups, and rows
that go on.
"""

import torch

from workers.policy.score.layout import Sequence, pad
from workers.policy.score.log_probs import Scorer
from workers.rollout.engine import Engine, Request, SamplingParams

PROMPT_LENGTHS = (3, 1, 2)
GROUP_SIZE, ANSWER_TOKENS = 2, 4
# Mean absolute difference of a token's log-prob in nats. Rounding gives 1e-6 in float32 and 0.06 in bfloat16 (SmolLM2); a lost
# state gives whole nats.
TOLERANCE = {torch.float32: 0.002}
COARSE_TOLERANCE = 0.5  # for narrower types, with which a mixture of experts may even choose another expert


@torch.no_grad()
def disagreement(engine: Engine, scorer: Scorer, *, vocabulary: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """A message with the difference of the sampler's and scorer's log-probs; None if they agree as far as `dtype` allows.

    Exceptions of the model are passed on. Logits that are not finite give None; a job reports them when it meets them.
    """
    prompts = [[(7 * row + 3 * place + 5) % vocabulary for place in range(length)] for row, length in enumerate(PROMPT_LENGTHS)]
    how = SamplingParams(ANSWER_TOKENS)
    prompts = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
    completions = engine.run([Request(prompt, how, seed) for seed, prompt in enumerate(prompts)])
    if any(completion.error is not None for completion in completions):
        return None
    answers = list(zip(prompts, completions, strict=True))
    batch = pad([Sequence(prompt, answer.tokens) for prompt, answer in answers], 0, device)
    scored, _ = scorer(batch)
    sampled = torch.tensor([log_prob for _, answer in answers for log_prob in answer.log_probs])
    off = float((scored.cpu() - sampled).abs().mean())
    allowed = TOLERANCE.get(dtype, COARSE_TOLERANCE)
    if off <= allowed:  # false for NaN, too
        return None
    return f"log-probs of sampled tokens are off by {off:.2g} on average when they are scored again, allowed is {allowed:g}"
