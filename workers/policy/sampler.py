"""Sampling: a short loop over a KV cache. Each prompt is read once for its whole group, and finished rows leave the batch.

The log_probs of the sampled tokens are those of the distribution that was sampled from, in float32.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from service.errors import JobFailed

CPU_CACHE_BYTES = 2 * 2**30  # of keys and values; a constant, so that the same call always makes the same batches
GPU_CACHE_SHARE = 0.25  # of all the memory of the card
MOST_ROWS = 1024
DROP_AT = 1 / 8  # rows that ended leave the batch when they are at least this share of it: to drop them copies the cache
STOP_MARGIN_TOKENS = 8  # looked at beyond a stop text's bytes, for tokens that stand for no character


@dataclass(frozen=True)
class Completion:
    """One sampled answer. If it ended so, `tokens` include the end-of-sequence token, and `text` the stop text."""

    tokens: list[int]
    log_probs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """The distribution to sample from: temperature 0 is greedy, top_p 1 and top_k 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # tokens that end an answer, beside the model's own


Decode = Callable[[list[list[int]]], list[str]]


class Sampler:
    """Draws groups of answers from one model."""

    def __init__(self, model: PreTrainedModel, *, eos_ids: list[int], pad_id: int, decode: Decode) -> None:
        self._model, self._pad_id, self._decode = model, pad_id, decode
        self._device = model.device
        self._eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=self._device)
        self._takes = inspect.signature(type(model).forward).parameters.keys()
        layers = DynamicCache(config=model.config).layers
        # A recurrent state cannot ignore padding, so such models get only prompts of equal length in one batch.
        self._pads = not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], group_size: int, how: SamplingParams, seed: int) -> list[list[Completion]]:
        """`group_size` answers to each prompt, in the order of the prompts. The same call gives the same answers."""
        if any(not prompt for prompt in prompts):
            raise ValueError(f"prompt {prompts.index([])} is empty; an answer's first token needs something before it")
        generator = torch.Generator(self._device).manual_seed(seed)
        groups: list[list[Completion]] = [[] for _ in prompts]
        for batch, counts in self._batches(prompts, group_size, how.max_tokens):
            answers = iter(self._sample_batch([prompts[i] for i in batch], counts, how, generator))
            for i, count in zip(batch, counts, strict=True):
                groups[i] += [next(answers) for _ in range(count)]
        return groups

    def _batches(self, prompts: list[list[int]], group_size: int, max_tokens: int) -> Iterator[tuple[list[int], list[int]]]:
        """Batches of prompts of similar length, and how many answers each prompt gets in the batch."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        runs = [order] if self._pads else [list(run) for _, run in groupby(order, key=lambda i: len(prompts[i]))]
        for run in runs:
            batch: list[int] = []
            counts: list[int] = []
            room = 0
            for i in run:
                left = group_size
                while left:
                    if not room or (room < left <= self._most_rows(len(prompts[i]) + max_tokens)):
                        if batch:
                            yield batch, counts
                        batch, counts, room = [], [], self._most_rows(len(prompts[i]) + max_tokens)
                    taken = min(left, room)
                    batch.append(i)
                    counts.append(taken)
                    left, room = left - taken, room - taken
            if batch:
                yield batch, counts

    def _most_rows(self, length: int) -> int:
        config: Any = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * head_dim * self._model.dtype.itemsize
        if self._device.type == "cuda":
            budget = GPU_CACHE_SHARE * torch.cuda.get_device_properties(self._device).total_memory
        else:
            budget = CPU_CACHE_BYTES
        return max(1, min(MOST_ROWS, int(budget / (per_token * length))))

    def _sample_batch(
        self, prompts: list[list[int]], counts: list[int], how: SamplingParams, generator: torch.Generator
    ) -> list[Completion]:
        """`counts[i]` answers to `prompts[i]`, in the order of the prompts."""
        batch, logits = self._read(prompts, how.max_tokens)
        group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(self._device)
        if len(group) > len(prompts):
            batch.keep(group)
            logits = logits[group]
        answers = _Answers(len(group), how.max_tokens, self._device)
        ends = torch.cat([self._eos_ids, self._eos_ids.new_tensor(how.stop_ids)])
        rows = torch.arange(len(group), device=self._device)  # which answer each row of the batch belongs to
        for step in range(how.max_tokens):
            tokens, log_probs = draw(logits, how, generator)
            answers.add(rows, step, tokens, log_probs)
            ended = torch.isin(tokens, ends)
            if how.stop:
                ended |= self._at_stop(answers.tokens[rows, : step + 1], how.stop)
            left = answers.end(rows, step, ended)
            alive = int(left.sum())
            if not alive or step + 1 == how.max_tokens:
                break
            if len(rows) - alive >= DROP_AT * len(rows):
                places = left.nonzero().squeeze(-1)
                batch.keep(places)
                rows, tokens = rows[places], tokens[places]
            logits = self._forward(tokens.unsqueeze(-1), (batch.lengths + step).unsqueeze(-1), batch)
        return self._completions(answers)

    def _read(self, prompts: list[list[int]], max_tokens: int) -> tuple["_Batch", Tensor]:
        """The cache of the prompts, padded on the left, and the logits after each prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        padding = (width - lengths).unsqueeze(-1)
        mask = None
        if min(map(len, prompts)) < width:  # no mask is faster
            mask = (torch.arange(width + max_tokens, device=self._device) >= padding).long()
        positions = (torch.arange(width, device=self._device) - padding).clamp(min=0)
        batch = _Batch(DynamicCache(config=self._model.config), mask, lengths, 0)
        return batch, self._forward(ids, positions, batch)

    def _forward(self, ids: Tensor, positions: Tensor, batch: "_Batch") -> Tensor:
        """Feed these tokens to the model. Returns the logits after the last token of each row."""
        batch.read += ids.shape[1]
        mask = None if batch.mask is None else batch.mask[:, : batch.read]
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": batch.cache, "use_cache": True}
        if "position_ids" in self._takes:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        return self._model(input_ids=ids, **arguments).logits[:, -1]

    def _at_stop(self, tokens: Tensor, stop: tuple[str, ...]) -> Tensor:
        """Which rows hold a stop text. Only their ends are decoded: what stands before was looked at in earlier steps. A token
        is a byte at least: some scripts take three or four tokens a character."""
        tail = max(len(text.encode()) for text in stop) + STOP_MARGIN_TOKENS
        texts = self._decode(tokens[:, -tail:].tolist())
        return torch.tensor([any(text in tail for text in stop) for tail in texts], device=self._device)

    def _completions(self, answers: "_Answers") -> list[Completion]:
        if not torch.isfinite(answers.log_probs).all():
            raise JobFailed(
                "non_finite_logits",
                "the model gave logits that are not finite while sampling",
                hint="use model.dtype: float32, or a model whose weights are sound",
            )
        lengths = answers.lengths.tolist()
        tokens = [row[:length] for row, length in zip(answers.tokens.tolist(), lengths, strict=True)]
        log_probs = [row[:length] for row, length in zip(answers.log_probs.tolist(), lengths, strict=True)]
        return [
            Completion(row, values, text, "stop" if ended else "length")
            for row, values, text, ended in zip(tokens, log_probs, self._decode(tokens), answers.ended.tolist(), strict=True)
        ]


