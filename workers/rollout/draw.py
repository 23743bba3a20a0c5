"""One token a row, drawn by inverting the cumulative distribution. A row's draw depends on its logits and its number alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.rollout.engine import SamplingParams, TopLogProbs
from workers.seeds import derive

BLOCK = 512  # tokens whose weights are added up before the search goes into one such block

# SplitMix64 (Steele, Lea, Flood 2014): a counter, and a bijection that mixes its bits.
STEP, MIX_1, MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def key_of(seed: int) -> int:
    """What the draws of an answer depend on, beside the place."""
    return derive(seed, 0, "answer")


def uniforms(keys: Sequence[int], places: Sequence[int]) -> Tensor:
    """[n] float64 in [0, 1): one for each (key, place), always the same."""
    bits = np.array(keys, np.uint64) + (np.array(places, np.uint64) + np.uint64(1)) * STEP
    bits = (bits ^ (bits >> np.uint64(30))) * MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * MIX_2
    bits ^= bits >> np.uint64(31)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def draw(logits_N_V: Tensor, how: SamplingParams, points_N: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability [N] float32 in the distribution that was sampled from; NaN where a row's
    logits are not finite.

    Greedy tokens have the policy's log-probability at temperature 1, because in a greedy distribution it would be 0.
    """
    if how.temperature == 0:
        likeliest, tokens = logits_N_V.float().max(-1)
        return tokens, likeliest - logits_N_V.float().logsumexp(-1)
    logits, ids = _shaped(logits_N_V, how)
    highest = logits.amax(-1, keepdim=True)
    place, whole = _invert((logits - highest).exp_(), points_N.unsqueeze(-1))
    log_probs = (logits.gather(-1, place) - highest - whole.log()).float().squeeze(-1)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1), log_probs


def likeliest(logits_N_V: Tensor, how: SamplingParams, count: int) -> list[TopLogProbs]:
    """The `count` likeliest tokens of each row with their log-probs in the same distribution as `draw`'s."""
    logits, ids = (logits_N_V.float(), None) if how.temperature == 0 else _shaped(logits_N_V, how)
    values, places = logits.topk(min(count, logits.shape[-1]), dim=-1)
    values = values - logits.logsumexp(-1, keepdim=True)
    tokens = places if ids is None else ids.gather(-1, places)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [[(t, v) for t, v in zip(*row, strict=True) if v > float("-inf")] for row in pairs]


def entropies(logits_N_V: Tensor, how: SamplingParams) -> Tensor:
    """[N] float32, of the same distributions as `draw`'s log-probs."""
    logits = logits_N_V.float() if how.temperature == 0 else _shaped(logits_N_V, how)[0]
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _shaped(logits_N_V: Tensor, how: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The logits in float32 after temperature, top_k and top_p, and the tokens they belong to; None: in the tokens' order."""
    logits = logits_N_V.float()
    if how.temperature != 1:
        logits = logits / how.temperature
    ids = None
    if 0 < how.top_k < logits.shape[-1]:
        logits, ids = logits.topk(how.top_k, dim=-1)  # sorted, most likely first
    if how.top_p < 1:
        if ids is None:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        probs = logits.softmax(-1)
        least = max(how.top_p, torch.finfo(probs.dtype).tiny)  # a smaller one is 0 to it, and the first shall always stay
        logits = logits.masked_fill(probs.cumsum(-1) - probs >= least, float("-inf"))
    return logits, ids


def _invert(weights_N_V: Tensor, points_N_1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated weights pass `points`, as shares of the whole, [N, 1]; and the whole, [N, 1] float64.

    Weights of 0 are never chosen. In two stages: to cumulate tens of thousands of tokens in float64 costs more than all else.
    """
    size = weights_N_V.shape[-1]
    if size <= BLOCK:
        cumulated = weights_N_V.cumsum(-1, dtype=torch.float64)
        whole = cumulated[:, -1:]
        return _passes(cumulated, points_N_1 * whole), whole
    even = size - size % BLOCK
    sums = weights_N_V[:, :even].unflatten(-1, (-1, BLOCK)).sum(-1)
    if even < size:
        sums = torch.cat([sums, weights_N_V[:, even:].sum(-1, keepdim=True)], dim=-1)
    cumulated = sums.cumsum(-1, dtype=torch.float64)
    whole = cumulated[:, -1:]
    point = points_N_1 * whole
    block = _passes(cumulated, point)
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = weights_N_V.gather(-1, tokens.clamp(max=size - 1)).masked_fill(tokens >= size, 0)
    point = (point - cumulated.gather(-1, block) + sums.gather(-1, block)).clamp(min=0)
    return block * BLOCK + _passes(inside.cumsum(-1, dtype=torch.float64), point), whole


def _passes(cumulated: Tensor, point: Tensor) -> Tensor:
    """The first place where `cumulated` is above `point`, or above anything if `point` has been rounded beyond its end."""
    end = cumulated[:, -1:]
    place = torch.searchsorted(cumulated, torch.minimum(point, end.nextafter(torch.zeros_like(end))), right=True)
    return place.clamp(max=cumulated.shape[-1] - 1)  # only if weights are not finite, which is reported later
