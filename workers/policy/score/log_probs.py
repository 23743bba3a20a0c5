"""Log-probabilities of answers. The head runs on the answers' positions only; the softmax is in float32.

For most models the head is a layer that can be applied to chosen hidden states. Some models change their logits afterwards in
`forward` (soft-capping, scaling, a forbidden part of the vocabulary). A trial at load finds out, whatever the reason. For those
models the whole forward runs, and logits are kept from the first position that is needed.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.policy.score.chosen import chosen
from workers.policy.score.layout import Padded

# logits [N, V] and the targets of each row -> tensors [N, ...]
OfLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

CHUNK_BYTES = 2**28  # of float32 logits; with gradients, more than one chunk means that each is computed twice


class Scorer:
    """log_probs and entropies of answers under one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.head_on_answers_only = _head_is_all_that_follows(model)

    def __call__(self, batch: Padded, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log_probs and entropies, both [N] float32, one per answer token; the entropies have no gradient."""

        def both(logits_N_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
            return _log_probs_and_entropy(logits_N_V, targets_N, temperature)

        log_probs, entropy = self._at(batch.input_ids_B_L, batch.positions_N, batch.targets_N, both)
        return log_probs, entropy

    def log_probs(self, input_ids_B_L: Tensor, positions_N: Tensor, targets_N: Tensor) -> Tensor:
        """The log-probs of `targets_N` [N] or [N, K] at these flat positions, float32 in the same shape."""
        return self._at(input_ids_B_L, positions_N, targets_N, lambda logits, targets: (_log_probs(logits, targets),))[0]

    @torch.no_grad()
    def likeliest(self, input_ids_B_L: Tensor, positions_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at these flat positions, the likeliest first, and their log-probs: both [N, count]."""

        def top(logits_N_V: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            logits = logits_N_V.float()
            values, ids = logits.topk(count, dim=-1)
            return ids, values - logits.logsumexp(-1, keepdim=True)

        ids, values = self._at(input_ids_B_L, positions_N, positions_N, top)
        return ids, values

    def _at(self, input_ids_B_L: Tensor, positions_N: Tensor, targets_N: Tensor, of: OfLogits) -> tuple[Tensor, ...]:
        """What `of` makes of the logits at these flat positions of [B x L], which rise, each with its targets."""
        if self.head_on_answers_only:
            hidden = self._model.base_model(input_ids=input_ids_B_L, use_cache=False).last_hidden_state
            flat = hidden.flatten(0, 1)
            if len(positions_N) < len(flat):  # else it is every position, in order
                flat = flat.index_select(0, positions_N)
            return self._from_hidden(flat, targets_N, of)
        length = input_ids_B_L.shape[1]
        columns = positions_N % length
        keep = length - int(columns.min()) if columns.numel() else 1
        arguments: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        logits = self._model(input_ids=input_ids_B_L, use_cache=False, **arguments).logits
        first = length - logits.shape[1]
        chosen = (positions_N // length) * logits.shape[1] + columns - first
        return of(logits.flatten(0, 1).index_select(0, chosen), targets_N)

    def _from_hidden(self, hidden_N_H: Tensor, targets_N: Tensor, of: OfLogits) -> tuple[Tensor, ...]:
        head: Any = self._model.get_output_embeddings()
        rows = max(1, CHUNK_BYTES // (4 * self._model.config.get_text_config().vocab_size))

        def one(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return of(head(hidden), targets)

        if len(hidden_N_H) <= rows:
            return one(hidden_N_H, targets_N)
        chunks = zip(hidden_N_H.split(rows), targets_N.split(rows), strict=True)
        if torch.is_grad_enabled():
            parts = [checkpoint(one, hidden, targets, use_reentrant=False) for hidden, targets in chunks]
        else:
            parts = [one(hidden, targets) for hidden, targets in chunks]
        return tuple(map(torch.cat, zip(*parts, strict=True)))


def _log_probs(logits_N_V: Tensor, targets_N: Tensor) -> Tensor:
    """Of one target [N] or several [N, K] a row; all are gathered from the same logits."""
    return chosen(logits_N_V.float(), targets_N.view(len(targets_N), -1))[0].view(targets_N.shape)


def _log_probs_and_entropy(logits_N_V: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = logits_N_V.float()
    if temperature != 1:
        logits = logits / temperature
    log_probs_N_1, whole_N_1 = chosen(logits, targets_N.unsqueeze(-1))
    with torch.no_grad():
        # entr(0) is 0: a token that cannot be drawn adds no entropy.
        entropy = torch.special.entr((logits.detach() - whole_N_1).exp_()).sum(-1)
    return log_probs_N_1.squeeze(-1), entropy


@torch.no_grad()
def _head_is_all_that_follows(model: PreTrainedModel) -> bool:
    """Whether forward's logits are exactly the head applied to the backbone's last hidden states."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = head(hidden)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    theirs = model(input_ids=ids, use_cache=False).logits
    return ours.shape == theirs.shape and torch.equal(ours.float(), theirs.float())
