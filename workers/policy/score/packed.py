"""Sequences without padding, in one row of tokens: each prompt once, however many answers follow it, and equal answers once.

All layers but attention look at single tokens, so they do the work of the real tokens only. Attention is told where each
token belongs: prompts attend to themselves, an answer's tokens to its prompt and to those before them. Keys and values of a
prompt are gathered for each of its answers; gradients flow back through that and add up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers.policy.score.layout import Sequence, batches_of

NAME = "ratchet_packed"  # of the attention, among transformers' own
WIDER = 4  # times as many keys may be gathered as tokens may be in a micro-batch
WIDER_ALONE = 16  # the same of a micro-batch of one prompt, if that may be long; a key takes a 20th of a token's memory or less
EVEN = 32  # a part of the tokens to which batches are made even
WORTH = 0.9  # packed tokens as a share of padded ones, from which on packing is faster
# Arguments of transformers' attention that change what it computes, and that this one does not know.
UNKNOWN = "sliding_window", "softcap", "s_aux", "head_mask", "position_bias"
# Kinds of rotary factors that depend on the longest row in a batch.
BY_BATCH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Tree:
    """Where in the row the tokens of P prompts and U answers stand; places beyond an end are 0 and of no effect."""

    prompts_P_L: Tensor
    answers_U_T: Tensor  # without the last token of each, which is never read
    keys_U_K: Tensor  # the places of an answer's prompt and of its own tokens
    hidden_U_1_T_K: Tensor  # bool, True where a token may look
    of_prompts: Tensor  # which of the P x L are tokens
    of_answers: Tensor  # which of the U x T are tokens


@dataclass(frozen=True)
class Packed:
    """Rows as one row of N tokens. The hidden state at `positions_M[m]` predicts `targets_M[m]`, token `steps_M[m]` of answer
    `answers_M[m]`; row i has the answer `of_row_B[i]`."""

    input_ids_1_N: Tensor
    position_ids_1_N: Tensor
    positions_M: Tensor
    targets_M: Tensor
    answers_M: Tensor
    steps_M: Tensor
    of_row_B: Tensor
    answers: int
    tree: Tree


def pack(sequences: list[Sequence], device: torch.device) -> Packed:
    """Pack the sequences. Raises ValueError for an empty prompt."""
    prompts: dict[tuple[int, ...], int] = {}
    answers: dict[tuple[int, tuple[int, ...]], int] = {}
    of_row: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        if not prompt:
            raise ValueError(f"sequence {row} has an empty prompt; its answer's first token would have nothing before it")
        number = prompts.setdefault(tuple(prompt), len(prompts))
        of_row.append(answers.setdefault((number, tuple(completion)), len(answers)))
    ids = [token for prompt in prompts for token in prompt]
    position_ids = [place for prompt in prompts for place in range(len(prompt))]
    starts, at = list[int](), 0
    for prompt in prompts:
        starts.append(at)
        at += len(prompt)
    lengths = [len(prompt) for prompt in prompts]
    places, targets, of_answer, steps = list[int](), list[int](), list[int](), list[int]()
    own: list[range] = []
    for answer, (number, completion) in enumerate(answers):
        first, length = len(ids), lengths[number]
        own.append(range(first, first + max(len(completion) - 1, 0)))
        ids += completion[:-1]
        position_ids += range(length, length + len(own[-1]))
        if completion:
            places += [starts[number] + length - 1, *own[-1]]
            targets += completion
            of_answer += [answer] * len(completion)
            steps += range(len(completion))

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    whole = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    prompts_P_L, real_P_L = _ragged(whole, device)
    answers_U_T, real_U_T = _ragged(own, device)
    numbers = tensor([number for number, _ in answers])
    count, width = answers_U_T.shape
    before = real_P_L[numbers].unsqueeze(1).expand(count, width, -1)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(count, width, width)
    tree = Tree(
        prompts_P_L,
        answers_U_T,
        torch.cat([prompts_P_L[numbers], answers_U_T], dim=1),
        torch.cat([before, causal], dim=2).unsqueeze(1),
        real_P_L.flatten().nonzero().squeeze(1),
        real_U_T.flatten().nonzero().squeeze(1),
    )
    return Packed(
        tensor(ids).unsqueeze(0),
        tensor(position_ids).unsqueeze(0),
        tensor(places),
        tensor(targets),
        tensor(of_answer),
        tensor(steps),
        tensor(of_row),
        len(answers),
        tree,
    )


def _ragged(rows: list[range], device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of ragged rows, padded with 0, and which of them are real: [R, longest] each."""
    longest = max(map(len, rows))
    places = [[*row, *[0] * (longest - len(row))] for row in rows]
    real = torch.arange(longest, device=device) < torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    return torch.tensor(places, dtype=torch.long, device=device).view(len(rows), longest), real


