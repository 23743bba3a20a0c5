"""Continuous batching on one base: rows that finished leave, prompts that wait enter, each row moves on by a token a step.

Rows of several adapters go through the model together. A prompt that several requests share is read once. On a CPU, float32
logits of a row are the same to the bit whatever stands beside it: matrix products of at least LEAST_ROWS rows compute each row
alike, a prompt is padded to a length that depends on itself alone, and attention adds zeros for places that a row does not
see. In bfloat16 products round by their number of rows, so there rows agree to rounding only.
"""

import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from service.errors import JobFailed
from workers.rollout.cache import Slots, windows
from workers.rollout.draw import draw, entropies, key_of, likeliest, uniforms
from workers.rollout.engine import BROKEN, Completion, Engine, Request, TopLogProbs

CPU_CACHE_BYTES = 2 * 2**30  # of keys and values; a constant, so that the same call always makes the same batches
GPU_CACHE_SHARE = 0.25  # of all the memory of the card
KEPT_BYTES = 2**26  # of keys and values that are kept allocated while no row is there
MOST_ROWS = 1024
LEAST_ROWS = 16  # in a matrix product; with fewer, MKL rounds otherwise, and from 5 on is slower too
READ_STEP = 16  # prompts are padded to a multiple
READ_TOKENS = 4096  # of prompts in one pass, with padding, but at least one prompt
HEAD_BYTES = 2**27  # of logits of prompts at a time
DROP_AT = 1 / 8  # rows that ended leave transformers' own cache when they are at least this share: it copies everything
MOST_BYTES = 4  # of a character in UTF-8
STOP_MARGIN_TOKENS = 8  # looked at beyond a stop text's bytes, for tokens that stand for no character

Decode = Callable[[list[list[int]]], list[str]]


class AdapterSwitch(Protocol):
    """The adapters of a model."""

    def has(self, name: str) -> bool: ...

    @property
    def mixes(self) -> bool:
        """Whether the rows of one input may use different adapters."""
        ...

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Inside the `with` block, row i of the model's input uses the adapter names[i], or none."""
        ...


