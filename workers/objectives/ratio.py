"""The ratio axis: how per-token log ratios d = log p - log p_anchor are pooled into the log importance ratio.

Every function maps d [B, T] (0 where masked) and the `AnswerTokens` to log r, which is [B, T], or [B, 1] if all tokens of a
sequence share one value. Where masked, log r is finite and ignored. The ratio r is its exponential.

The segment ratio, for segments of any kind (a turn: arXiv 2511.20718; a part of a sentence: 2511.04256; a number of tokens).
Cut an answer y_i into segments S, each with one weight. The exact weight of a segment given its prefix is the product of its
token ratios, exp(sum_{u in S} d_u), whose spread grows with |S|. As GSPO does for the whole answer, take its |S|-th root, the
geometric mean:

    r_it = exp( 1/|S(t)| * sum_{u in S(t)} d_iu ),      d log r_it / d log p_iu = [u in S(t)] / |S(t)|.

One-token segments give the token ratio, a single segment gives the sequence ratio (GSPO). If the advantage is constant over a
segment and the weights w are constant over a sequence, a segment contributes w |S| r_S A to the objective and
w r_S A grad log p_u to the gradient for each of its tokens. All tokens of a segment share one weight and are clipped together
or not at all. A segment counts in proportion to its length, as in the token mean of a GSPO sequence. If tokens have independent
noise of deviation sigma, log r_S has the deviation sigma / sqrt(|S|). The clip range should therefore lie between GRPO's 0.2
(|S| = 1) and GSPO's 3e-4 (the whole answer), and shrink with the square root of the segment's length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.objectives import kernels


@dataclass(frozen=True)
class AnswerTokens:
    """Which tokens belong to answers, how many there are in each row (at least 1), and their segments (see `segments`)."""

    mask_B_T: Tensor
    lengths_B: Tensor
    segments_B_T: Tensor | None = None

    @classmethod
    def of(cls, mask_B_T: Tensor, segments_B_T: Tensor | None = None) -> "AnswerTokens":
        return cls(mask_B_T, kernels.tokens_of(mask_B_T).clamp(min=1), segments_B_T)


Pool = Callable[[Tensor, AnswerTokens], Tensor]


def token(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """Each token its own ratio (PPO, GRPO)."""
    return delta_B_T


def sequence(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """mean_t d: the geometric mean of the token ratios (GSPO, arXiv 2507.18071, eq. 7)."""
    return delta_B_T.sum(dim=1, keepdim=True) / answers.lengths_B.unsqueeze(1)


def sequence_token(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """sg(mean_t d) + (d - sg d): the sequence ratio's value, each token's own gradient (GSPO-token, eq. 14).

    The difference is exactly 0 and is computed first, because (mean + d) - d would lose digits in low precision.
    """
    return sequence(delta_B_T.detach(), answers) + (delta_B_T - delta_B_T.detach())


def product(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """sum_t d: the exact ratio of the whole answer."""
    return delta_B_T.sum(dim=1, keepdim=True)


def product_token(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """sg(sum_t d) + (d - sg d): the product's value, each token's own gradient."""
    return product(delta_B_T.detach(), answers) + (delta_B_T - delta_B_T.detach())


def segment(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """The mean of d over the token's segment. The module's docstring has the derivation."""
    place_B_T = answers.segments_B_T
    if place_B_T is None:
        raise ValueError("the segment ratio needs segment_ids [B, T] in the batch, or a chunk length in the objective")
    nothing = torch.zeros_like(delta_B_T)
    sums = nothing.scatter_add(1, place_B_T, delta_B_T)
    counts = nothing.scatter_add(1, place_B_T, answers.mask_B_T.to(delta_B_T.dtype))
    return (sums / counts.clamp(min=1)).gather(1, place_B_T)


def one(delta_B_T: Tensor, answers: AnswerTokens) -> Tensor:
    """0 without a gradient, so that the ratio is 1 (REINFORCE)."""
    return delta_B_T.new_zeros(len(delta_B_T), 1)


@dataclass(frozen=True)
class Ratio:
    """A pooling, and whether the policy gradient runs through log p because the ratio is a constant."""

    pool: Pool
    constant: bool = False


RATIOS: dict[str, Ratio] = {
    "token": Ratio(token),
    "sequence": Ratio(sequence),
    "sequence_token": Ratio(sequence_token),
    "product": Ratio(product),
    "product_token": Ratio(product_token),
    "segment": Ratio(segment),
    "one": Ratio(one, constant=True),
}


def segments(mask_B_T: Tensor, ids_B_T: Tensor | None, chunk: int | None) -> Tensor | None:
    """The segments of each row's answer tokens, numbered from 0: chunks of `chunk` tokens, or else by the given ids. [B, T]"""
    if chunk is not None:
        return chunks(mask_B_T, chunk)
    return None if ids_B_T is None else dense(ids_B_T, mask_B_T)


def chunks(mask_B_T: Tensor, length: int) -> Tensor:
    """Consecutive chunks of `length` answer tokens (masked positions in between do not count). [B, T]"""
    return (mask_B_T.long().cumsum(dim=1) - 1).clamp(min=0) // length


def dense(ids_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """Renumber arbitrary ids to 0, 1, 2 ... within each row. [B, T]"""
    ordered, order = torch.where(mask_B_T, ids_B_T, 0).sort(dim=1)
    starts = torch.zeros_like(order)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(order).scatter_(1, order, starts.cumsum(dim=1))
