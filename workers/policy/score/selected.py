"""The log-probs of selected tokens, without those of all others, and with at most one tensor of the logits' size.

The logarithm of the whole is put together from those of blocks of the vocabulary, everywhere: so training, which computes the
logits in blocks, and scoring, which has them all, give the same log-probs to the bit.

Torch's `log_softmax` adds float32 exponentials one after the other on a CPU: over SmolLM2's 49,152 tokens its log-probs are too
high by 7e-6 on average (torch 2.13), twenty times the error of `logsumexp`, and a sampler without this error looks like another
policy.
"""

from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COLUMNS = 16_384  # of a block: 32 MiB at 512 positions in float32, from which on malloc hands a freed block back to the system


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """In float32 or better."""
    logits = logits.to(_wide(logits))
    return logits if temperature == 1 else logits / temperature


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _together(wholes_N_1: list[Tensor]) -> Tensor:
    """The logarithm of the whole [N, 1] from those of its blocks."""
    return torch.cat(wholes_N_1, -1).logsumexp(-1, keepdim=True)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_N_V: Tensor, targets_N_K: Tensor, consumes: bool) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.consumes = consumes
        whole_N_1 = _together([block.logsumexp(-1, keepdim=True) for block in logits_N_V.split(COLUMNS, -1)])
        ctx.save_for_backward(logits_N_V, targets_N_K, whole_N_1)
        ctx.mark_non_differentiable(whole_N_1)
        return logits_N_V.gather(-1, targets_N_K) - whole_N_1, whole_N_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N_K: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of log_prob_k: onehot_k - softmax."""
        logits_N_V, targets_N_K, whole_N_1 = ctx.saved_tensors
        shifted_N_V = logits_N_V.sub_(whole_N_1) if ctx.consumes else logits_N_V - whole_N_1
        grad_N_V = shifted_N_V.exp_().mul_(-grad_N_K.sum(-1, keepdim=True))
        return grad_N_V.scatter_add_(-1, targets_N_K, grad_N_K), None, None


def selected_log_probs(logits_N_V: Tensor, targets_N_K: Tensor, *, consumes: bool = False) -> tuple[Tensor, Tensor]:
    """The log-probs [N, K] of the targets, and the logarithm of the whole [N, 1] that the exponentials were divided by, which
    carries no gradient.

    consumes  nobody else needs the logits: the backward pass writes its gradient over them, so a second one raises RuntimeError
    """
    return _Selected.apply(logits_N_V, targets_N_K, consumes)  # pyright: ignore[reportReturnType]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_N_H: Tensor, weight_V_H: Tensor, targets_N: Tensor, temperature: float, rows: int
    ) -> Tensor:
        pairs = zip(hidden_N_H.split(rows), targets_N.unsqueeze(-1).split(rows), strict=True)
        parts = [_log_probs_and_slopes(hidden, weight_V_H, targets, temperature) for hidden, targets in pairs]
        log_probs_N, slopes_N_H = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(slopes_N_H)
        ctx.temperature = temperature
        return log_probs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slopes_N_H,) = ctx.saved_tensors
        return (slopes_N_H * (-grad_N / ctx.temperature).unsqueeze(-1)).to(slopes_N_H.dtype), None, None, None, None


def _log_probs_and_slopes(
    hidden_N_H: Tensor, weight_V_H: Tensor, targets_N_1: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probs [N], and the gradients [N, H] of their negatives but for 1 / temperature."""
    logits = hidden_N_H @ weight_V_H.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits /= temperature
    chosen, blocks = logits.gather(-1, targets_N_1), logits.split(COLUMNS, -1)
    totals, wholes = list[Tensor](), list[Tensor]()
    for block in blocks:  # as logsumexp does, but in place
        highest = block.amax(-1, keepdim=True)
        totals.append(block.sub_(highest).exp_().sum(-1, keepdim=True))
        wholes.append(totals[-1].log() + highest)
    whole = _together(wholes)
    for block, total, own in zip(blocks, totals, wholes, strict=True):
        block.div_(total * (whole - own).exp_())
    off = logits  # softmax - onehot
    off.scatter_add_(-1, targets_N_1, off.new_full(targets_N_1.shape, -1.0))
    return (chosen - whole).squeeze(-1), off.to(weight_V_H.dtype) @ weight_V_H


