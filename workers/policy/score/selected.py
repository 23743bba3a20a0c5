"""The log-probs of selected tokens, without those of all others.

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
    def forward(ctx: Any, logits_N_V: Tensor, targets_N_K: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole_N_1 = logits_N_V.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits_N_V, targets_N_K, whole_N_1)
        ctx.mark_non_differentiable(whole_N_1)
        return logits_N_V.gather(-1, targets_N_K) - whole_N_1, whole_N_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N_K: Tensor, _: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of log_prob_k: onehot_k - softmax."""
        logits_N_V, targets_N_K, whole_N_1 = ctx.saved_tensors
        grad_N_V = (logits_N_V - whole_N_1).exp_().mul_(-grad_N_K.sum(-1, keepdim=True))
        return grad_N_V.scatter_add_(-1, targets_N_K, grad_N_K), None


def selected_log_probs(logits_N_V: Tensor, targets_N_K: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probs [N, K] of the targets, and the logarithm of the whole [N, 1] that the exponentials were divided by, which
    carries no gradient."""
    return _Selected.apply(logits_N_V, targets_N_K)  # pyright: ignore[reportReturnType]
