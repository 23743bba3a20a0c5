"""Keys and values of the rows that are being sampled, under transformers' interface of a cache.

`Slots` is for models with attention alone: every row has a slot of its own, written in place, with the token of position p at
place p. Rows of any length stand side by side, so a mask says what each may see. All other models (with recurrent states,
say) get transformers' own cache, without a mask, and so only rows of equal length at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

STEP = 16  # the slots' length is a multiple; a row's attention is then the same to the bit however long its neighbours are
FULL, SLIDING = "full_attention", "sliding_attention"


def windows(model: PreTrainedModel) -> dict[str, int | None] | None:
    """Which kinds of attention the layers have, with the length of their window; None if `Slots` cannot hold their state."""
    config = model.config.get_text_config(decoder=True)
    found: dict[str, int | None] = {}
    for kind, layer in zip(get_layer_types_and_kwargs(config)[0], DynamicCache(config=config).layers, strict=True):
        if type(layer) is DynamicLayer and kind == FULL:
            found[FULL] = None
        elif type(layer) is DynamicSlidingWindowLayer and kind == SLIDING:
            window = int(layer.sliding_window)
            if found.setdefault(SLIDING, window) != window:
                return None
        else:
            return None
    return found


class _Layer(CacheLayerMixin):
    """One layer's keys and values, [slots, length, heads, head size] each."""

    is_sliding = False
    keys: Any  # a tensor, once it is initialized
    values: Any

    def __init__(self, slots: "Slots") -> None:
        super().__init__()
        self._slots = slots
        self.read: tuple[Tensor, Tensor] | None = None  # of prompts, [prompts, heads, length, head size]
        self._seen: tuple[Tensor, Tensor] | None = None  # what the rows of this step may look at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, length = self._slots.size
        self.keys, self.values = (
            states.new_zeros(slots, length, states.shape[1], states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._slots.reading:
            self.read = key_states, value_states
            return key_states, value_states
        self.keys.flatten(0, 1).index_copy_(0, self._slots.places, key_states.squeeze(2))
        self.values.flatten(0, 1).index_copy_(0, self._slots.places, value_states.squeeze(2))
        if self._seen is None:
            rows, length = self._slots.seen
            self._seen = self.keys[:rows, :length].transpose(1, 2), self.values[:rows, :length].transpose(1, 2)
        return self._seen

    def place(self, prompts: Tensor, slots: Tensor) -> None:
        """Copy the keys and values of prompts that were read into slots."""
        assert self.read is not None
        if not self.is_initialized:
            self.lazy_initialization(*self.read)
        length = self.read[0].shape[2]
        self.keys[slots, :length] = self.read[0].transpose(1, 2)[prompts]
        self.values[slots, :length] = self.read[1].transpose(1, 2)[prompts]

    def resize(self, used: int) -> None:
        """Make it as large as the slots are to be; `used` slots have content."""
        self.forget_view()
        if self.is_initialized:
            old = self.keys, self.values
            self.lazy_initialization(*(states[:0].transpose(1, 2) for states in old))
            length = min(old[0].shape[1], self.keys.shape[1])
            self.keys[:used, :length], self.values[:used, :length] = (states[:used, :length] for states in old)

    def forget_view(self) -> None:
        self._seen = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self._slots.reading else self._slots.seen[1]), 0

    def get_seq_length(self) -> int:
        return 0 if self._slots.reading else self._slots.seen[1] - 1

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):
    """Made for a model whose layers `windows` knows."""

    layers: list[_Layer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: PreTrainedModel, kinds: dict[str, int | None]) -> None:
        count = len(DynamicCache(config=model.config).layers)
        super().__init__(layers=[_Layer(self) for _ in range(count)])
        self._kinds, self._device, self._dtype = kinds, model.device, model.dtype
        self.size = 0, 0  # slots, and tokens in each
        self.reading = False  # whether prompts are read, each from its start; else one token a row
        self.seen = 0, 0  # slots from the first on, and their tokens, that take part in this step
        self.places = torch.empty(0, dtype=torch.long)  # where this step's tokens are written, in slots laid end to end

    def reserve(self, slots: int, length: int, *, used: int) -> None:
        """Make room for so many slots of at least this length. The content of the first `used` slots stays."""
        length = -(-length // STEP) * STEP
        if slots > self.size[0] or length > self.size[1]:
            self.size = max(slots, self.size[0]), max(length, self.size[1])
            for layer in self.layers:
                layer.resize(used)

    def clear(self) -> None:
        """Give the memory back."""
        self.size = self.seen = 0, 0
        for layer in self.layers:
            layer.resize(0)
            layer.keys, layer.values, layer.is_initialized = None, None, False

    def place(self, prompts: Sequence[int], slots: Sequence[int]) -> None:
        """Give slots the content of prompts that were just read."""
        from_, to = (torch.tensor(places, device=self._device) for places in (prompts, slots))
        for layer in self.layers:
            layer.place(from_, to)
            layer.read = None

    def move(self, from_: Sequence[int], to: Sequence[int], length: int) -> None:
        """Copy the first tokens of slots to others."""
        old, new = (torch.tensor(places, device=self._device) for places in (from_, to))
        for layer in self.layers:
            layer.keys[new, :length], layer.values[new, :length] = layer.keys[old, :length], layer.values[old, :length]

    def wipe(self, slots: Sequence[int]) -> None:
        """Forget what stands in these slots. A mask hides finite numbers only."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[list(slots)], layer.values[list(slots)] = 0, 0

    def next(self, positions: Tensor, longest: int) -> Any:
        """Prepare for one token in each of the first slots, at `positions` [rows], at most `longest`. Returns the mask."""
        seen = len(positions), -(-(longest + 1) // STEP) * STEP
        if seen != self.seen:
            self.seen = seen
            for layer in self.layers:
                layer.forget_view()
        self.places = torch.arange(0, seen[0] * self.size[1], self.size[1], device=self._device) + positions
        back = positions.unsqueeze(-1) - torch.arange(seen[1], device=self._device)  # [rows, length], 0 at the token itself
        return self._mask(back.unsqueeze(1))

    def mask_of_prompts(self, length: int) -> Any:
        """The mask for prompts of at most `length` tokens. Padding on the right needs none: it comes later."""
        if not any(window is not None and window < length for window in self._kinds.values()):
            return None
        places = torch.arange(length, device=self._device)
        return self._mask((places.unsqueeze(-1) - places).unsqueeze(0))

    def _mask(self, back: Tensor) -> Any:
        """[rows, 1, queries, keys], to add to the scores; of two kinds of layers a dictionary, as transformers takes it."""
        masks: dict[str, Tensor] = {}
        for kind, window in self._kinds.items():
            hidden = back < 0
            if window is not None:
                hidden |= back >= window
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            masks[kind] = mask.masked_fill_(hidden, torch.finfo(self._dtype).min).unsqueeze(1)
        return masks if len(masks) > 1 else next(iter(masks.values()))
