"""Log-probabilities of answers. The head runs on the answers' positions only; the softmax is in float32.

For most models the head is a layer that can be applied to chosen hidden states. Some models change their logits afterwards in
`forward` (soft-capping, scaling, a forbidden part of the vocabulary). A trial at load finds out, whatever the reason. For those
models the whole forward runs, and logits are kept from the first position that is needed.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.policy.score.layout import Padded, Sequence, microbatches, pad
from workers.policy.score.packed import BY_BATCH, hidden_states, pack, packed_batches
from workers.policy.score.selected import frozen_head_log_probs, selected_log_probs, tempered, trained_head_log_probs
from workers.policy.shards import Shards
from workers.rollout.cache import FULL, windows

# logits [N, V] and the targets of each row -> tensors [N, ...]
OfLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

CHUNK_BYTES = 2**28  # of float32 logits, of which several copies may be needed
TRAINED_CHUNK_BYTES = 2**29  # with gradients: one copy, but more means that the logits are computed twice
FROZEN_CHUNK_BYTES = 2**26  # under a head that is not trained, where nothing is computed twice
NOTHING = Sequence([0], [0])  # what a pass reads that is made for the other ranks' sake


class Scorer:
    """log_probs and entropies of answers under one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.head_on_answers_only = _head_is_all_that_follows(model)
        self.packs = self.head_on_answers_only and _packs(model)
        self.shards: Shards | None = None

    def __call__(self, batch: Padded, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log_probs and entropies, both [N] float32, one per answer token; the entropies have no gradient."""
        log_probs, entropy = self._at(batch.input_ids_B_L, batch.positions_N, batch.targets_N, both(temperature))
        return log_probs, entropy

    def each(
        self,
        sequences: list[Sequence],
        tokens: int,
        of: OfLogits,
        *,
        pad_id: int,
        share: bool = True,
        long_prompts: bool = False,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Micro-batch after micro-batch of at most `tokens` tokens: its rows in `sequences`, and what `of` makes of the logits
        of their answers, each [b, T], 0 beyond an answer's end; T is the longest answer of all.

        share  prompts and answers that rows have in common may be computed once, if the model allows it and it is worth it
        long_prompts  then `tokens` of a prompt's answers may stand beside it, however long it is

        If the weights are sharded, batches without rows follow where other ranks have more.
        """
        width = max((len(sequence.completion) for sequence in sequences), default=0)
        packed = packed_batches(sequences, tokens, long_prompts=long_prompts) if share and self.packs else None
        batches = list(microbatches(sequences, tokens)) if packed is None else packed
        more = 0 if self.shards is None else self.shards.passes(len(batches)) - len(batches)
        for rows in batches + [[]] * more:
            chosen = [sequences[row] for row in rows]
            if packed is None or not rows:
                forward = partial(self._padded, chosen, width, of, pad_id)
            else:
                forward = partial(self._packed, chosen, width, of)
            yield rows, forward() if self.shards is None else self.shards.run(forward)

    def log_probs(self, input_ids_B_L: Tensor, positions_N: Tensor, targets_N: Tensor) -> Tensor:
        """The log-probs of `targets_N` [N] or [N, K] at these flat positions, float32 in the same shape."""
        assert self.shards is None, "of sessions, which have one GPU"
        return self._at(input_ids_B_L, positions_N, targets_N, LogProbsAlone())[0]

    @torch.no_grad()
    def likeliest(self, input_ids_B_L: Tensor, positions_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at these flat positions, the likeliest first, and their log-probs: both [N, count]."""
        assert self.shards is None, "of sessions, which have one GPU"

        def top(logits_N_V: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            logits = logits_N_V.float()
            values, ids = logits.topk(count, dim=-1)
            return ids, values - logits.logsumexp(-1, keepdim=True)

        ids, values = self._at(input_ids_B_L, positions_N, positions_N, top)
        return ids, values

    def _padded(self, sequences: list[Sequence], width: int, of: OfLogits, pad_id: int) -> list[Tensor]:
        batch = pad(sequences or [NOTHING], pad_id, self._model.device)
        found = self._at(batch.input_ids_B_L, batch.positions_N, batch.targets_N, of)
        places, shape = (batch.rows_N, batch.steps_N), (len(sequences), width)
        if not sequences:
            places, found = (batch.rows_N[:0], batch.steps_N[:0]), tuple(each[:0] for each in found)
        return [_spread(each, places, shape) for each in found]

    def _packed(self, sequences: list[Sequence], width: int, of: OfLogits) -> list[Tensor]:
        tree = pack(sequences, self._model.device)
        hidden = hidden_states(self._model, tree).index_select(0, tree.positions_M)
        found = self._from_hidden(hidden, tree.targets_M, of)
        of_answers = [_spread(each, (tree.answers_M, tree.steps_M), (tree.answers, width)) for each in found]
        return [each.index_select(0, tree.of_row_B) for each in of_answers]

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
        position_bytes = 4 * self._model.config.get_text_config().vocab_size
        if isinstance(of, LogProbsAlone) and torch.is_grad_enabled() and _is_one_matrix(head):
            weight, temperature = head.weight, of.temperature
            if weight.requires_grad and self.shards is None:
                rows = max(1, TRAINED_CHUNK_BYTES // position_bytes)
                found = [
                    trained_head_log_probs(hidden, weight, targets, temperature=temperature, keeps=len(hidden_N_H) <= rows)
                    for hidden, targets in zip(hidden_N_H.split(rows), _in_columns(targets_N).split(rows), strict=True)
                ]
                return (torch.cat(found).view(targets_N.shape),)
            if not weight.requires_grad and targets_N.dim() == 1:
                rows = max(1, FROZEN_CHUNK_BYTES // position_bytes)
                return (frozen_head_log_probs(hidden_N_H, weight, targets_N, temperature=temperature, rows=rows),)
        rows = max(1, (TRAINED_CHUNK_BYTES if torch.is_grad_enabled() else CHUNK_BYTES) // position_bytes)

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


@dataclass(frozen=True)
class LogProbsAlone:
    """The targets' log-probs."""

    temperature: float = 1.0

    def __call__(self, logits_N_V: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
        return (_log_probs(logits_N_V, targets_N, self.temperature),)


def both(temperature: float = 1.0) -> OfLogits:
    """The targets' log-probs, and the entropies, without a gradient."""
    return lambda logits_N_V, targets_N: _log_probs_and_entropy(logits_N_V, targets_N, temperature)


def _spread(values: Tensor, places: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    return values.new_zeros(shape).index_put(places, values)


def _log_probs(logits_N_V: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """Of one target [N] or several [N, K] a row; all are gathered from the same logits."""
    logits = tempered(logits_N_V, temperature)
    return selected_log_probs(logits, _in_columns(targets_N), consumes=True)[0].view(targets_N.shape)


def _in_columns(targets_N: Tensor) -> Tensor:
    """[N, K] of [N, K] or, with one target a row, [N]."""
    return targets_N if targets_N.dim() == 2 else targets_N.unsqueeze(-1)


def _log_probs_and_entropy(logits_N_V: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = tempered(logits_N_V, temperature)
    log_probs_N_1, whole_N_1 = selected_log_probs(logits, targets_N.unsqueeze(-1))
    with torch.no_grad():
        # entr(0) is 0: a token that cannot be drawn adds no entropy.
        entropy = torch.special.entr((logits.detach() - whole_N_1).exp_()).sum(-1)
    return log_probs_N_1.squeeze(-1), entropy


def _is_one_matrix(head: nn.Module) -> bool:
    return type(head) is nn.Linear and head.bias is None


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


# A shared prompt of three tokens with two answers, and another pair with longer parts.
TRIAL = Sequence([1, 2, 3], [4, 5, 6, 7]), Sequence([1, 2, 3], [5]), Sequence([6, 1, 4, 2, 7], [3, 1, 2]), Sequence([2], [3, 4])
# The root mean square of the difference of hidden states, as a share of their own. Rounding gives 1e-6 in float32.
OFF = {torch.float32: 1e-4, torch.float64: 1e-8}
OFF_IN_HALF = 0.02


@torch.no_grad()
def _packs(model: PreTrainedModel) -> bool:
    """Whether the backbone gives the same for packed sequences as for padded ones."""
    if any(kind in BY_BATCH for module in model.modules() for kind in _rope_types(module)):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    trial = [Sequence(*([token % vocabulary for token in part] for part in sequence)) for sequence in TRIAL]
    padded, packed = pad(trial, 0, model.device), pack(trial, model.device)
    try:
        # A window is longer than the trial, and not every model tells its attention of one: some have it in the mask alone.
        if windows(model) != {FULL: None}:
            return False
        ours = hidden_states(model, packed).index_select(0, packed.positions_M)
        theirs = model.base_model(input_ids=padded.input_ids_B_L, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        return False
    theirs = theirs.flatten(0, 1).index_select(0, padded.positions_N)
    off = (ours - theirs).double().square().mean().sqrt() / theirs.double().square().mean().sqrt()
    return float(off) <= OFF.get(model.dtype, OFF_IN_HALF)  # false for NaN, too


def _rope_types(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", ())
    return list(kind.values()) if isinstance(kind, dict) else [kind] if isinstance(kind, str) else []