@dataclass(eq=False)
class _Row:
    """One request, waiting or admitted."""

    ticket: int
    request: Request
    key: int  # of its draws
    ends: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[TopLogProbs] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    prompt_log_probs: list[float | None] = field(default_factory=list)
    top_prompt_log_probs: list[TopLogProbs | None] = field(default_factory=list)
    ended: bool = False  # by its last token

    @property
    def position(self) -> int:
        """Of the token that is fed next."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def reserved(self) -> int:
        return len(self.request.prompt) + self.request.how.max_tokens

    def completion(self, text: str, *, stopped: bool) -> Completion:
        asked = self.request
        numbers = self.log_probs + [value for value in self.prompt_log_probs if value is not None]
        if not all(map(isfinite, numbers)):
            return Completion([], [], "", "length", error=_not_finite())
        return Completion(
            self.tokens,
            self.log_probs,
            text,
            "stop" if stopped or self.ended else "length",
            self.prompt_log_probs if asked.prompt_log_probs else None,
            self.top_prompt_log_probs if asked.top_prompt_log_probs else None,
            self.top if asked.top_log_probs else None,
            self.entropies if asked.entropies else None,
        )


def _not_finite() -> JobFailed:
    return JobFailed("non_finite_logits", "the model gave logits that are not finite while sampling")


class LocalEngine(Engine):
    """`decode` leaves out the tokens of `frame`, `show` none. `head_alone`: the logits are exactly the output embeddings
    applied to the backbone's last hidden states. `slots`: use slots if the model's kind allows it; `slotted` says whether they
    are used."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: AdapterSwitch,
        *,
        eos_ids: Iterable[int],
        pad_id: int,
        decode: Decode,
        show: Decode,
        frame: frozenset[int],
        head_alone: bool,
        slots: bool = True,
    ) -> None:
        self._model, self._adapters, self._head_alone = model, adapters, head_alone
        self._decode, self._show, self._frame = decode, show, frame
        self._eos_ids, self._pad_id, self._device = frozenset(eos_ids), pad_id, model.device
        self._takes = inspect.signature(type(model).forward).parameters.keys()
        kinds = windows(model) if slots and "position_ids" in self._takes else None
        self._slots = None if kinds is None else Slots(model, kinds)
        self._own: Any = None  # transformers' cache of the rows, without slots
        self._token_bytes = _token_bytes(model)
        if self._device.type == "cuda":
            budget = GPU_CACHE_SHARE * torch.cuda.get_device_properties(self._device).total_memory
        else:
            budget = CPU_CACHE_BYTES
        self._most_tokens = int(budget / self._token_bytes)  # in the cache
        self._least_rows = LEAST_ROWS if self._device.type == "cpu" else 1
        self._next_ticket = 0
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row | None] = []  # by their slots
        self._done: list[tuple[int, Completion]] = []  # not yet returned by `step`

    @property
    def slotted(self) -> bool:
        return self._slots is not None

    def submit(self, requests: Sequence[Request]) -> list[int]:
        for number, request in enumerate(requests):
            if not request.prompt:
                raise ValueError(f"the prompt of request {number} is empty; an answer's first token needs something before it")
            if request.adapter is not None and not self._adapters.has(request.adapter):
                raise ValueError(f"there is no adapter {request.adapter!r} on this base")
        rows = [self._row(ticket, request) for ticket, request in enumerate(requests, self._next_ticket)]
        self._next_ticket += len(rows)
        self._waiting += rows
        return [row.ticket for row in rows]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Completion]]:
        finished, self._done = self._done, []
        for rows, logits in self._admit():
            finished += self._advance(rows, logits)
        self._close_gaps()
        if self._rows:
            logits = self._next_logits()
            there = [(slot, row) for slot, row in enumerate(self._rows) if row is not None]
            if len(there) < len(logits):
                logits = logits[torch.tensor([slot for slot, _ in there], device=self._device)]
            finished += self._advance([row for _, row in there], logits)
        if not any(self._rows):
            self._rows, self._own = [], None
            if self._slots is not None and not self._waiting and self._bytes_held() > KEPT_BYTES:
                self._slots.clear()
        return finished

    def cancel(self, tickets: Sequence[int]) -> None:
        gone = set(tickets)
        self._waiting = deque(row for row in self._waiting if row.ticket not in gone)
        self._rows = [None if row is not None and row.ticket in gone else row for row in self._rows]
        self._done = [(ticket, completion) for ticket, completion in self._done if ticket not in gone]

    def so_far(self, tickets: Sequence[int]) -> dict[int, list[int]]:
        wanted = set(tickets)
        return {row.ticket: row.tokens for row in self._rows if row is not None and row.ticket in wanted}

    @property
    def pending(self) -> int:
        return len(self._waiting) + sum(row is not None for row in self._rows) + len(self._done)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        tickets = self.submit(requests)
        ours: dict[int, Completion | None] = dict.fromkeys(tickets)
        strangers, self._done = self._done, []
        left = len(ours)
        try:
            while left:
                for ticket, completion in self.step():
                    if ticket in ours:
                        ours[ticket] = completion
                        left -= 1
                    else:
                        strangers.append((ticket, completion))
        except BaseException:
            self.cancel(tickets)
            raise
        finally:
            self._done = strangers
        return [completion for ticket in tickets if (completion := ours[ticket]) is not None]

    def _row(self, ticket: int, request: Request) -> _Row:
        how = request.how
        ends = frozenset(how.stop_ids) | self._eos_ids if how.ends else frozenset(how.stop_ids)
        return _Row(ticket, request, key_of(request.seed), ends)

    # ---------------------------------------------------------------- admission

    def _admit(self) -> list[tuple[list[_Row], Tensor]]:
        """Give waiting requests their place, as far as there is room, and read their prompts. Returns rows with the logits
        after their prompts."""
        if not self._waiting:
            return []
        if self._slots is None:
            return self._admit_alike()
        here = [row for row in self._rows if row is not None]
        longest = max((row.reserved for row in here), default=0)
        taken: list[_Row] = []
        alike = None if self._adapters.mixes else next((row.request.adapter for row in here), self._waiting[0].request.adapter)
        while self._waiting:
            if not self._adapters.mixes and self._waiting[0].request.adapter != alike:
                break
            longest_then = max(longest, self._waiting[0].reserved)
            if (here or taken) and len(here) + len(taken) >= self._most_rows(longest_then):
                break
            longest = longest_then
            taken.append(self._waiting.popleft())
        batches: dict[tuple[int, bool], list[_Row]] = defaultdict(list)
        for row in taken:
            batches[_padded(row.request.prompt), _asks(row.request)].append(row)
        admitted: list[tuple[list[_Row], Tensor]] = []
        for (length, asks), rows in batches.items():
            groups: dict[tuple[str | None, tuple[int, ...]], list[_Row]] = defaultdict(list)
            for row in rows:
                groups[row.request.adapter, tuple(row.request.prompt)].append(row)
            each = max(1, READ_TOKENS // length)
            parts = [list(groups.values())[at : at + each] for at in range(0, len(groups), each)]
            admitted += [self._read(part, length, asks) for part in parts]
        return admitted

    def _admit_alike(self) -> list[tuple[list[_Row], Tensor]]:
        """Without slots: once no row is left, those of the waiting that are like the first of them."""
        if self._rows:
            return []
        first = self._waiting[0]

        def kind(row: _Row) -> tuple[int, str | None, bool]:
            return len(row.request.prompt), row.request.adapter, _asks(row.request)

        alike = [row for row in self._waiting if kind(row) == kind(first)]
        taken = alike[: self._most_rows(max(row.reserved for row in alike))]
        gone = {row.ticket for row in taken}
        self._waiting = deque(row for row in self._waiting if row.ticket not in gone)
        groups: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
        for row in taken:
            groups[tuple(row.request.prompt)].append(row)
        self._own = DynamicCache(config=self._model.config)
        return [self._read(list(groups.values()), len(first.request.prompt), _asks(first.request))]

    def _read(self, groups: list[list[_Row]], length: int, asks: bool) -> tuple[list[_Row], Tensor]:
        """Read each group's prompt once, padded on the right, and give the rows their places."""
        prompts = [group[0].request.prompt for group in groups]
        ids = torch.tensor([prompt + [self._pad_id] * (length - len(prompt)) for prompt in prompts], device=self._device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        # Padding repeats the last position: it must neither pass the context nor look like a long row to the rotary factors.
        positions = torch.minimum(torch.arange(length, device=self._device), ends.unsqueeze(-1))
        mask = None
        if self._slots is not None:
            self._slots.reading = True
            mask = self._slots.mask_of_prompts(length)
        with self._adapters.rows([group[0].request.adapter for group in groups]):
            states = self._forward(ids, positions, mask, keep=length if asks else min(length, READ_STEP))
            if asks:
                self._tell_prompts(groups, ids, states)
            ends += states.shape[1] - length
            logits = self._logits(states[torch.arange(len(ends), device=self._device), ends].unsqueeze(1)).squeeze(1)
        rows = [row for group in groups for row in group]
        source = [number for number, group in enumerate(groups) for _ in group]
        self._seat(rows, source, length)
        if len(rows) > len(groups):
            logits = logits[torch.tensor(source, device=self._device)]
        return rows, logits

    def _seat(self, rows: list[_Row], source: list[int], length: int) -> None:
        """Give each row a slot, with the content of the prompt that was read as number source[i], of this length."""
        if self._slots is None:
            self._own.reorder_cache(torch.tensor(source, device=self._device))
            self._rows = list(rows)
            return
        free = [slot for slot, row in enumerate(self._rows) if row is None][: len(rows)]
        used = len(self._rows)
        slots = [*free, *range(used, used + len(rows) - len(free))]
        self._rows += [None] * (len(rows) - len(free))
        for slot, row in zip(slots, rows, strict=True):
            self._rows[slot] = row
        self._slots.reading = False
        self._reserve(length, used)
        self._slots.place(source, slots)

    def _reserve(self, length: int, used: int) -> None:
        """Room in the slots for all rows, of this length; the first `used` have content. It grows to the double, if so much
        is ever needed, because that is a copy."""
        assert self._slots is not None
        slots = max(len(self._rows), self._least_rows)
        had_slots, had_length = self._slots.size
        if slots <= had_slots and length <= had_length:
            return
        longest = max(row.reserved for row in self._rows if row is not None)
        if slots > had_slots:
            slots = max(slots, min(2 * had_slots, self._most_rows(longest)))
        if length > had_length:
            length = max(length, min(2 * had_length, longest))
        self._slots.reserve(slots, length, used=used)

    def _most_rows(self, length: int) -> int:
        """How many rows of so many tokens may be in the cache."""
        return max(1, min(MOST_ROWS, self._most_tokens // max(1, length)))

    def _bytes_held(self) -> int:
        assert self._slots is not None
        slots, length = self._slots.size
        return slots * length * self._token_bytes

    # ---------------------------------------------------------------- the model

    def _close_gaps(self) -> None:
        """Let rows that ended leave the batch: the last rows take their slots."""
        rows = self._rows
        left = sum(row is not None for row in rows)
        if self._slots is None:
            if rows and len(rows) - left >= DROP_AT * len(rows):
                kept = [slot for slot, row in enumerate(rows) if row is not None]
                if kept:
                    self._own.reorder_cache(torch.tensor(kept, device=self._device))
                self._rows = [rows[slot] for slot in kept]
            return
        gaps = [slot for slot in range(left) if rows[slot] is None]
        if gaps:
            moved = [slot for slot in range(left, len(rows)) if rows[slot] is not None]
            self._slots.move(moved, gaps, max(row.position for row in rows[left:] if row is not None))
            for old, new in zip(moved, gaps, strict=True):
                rows[new] = rows[old]
        del rows[left:]

    def _next_logits(self) -> Tensor:
        """Feed each row's last token. Returns the logits after it, [rows, V], also of rows that ended but did not leave."""
        rows = self._rows
        spare = max(0, self._least_rows - len(rows)) if self._slots is not None else 0
        tokens = [self._pad_id if row is None else row.tokens[-1] for row in rows] + [self._pad_id] * spare
        places = [0 if row is None else row.position for row in rows] + [0] * spare
        ids, positions = torch.tensor([tokens, places], device=self._device).unsqueeze(-1)
        mask = None
        if self._slots is not None:
            longest = max(places)
            self._reserve(longest + 1, len(rows))
            mask = self._slots.next(positions.squeeze(-1), longest)
        some = next(row.request.adapter for row in rows if row is not None)
        names = [some if row is None else row.request.adapter for row in rows] + [some] * spare
        with self._adapters.rows(names):
            return self._logits(self._forward(ids, positions, mask, keep=1)).squeeze(1)[: len(rows)]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Any, *, keep: int) -> Tensor:
        """What `_logits` takes, for at least the last `keep` places of each row: [B, keep or more, ...]."""
        cache = self._own if self._slots is None else self._slots
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._takes:
            arguments["position_ids"] = positions
        if self._head_alone:
            return self._model.base_model(input_ids=ids, **arguments).last_hidden_state
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        return self._model(input_ids=ids, **arguments).logits

    def _logits(self, states: Tensor) -> Tensor:
        """[B, T, V], of what `_forward` returned for some T places."""
        if not self._head_alone:
            return states
        head: Any = self._model.get_output_embeddings()
        rows, places = states.shape[:2]
        if rows * places < self._least_rows:
            states = torch.cat([states, states[:1].expand(-(-self._least_rows // places) - rows, -1, -1)])
        return head(states)[:rows]

    def _tell_prompts(self, groups: list[list[_Row]], ids: Tensor, states: Tensor) -> None:
        """Give rows the log-probs of their prompts."""
        rows, length = ids.shape
        most = max(row.request.top_prompt_log_probs for group in groups for row in group)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)  # what stands behind the last place is not looked at
        places = max(1, HEAD_BYTES // (4 * rows * self._model.config.get_text_config().vocab_size) // READ_STEP) * READ_STEP
        chosen: list[Tensor] = []
        top: list[list[TopLogProbs]] = [[] for _ in groups]
        for part in range(0, length, places):
            logits = self._logits(states[:, part : part + places]).float()
            whole = logits.logsumexp(-1, keepdim=True)
            chosen.append((logits.gather(-1, targets[:, part : part + places].unsqueeze(-1)) - whole).squeeze(-1))
            if most:
                best = logits.topk(min(most, logits.shape[-1]), dim=-1)
                for mine, values, tokens in zip(top, (best.values - whole).tolist(), best.indices.tolist(), strict=True):
                    mine += [list(zip(t, v, strict=True)) for t, v in zip(tokens, values, strict=True)]
        for group, values, best in zip(groups, torch.cat(chosen, dim=1).tolist(), top, strict=True):
            for row in group:
                before, count = len(row.request.prompt) - 1, row.request.top_prompt_log_probs
                row.prompt_log_probs = [None, *values[:before]]
                row.top_prompt_log_probs = [None, *(pairs[:count] for pairs in best[:before])]

    # ---------------------------------------------------------------- tokens

    def _advance(self, rows: list[_Row], logits: Tensor) -> list[tuple[int, Completion]]:
        """Draw each row's next token. Returns the rows that end with it; they have left their slots."""
        drawn = [row for row in rows if row.request.how.max_tokens]
        if len(drawn) < len(rows):  # the others wanted their prompts read
            logits = logits[torch.tensor([row in drawn for row in rows], device=self._device)]
            if drawn:
                self._draw(drawn, logits)
        else:
            self._draw(rows, logits)
        stopped = self._at_stop([row for row in drawn if row.request.how.stop])
        ended = [row for row in rows if row.ended or row.ticket in stopped or len(row.tokens) == row.request.how.max_tokens]
        if not ended:
            return []
        texts = self._decode([row.tokens for row in ended])
        for place, (row, text) in enumerate(zip(ended, texts, strict=True)):
            if row.ticket in stopped and not _holds_stop(row, text):  # a token of the frame is a part of the stop text
                texts[place] = self._show([row.tokens])[0]
        finished = [
            (row.ticket, row.completion(text, stopped=row.ticket in stopped)) for row, text in zip(ended, texts, strict=True)
        ]
        gone = {row.ticket for row in ended}
        failed = {ticket for ticket, completion in finished if completion.error is not None}
        for slot, row in enumerate(self._rows):
            if row is not None and row.ticket in gone:
                self._rows[slot] = None
                if row.ticket in failed and self._slots is not None:
                    self._slots.wipe([slot])
        return finished

    def _draw(self, rows: list[_Row], logits: Tensor) -> None:
        points = uniforms([row.key for row in rows], [len(row.tokens) for row in rows]).to(self._device)
        alike: dict[tuple[float, float, int], list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            how = row.request.how
            alike[how.temperature, how.top_p, how.top_k].append(place)
        for places in alike.values():
            mine, how = rows, rows[places[0]].request.how
            own, numbers = logits, points
            if len(alike) > 1:
                chosen = torch.tensor(places, device=self._device)
                mine, own, numbers = [rows[place] for place in places], logits[chosen], points[chosen]
            tokens, log_probs = draw(own, how, numbers)
            for row, token, log_prob in zip(mine, tokens.tolist(), log_probs.tolist(), strict=True):
                row.tokens.append(token)
                row.log_probs.append(log_prob)
                row.ended = token in row.ends or not isfinite(log_prob)
            self._draw_top(mine, own)
            self._note_entropies(mine, own)

    def _draw_top(self, rows: list[_Row], logits: Tensor) -> None:
        """Note the likeliest tokens for the rows that ask for them."""
        asking = [place for place, row in enumerate(rows) if row.request.top_log_probs]
        if asking:
            most = max(rows[place].request.top_log_probs for place in asking)
            top = likeliest(logits[torch.tensor(asking, device=self._device)], rows[0].request.how, most)
            for place, pairs in zip(asking, top, strict=True):
                rows[place].top.append(pairs[: rows[place].request.top_log_probs])

    def _note_entropies(self, rows: list[_Row], logits: Tensor) -> None:
        asking = [place for place, row in enumerate(rows) if row.request.entropies]
        if asking:
            own = logits if len(asking) == len(rows) else logits[torch.tensor(asking, device=self._device)]
            for place, value in zip(asking, entropies(own, rows[0].request.how).tolist(), strict=True):
                rows[place].entropies.append(value)

    def _at_stop(self, rows: list[_Row]) -> set[int]:
        """The tickets of the rows that hold a stop text. Only their ends are decoded: what stands before was looked at in
        earlier steps. A token is a byte at least: some scripts take three or four tokens a character. An end may begin within
        a character, and then some decoders (byte fallback) read none of the bytes behind it: it is decoded from each of the
        places at which the next one may begin."""
        if not rows:
            return set()
        tails = [(row, row.tokens[-_tail(row.request.how.stop) :]) for row in rows]
        texts = self._decode([tail for _, tail in tails])
        framed = [pair for pair in tails if not self._frame.isdisjoint(pair[1])]
        cut = [pair for pair, text in zip(tails, texts, strict=True) if text.startswith(BROKEN)]
        if cut:
            later = [(row, tail[skipped:]) for row, tail in cut for skipped in range(1, MOST_BYTES)]
            tails, texts = tails + later, texts + self._decode([tail for _, tail in later])
        if framed:
            tails, texts = tails + framed, texts + self._show([tail for _, tail in framed])
        return {row.ticket for (row, _), text in zip(tails, texts, strict=True) if _holds_stop(row, text)}


def _holds_stop(row: _Row, text: str) -> bool:
    return any(stop in text for stop in row.request.how.stop)


def _token_bytes(model: PreTrainedModel) -> int:
    """The keys and values of one token."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


@cache
def _tail(stop: tuple[str, ...]) -> int:
    """How many tokens at the end of an answer can hold the end of a stop text."""
    return max(len(text.encode()) for text in stop) + STOP_MARGIN_TOKENS


def _asks(request: Request) -> bool:
    return request.prompt_log_probs or request.top_prompt_log_probs > 0


def _padded(prompt: list[int]) -> int:
    return -(-len(prompt) // READ_STEP) * READ_STEP