def frozen_head_log_probs(
    hidden_N_H: Tensor, weight_V_H: Tensor, targets_N: Tensor, *, temperature: float, rows: int
) -> Tensor:
    """The log-probs [N] of one token each, float32 or better, of hidden states under a head that is not trained.

    A log-prob's gradient has the hidden state's width, and does not depend on what follows but for a factor, so it is computed
    along with the log-prob: logits of `rows` positions at a time, once, and none is kept."""
    return _FrozenHead.apply(hidden_N_H, weight_V_H, targets_N, temperature, rows)  # pyright: ignore[reportReturnType]


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_N_H: Tensor, weight_V_H: Tensor, targets_N_K: Tensor, temperature: float, keeps: bool
    ) -> Tensor:
        ctx.temperature, kept, wholes, start = temperature, list[Tensor](), list[Tensor](), 0
        chosen_N_K = hidden_N_H.new_full(targets_N_K.shape, nan, dtype=_wide(hidden_N_H))  # of a token outside the vocabulary
        for weight in weight_V_H.split(COLUMNS):
            raw = hidden_N_H @ weight.T
            if keeps:
                kept.append(raw)
            block = tempered(raw, temperature)
            wholes.append(block.logsumexp(-1, keepdim=True))
            place_N_K, inside_N_K = _in_block(targets_N_K, start, block)
            chosen_N_K = torch.where(inside_N_K, block.gather(-1, place_N_K), chosen_N_K)
            start += len(weight)
        whole_N_1 = _together(wholes)
        ctx.save_for_backward(hidden_N_H, weight_V_H, targets_N_K, whole_N_1)
        ctx.kept = kept if keeps else None
        return chosen_N_K - whole_N_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N_K: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Block by block: the gradient of the block's logits, what it adds to that of the hidden states, and these rows of
        the weight's. The block is then freed, so the weight's gradient grows as the logits go."""
        hidden_N_H, weight_V_H, targets_N_K, whole_N_1 = ctx.saved_tensors
        kept = ctx.kept
        if kept == []:
            raise RuntimeError("the logits were freed as the gradient was computed, which is possible once")
        total_N_1, start = -grad_N_K.sum(-1, keepdim=True) / ctx.temperature, 0
        of_hidden = torch.zeros_like(hidden_N_H, dtype=_wide(hidden_N_H)) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight_V_H)
        for weight, of_rows in zip(weight_V_H.split(COLUMNS), of_weight.split(COLUMNS), strict=True):
            block = tempered(hidden_N_H @ weight.T if kept is None else kept.pop(0), ctx.temperature)
            block = block.sub_(whole_N_1).exp_().mul_(total_N_1)
            place_N_K, inside_N_K = _in_block(targets_N_K, start, block)
            block.scatter_add_(-1, place_N_K, torch.where(inside_N_K, grad_N_K / ctx.temperature, 0))
            block = block.to(weight.dtype)
            if of_hidden is not None:
                of_hidden += block @ weight
            torch.mm(block.T, hidden_N_H, out=of_rows)
            del block
            start += len(weight)
        return None if of_hidden is None else of_hidden.to(hidden_N_H.dtype), of_weight, None, None, None


def _in_block(targets_N_K: Tensor, start: int, block: Tensor) -> tuple[Tensor, Tensor]:
    """Where in a block that starts there the targets stand, and which do."""
    places = targets_N_K - start
    return places.clamp(0, block.shape[-1] - 1), (places >= 0) & (places < block.shape[-1])


def trained_head_log_probs(
    hidden_N_H: Tensor, weight_V_H: Tensor, targets_N_K: Tensor, *, temperature: float, keeps: bool
) -> Tensor:
    """The log-probs [N, K] of these tokens, float32 or better, of hidden states under a head that is trained.

    keeps  the logits, for the backward pass, which frees them block by block as the weight's gradient comes; else it computes
           each block anew
    """
    return _TrainedHead.apply(hidden_N_H, weight_V_H, targets_N_K, temperature, keeps)  # pyright: ignore[reportReturnType]
