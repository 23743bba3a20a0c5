"""The ratio axis: how per-token log ratios d = log p - log p_anchor are pooled into the log importance ratio.

Every function maps d [B, T] (0 where masked) and what is known of the answers to the log ratio, [B, T] or, where a sequence
has one for all its tokens, [B, 1]; what it gives where masked is finite and not looked at.

The segment ratio, for segments of any kind (a turn: arXiv 2511.20718; a part of a sentence: 2511.04256; so many tokens). Cut
an answer y_i into segments S and ask for one weight a segment. The exact weight of a
segment given its prefix is the product of its token ratios, exp(sum_{u in S} d_u), whose spread grows with |S|. As GSPO
does for the whole answer, take its |S|-th root: the geometric mean

    r_it = exp( 1/|S(t)| * sum_{u in S(t)} d_iu ),      d log r_it / d log p_iu = [u in S(t)] / |S(t)|.

One-token segments give the token ratio, one segment the sequence ratio (GSPO). With an advantage that is constant over
a segment and weights w that are constant over a sequence, a segment contributes w |S| r_S A to the objective and
w r_S A grad log p_u for each of its tokens: all its tokens share one weight and are clipped together or not at all, and
a long segment counts by its length, just as the token mean of a GSPO sequence does. For independent token noise of
deviation sigma, log r_S has deviation sigma / sqrt(|S|): the clip range belongs between GRPO's 0.2 (|S| = 1) and
GSPO's 3e-4 (the whole answer), and shrinks with the root of the segment's length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.objectives.tensors import tokens_of


@dataclass(frozen=True)
class Answers:
    """Which tokens are answers, how many of them a row has (of none: 1), and what segment each belongs to."""

    mask_B_T: Tensor
    lengths_B: Tensor
    segments_B_T: Tensor | None = None

    @classmethod
    def of(cls, mask_B_T: Tensor, segments_B_T: Tensor | None = None) -> "Answers":
        return cls(mask_B_T, tokens_of(mask_B_T).clamp(min=1), segments_B_T)


Pool = Callable[[Tensor, Answers], Tensor]


def token(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """Each token its own ratio (PPO, GRPO)."""
    return delta_B_T


def sequence(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """mean_t d: the geometric mean of the token ratios (GSPO, arXiv 2507.18071, eq. 7)."""
    return delta_B_T.sum(dim=1, keepdim=True) / answers.lengths_B.unsqueeze(1)


def sequence_token(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """sg(mean_t d) + (d - sg d): the sequence ratio's value, each token's own gradient (GSPO-token, eq. 14).

    The difference is exactly 0 and is formed first: (mean + d) - d would lose digits in low precision.
    """
    return sequence(delta_B_T.detach(), answers) + (delta_B_T - delta_B_T.detach())


def product(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """sum_t d: the exact ratio of the whole answer."""
    return delta_B_T.sum(dim=1, keepdim=True)


def product_token(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """sg(sum_t d) + (d - sg d): the product's value, each token's own gradient."""
    return product(delta_B_T.detach(), answers) + (delta_B_T - delta_B_T.detach())


def segment(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """The mean of d inside a token's segment; the derivation stands above."""
    mask_B_T, segments_B_T = answers.mask_B_T, answers.segments_B_T
    if segments_B_T is None:
        raise ValueError("the segment ratio needs segment_ids [B, T] in the batch, or a chunk length in the objective")
    ids, place = torch.unique(torch.where(mask_B_T, segments_B_T, 0), return_inverse=True)
    shape = (delta_B_T.shape[0], max(1, ids.numel()))
    sums = delta_B_T.new_zeros(shape).scatter_add(1, place, delta_B_T)
    counts = delta_B_T.new_zeros(shape).scatter_add(1, place, mask_B_T.to(delta_B_T.dtype)).clamp(min=1)
    return (sums / counts).gather(1, place)


def one(delta_B_T: Tensor, answers: Answers) -> Tensor:
    """log 1, and no gradient (REINFORCE)."""
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


def chunks(mask_B_T: Tensor, length: int) -> Tensor:
    """Segment ids of consecutive chunks of `length` answer tokens (masked positions in between do not count). [B, T]"""
    return (mask_B_T.long().cumsum(dim=1) - 1).clamp(min=0) // length