def packed_batches(sequences: list[Sequence], tokens: int, *, long_prompts: bool = False) -> list[list[int]] | None:
    """Batches of rows of at most `tokens` real tokens, but at least one row; rows with one prompt stand together. As few as
    possible, and of about one size, because the largest decides how much memory is needed. None where packing saves too little.
    It depends on the sequences alone, so a resumed run decides alike.

    long_prompts  where rows take more than half of `tokens`, a batch of one prompt may hold `tokens` of its answers beside it,
                  with up to twice the memory. Else such a prompt would be read anew for each answer or two
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, _) in enumerate(sequences):
        rows_of.setdefault(tuple(prompt), []).append(row)
    order = [
        row
        for _, rows in sorted(rows_of.items(), key=lambda item: (-len(item[0]), item[1][0]))
        for row in sorted(rows, key=lambda row: (-len(sequences[row].completion), row))
    ]
    long = tokens // 2 if long_prompts else None
    batches, real = _cut(sequences, order, tokens, WIDER * tokens, long)
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    padded = sum(len(rows) * lengths[rows[0]] for rows in batches_of(lengths, tokens))
    if real > WORTH * padded:
        return None
    low, high = 0, tokens
    while len(batches) > 1 and high - low > max(1, tokens // EVEN):
        middle = (low + high) // 2
        smaller, _ = _cut(sequences, order, middle, WIDER * tokens, long)
        if len(smaller) > len(batches):
            low = middle
        else:
            batches, high = smaller, middle
    return batches


def _cut(sequences: list[Sequence], order: list[int], tokens: int, keys: int, long: int | None) -> tuple[list[list[int]], int]:
    """Batches of rows in this order, each of at most `tokens` real tokens and `keys` gathered keys; and the tokens of all. Rows
    of more than `long` tokens have more room beside others with their prompt."""
    batches, real = list[list[int]](), 0
    batch, held, longest = list[int](), 0, 0  # the open one, its tokens, and its longest row
    first: list[int] | None = None  # its first prompt
    prompt: list[int] | None = None
    answers: set[tuple[int, ...]] = set()  # to this prompt, in this batch
    for row in order:
        (own, completion), answer = sequences[row], tuple(sequences[row].completion)
        whole = len(own) + len(completion)
        if own != prompt:
            more, prompt, answers = whole, own, set()
        else:
            more = 0 if answer in answers else len(completion)
        gathered = (len(batch) + 1) * max(longest, whole)
        if long is not None and own == first and longest > long:  # rows with one prompt stand together: it is the only one
            full = held + more > tokens + len(own) or gathered > WIDER_ALONE * max(tokens, longest)
        else:
            full = held + more > tokens or gathered > keys
        if batch and full:
            batches.append(batch)
            batch, held, longest, answers, more = [], 0, 0, set(), whole
        if not batch:
            first = own
        batch.append(row)
        held, longest, real = held + more, max(longest, whole), real + more
        answers.add(answer)
    return ([*batches, batch] if batch else batches), real


_tree: ContextVar[Tree] = ContextVar("tree")


@contextmanager
def attending(model: PreTrainedModel, tree: Tree) -> Iterator[None]:
    """Inside, the model attends as the tree says."""
    config: Any = model.config.get_text_config()
    before, token = config._attn_implementation, _tree.set(tree)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _tree.reset(token)


def hidden_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """[N, width] of the backbone."""
    with attending(model, batch.tree):
        found = model.base_model(input_ids=batch.input_ids_1_N, position_ids=batch.position_ids_1_N, use_cache=False)
    return found.last_hidden_state.squeeze(0)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: [1, heads, N, size] each; returns [1, N, heads, size]."""
    if asked := [name for name in UNKNOWN if more.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {asked}")
    tree, groups = _tree.get(), query.shape[1] // key.shape[1]
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # [N, heads, size]

    def at(states: Tensor, places: Tensor) -> Tensor:
        """[rows, heads, places, size]"""
        return states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)

    def attend(queries: Tensor, keys: Tensor, **how: Any) -> Tensor:
        found = scaled_dot_product_attention(
            at(q, queries), at(k, keys), at(v, keys), scale=scaling, enable_gqa=groups > 1, **how
        )
        return found.transpose(1, 2).flatten(0, 1)

    done = [attend(tree.prompts_P_L, tree.prompts_P_L, is_causal=True).index_select(0, tree.of_prompts)]
    if len(tree.of_answers):
        answered = attend(tree.answers_U_T, tree.keys_U_K, attn_mask=tree.hidden_U_1_T_K)
        done.append(answered.index_select(0, tree.of_answers))
    return torch.cat(done).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