@dataclass
class _Batch:
    """The rows that go through the model together."""

    cache: DynamicCache
    mask: Tensor | None  # [rows, prompt and max_tokens]; None if nothing is padded
    lengths: Tensor  # of the prompts, without padding
    read: int  # tokens in the cache, with padding

    def keep(self, rows: Any) -> None:
        """Keep only these rows. A row that is listed several times is repeated."""
        # Not batch_repeat_interleave and batch_select_indices, which skip recurrent states.
        self.cache.reorder_cache(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.lengths = self.lengths[rows]


class _Answers:
    """The sampled tokens of all rows, including rows that have left the batch."""

    def __init__(self, count: int, max_tokens: int, device: torch.device) -> None:
        self.tokens = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(count, max_tokens, device=device)
        self.lengths = torch.full((count,), max_tokens, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)

    def add(self, rows: Tensor, step: int, tokens: Tensor, log_probs: Tensor) -> None:
        self.tokens[rows, step], self.log_probs[rows, step] = tokens, log_probs

    def end(self, rows: Tensor, step: int, ended: Tensor) -> Tensor:
        """Record which rows end with this step's token. Returns which continue. Ended rows may stay in the batch."""
        fresh = rows[ended & ~self.ended[rows]]
        self.lengths[fresh] = step + 1
        self.ended[fresh] = True
        return ~self.ended[rows]


def draw(logits_B_V: Tensor, how: SamplingParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability in the distribution that was sampled from.

    Greedy tokens have the policy's log-probability at temperature 1, because in a greedy distribution it would be 0.
    """
    logits = logits_B_V.float()
    if how.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
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
    log_probs = logits.log_softmax(-1)
    # By inverting the cumulative distribution: one random number per row, where multinomial draws one per token.
    cumulated = log_probs.exp().cumsum(-1, dtype=torch.float64)
    whole = cumulated[:, -1:]
    point = torch.rand(whole.shape, generator=generator, dtype=torch.float64, device=whole.device) * whole
    place = torch.searchsorted(cumulated, torch.minimum(point, whole.nextafter(torch.zeros_like(whole))), right=True)
    place = place.clamp(max=logits.shape[-1] - 1)  # only if logits are not finite, which is reported later
    chosen = log_probs.gather(-1, place).squeeze(-1)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1), chosen
