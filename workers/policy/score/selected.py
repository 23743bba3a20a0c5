"""The log-probs of selected tokens, without those of all others, and with at most one tensor of the logits' size.

Torch's `log_softmax` adds float32 exponentials one after the other on a CPU: over SmolLM2's 49,152 tokens its log-probs are too
high by 7e-6 on average (torch 2.13), twenty times the error of `logsumexp`, and a sampler without this error looks like another
policy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_N_V: Tensor, targets_N_K: Tensor, consumes: bool) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.consumes = consumes
        whole_N_1 = logits_N_V.logsumexp(-1, keepdim=True)
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
    highest, chosen = logits.amax(-1, keepdim=True), logits.gather(-1, targets_N_1)
    whole = logits.sub_(highest).exp_().sum(-1, keepdim=True)  # as logsumexp does, but in place
    off = logits.div_(whole)  # softmax - onehot
    off.scatter_add_(-1, targets_N_1, off.new_full(targets_N_1.shape, -1.0))
    return (chosen - (whole.log() + highest)).squeeze(-1), off.to(weight_V_H.dtype) @ weight_V_H


def frozen_head_log_probs(
    hidden_N_H: Tensor, weight_V_H: Tensor, targets_N: Tensor, *, temperature: float, rows: int
) -> Tensor:
    """The log-probs [N] of one token each, float32 or better, of hidden states under a head that is not trained.

    A log-prob's gradient has the hidden state's width, and does not depend on what follows but for a factor, so it is computed
    along with the log-prob: logits of `rows` positions at a time, once, and none is kept."""
    return _FrozenHead.apply(hidden_N_H, weight_V_H, targets_N, temperature, rows)  # pyright: ignore[reportReturnType]
