"""Checks that the parts of a batch agree in shape and dtype. The worker checks their numbers.

The result is the same for JSON and for tensors: tensors, and for ragged batches always `cu_seqlens` (int64). Advantages are [B]
or per token; a ragged batch with as many tokens as sequences can be read either way, because each sequence has one token.
"""

from array import array
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import sub
from typing import Any, Literal

from service.errors import FieldError
from service.losses import numbers
from service.losses.batch import PER_SEQUENCE, PER_TOKEN, TAKEN, LossBatch
from service.losses.numbers import NotThese
from service.relay.tensors import Tensor, Tensors
from service.spec.tensors import TENSORS
from service.validation.words import counted

MAX_CELLS = 2**24  # number of sequences times the longest: ragged batches are padded for the computation
MAX_SEQUENCES = 2**20  # they are checked one by one


@dataclass
class CheckedBatch:
    """Parts that agree, or errors, whose pointers are relative to the batch."""

    layout: Literal["ragged", "padded"]
    tensors: Tensors = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)
    rows: int | None = None  # B; None: log_probs are invalid
    longest: int = 0

    def refuse(self, name: str, detail: str, code: str = "shape_mismatch", **more: Any) -> None:
        self.errors.append(FieldError(f"/{name}", detail, code, **more))

    def check_size(self) -> None:
        if self.rows is None:
            return
        cells = self.rows * self.longest
        if self.rows > MAX_SEQUENCES:
            self.refuse(
                "log_probs", f"has {self.rows} sequences; at most {MAX_SEQUENCES} are taken: split the batch", "too_large"
            )
        elif cells > MAX_CELLS:
            self.refuse(
                "log_probs",
                f"{self.rows} sequences times the longest one's {self.longest} tokens are {cells}, more than {MAX_CELLS}: "
                "split the batch, and send with each part its `weights` of the whole step",
                "too_large",
                got=cells,
                allowed=MAX_CELLS,
            )

    def check_per_sequence(self) -> None:
        for name in PER_SEQUENCE:
            if (tensor := self.tensors.get(name)) is None:
                continue
            dimensions = (1, 2) if name == "rewards" else (1,)
            rows = tensor.shape[:1] if self.rows is None else (self.rows,)
            if len(tensor.shape) not in dimensions or tensor.shape[:1] != rows or 0 in tensor.shape[1:]:
                wanted = f"[{_known(self.rows)}] or [{_known(self.rows)}, R]" if name == "rewards" else f"[{_known(self.rows)}]"
                self.refuse(name, f"has the shape {_shape(tensor)}; one value a sequence is {wanted}")
        self._check_reward_weights()

    def _check_reward_weights(self) -> None:
        weights, rewards = self.tensors.get("reward_weights"), self.tensors.get("rewards")
        if weights is None:
            return
        if rewards is None:
            self.refuse("reward_weights", "are given, but no rewards", "missing_tensor")
            return
        several = rewards.shape[1] if len(rewards.shape) == 2 else 1
        if weights.shape != (several,):
            self.refuse("reward_weights", f"has the shape {_shape(weights)}; one weight a reward is [{several}]")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _known(rows: int | None) -> str:
    return "B" if rows is None else str(rows)


def check(sent: LossBatch, floats: str) -> CheckedBatch:
    """Check a batch. `floats`: the typecode of `array` for JSON's numbers."""
    parts = sent.sent()
    batch = _of_tensors(parts) if isinstance(parts["log_probs"], Tensor) else _of_json(parts, floats)
    batch.check_per_sequence()
    batch.check_size()
    return batch


# ---------------------------------------------------------------- of JSON


def _of_json(parts: dict[str, Any], floats: str) -> CheckedBatch:
    batch = CheckedBatch("ragged")
    if parts.pop("cu_seqlens", None) is not None:
        batch.refuse("cu_seqlens", "goes with flat tensors; in JSON write an array for each sequence", "unknown_key")
    lengths = _rows_of_json(batch, "log_probs", parts.pop("log_probs"), floats, None)
    if lengths is not None:
        batch.rows, batch.longest = len(lengths), max(lengths, default=0)
        batch.tensors["cu_seqlens"] = numbers.tensor(array("q", accumulate(lengths, initial=0)))
    for name, value in parts.items():
        if name in PER_TOKEN:
            _rows_of_json(batch, name, value, floats, lengths)
        elif name == "advantages" and value and isinstance(value[0], list):
            _rows_of_json(batch, name, value, floats, lengths)
            if lengths is not None and sum(lengths) == len(lengths) and batch.longest > 1:
                batch.refuse(name, AMBIGUOUS)
        else:
            _flat_of_json(batch, name, value, floats)
    return batch


def _rows_of_json(
    batch: CheckedBatch, name: str, value: list[Any], floats: str, wanted: "array[int] | None"
) -> "array[int] | None":
    """Put the numbers into the batch. Returns their lengths, or None if they are not numbers."""
    holds = TENSORS[name].holds
    typecode = "q" if holds == "id" else "d" if holds == "flag" else floats
    try:
        cells, lengths = numbers.rows(value, f"/{name}", typecode, flags=holds == "flag")
    except NotThese as error:
        batch.errors.append(error.error)
        return None
    if wanted is not None and lengths != wanted:
        _say_lengths(batch, name, lengths, wanted)
    batch.tensors[name] = numbers.tensor(cells)
    return lengths


def _say_lengths(batch: CheckedBatch, name: str, lengths: "array[int]", wanted: "array[int]") -> None:
    if len(lengths) != len(wanted):
        batch.refuse(name, f"has {len(lengths)} sequences, log_probs has {len(wanted)}", got=len(lengths), allowed=len(wanted))
        return
    row = next(row for row, (has, wants) in enumerate(zip(lengths, wanted, strict=True)) if has != wants)
    batch.refuse(
        f"{name}/{row}",
        f"has {counted(lengths[row], 'token')}, log_probs has {wanted[row]} in this sequence",
        got=lengths[row],
        allowed=wanted[row],
    )


def _flat_of_json(batch: CheckedBatch, name: str, value: list[Any], floats: str) -> None:
    pointer, holds = f"/{name}", TENSORS[name].holds
    try:
        if holds == "label":
            batch.tensors[name] = numbers.tensor(numbers.labels(value, pointer))
        elif name == "rewards" and value and isinstance(value[0], list):
            batch.tensors[name] = _several_rewards(value, pointer, floats)
        else:
            flags = holds == "flag"
            batch.tensors[name] = numbers.tensor(numbers.flat(value, pointer, "d" if flags else floats, flags=flags))
            if name == "advantages" and batch.rows is not None and len(value) != batch.rows:
                batch.refuse(
                    name,
                    f"has {counted(len(value), 'value')} for {counted(batch.rows, 'sequence')}",
                    got=len(value),
                    allowed=batch.rows,
                )
    except NotThese as error:
        batch.errors.append(error.error)


def _several_rewards(value: list[Any], pointer: str, floats: str) -> Tensor:
    cells, lengths = numbers.rows(value, pointer, floats)
    if odd := next((row for row, length in enumerate(lengths) if length != lengths[0]), None):
        detail = f"has {counted(lengths[odd], 'reward')}, the sequences before have {lengths[0]}"
        raise NotThese(FieldError(f"{pointer}/{odd}", detail, "shape_mismatch", lengths[odd], lengths[0]))
    return numbers.tensor(cells, len(lengths), lengths[0])


# ---------------------------------------------------------------- of tensors


def _of_tensors(parts: Tensors) -> CheckedBatch:
    log_probs = parts["log_probs"]
    batch = CheckedBatch("padded" if len(log_probs.shape) == 2 else "ragged", dict(parts))
    for name, tensor in parts.items():
        if tensor.dtype not in TAKEN[name]:
            taken = ", ".join(TAKEN[name])
            batch.refuse(
                name, f"has the dtype {tensor.dtype}; taken are {taken}", "dtype_not_taken", got=tensor.dtype, allowed=taken
            )
    if len(log_probs.shape) == 2:
        batch.rows, batch.longest = log_probs.shape
        if "cu_seqlens" in parts:
            batch.refuse(
                "cu_seqlens", f"goes with flat tensors, but log_probs has the shape {_shape(log_probs)}", "unknown_key"
            )
    elif len(log_probs.shape) == 1:
        _cut(batch)
    else:
        batch.refuse("log_probs", f"has the shape {_shape(log_probs)}; flat [N] with cu_seqlens, or padded [B, T]")
        return batch
    for name, tensor in parts.items():
        if name in PER_TOKEN and tensor.shape != log_probs.shape:
            batch.refuse(name, f"has the shape {_shape(tensor)}, log_probs has {_shape(log_probs)}")
    if "advantages" in parts:
        _check_advantages(batch)
    return batch


def _cut(batch: CheckedBatch) -> None:
    """Check where the sequences begin and end."""
    tensor, tokens = batch.tensors.get("cu_seqlens"), len(batch.tensors["log_probs"])
    if tensor is None:
        batch.refuse(
            "cu_seqlens",
            "is needed, because log_probs is flat: int64 [B + 1], where each sequence begins, and the end; or send [B, T]",
            "missing_tensor",
        )
        return
    if tensor.dtype not in TAKEN["cu_seqlens"]:
        return  # already reported
    if len(tensor.shape) != 1 or not len(tensor):
        batch.refuse("cu_seqlens", f"has the shape {_shape(tensor)}; it is [B + 1]")
        return
    if len(tensor) > MAX_SEQUENCES:
        batch.refuse(
            "cu_seqlens", f"has {len(tensor)} numbers; at most {MAX_SEQUENCES} are taken: split the batch", "too_large"
        )
        return
    at = numbers.integers(tensor)
    lengths = list(map(sub, islice(at, 1, None), at))
    if min(lengths, default=0) < 0:
        fall = next(number for number, length in enumerate(lengths, 1) if length < 0)
        detail = f"is {at[fall]}, less than {at[fall - 1]} before it: it may never fall"
        batch.refuse(f"cu_seqlens/{fall}", detail, got=at[fall])
    elif at[0] != 0:
        batch.refuse("cu_seqlens/0", f"must be 0, got {at[0]}", got=at[0], allowed=0)
    elif at[-1] != tokens:
        detail = f"must be {tokens}, the tokens of log_probs, got {at[-1]}"
        batch.refuse(f"cu_seqlens/{len(at) - 1}", detail, got=at[-1], allowed=tokens)
    else:
        batch.rows, batch.longest = len(lengths), max(lengths, default=0)
        batch.tensors["cu_seqlens"] = numbers.tensor(at)


AMBIGUOUS = (
    "are as many as there are sequences, and as there are tokens, and some sequences are empty: it cannot be told which is "
    "meant; leave the empty sequences out"
)


def _check_advantages(batch: CheckedBatch) -> None:
    """Check that there is one advantage per sequence, or one per token."""
    shape, tokens = batch.tensors["advantages"].shape, batch.tensors["log_probs"].shape
    if batch.rows is None:
        return  # the errors of log_probs are already reported
    if shape not in ((batch.rows,), tokens):
        wanted = f"[{batch.rows}], one a sequence, or {list(tokens)}, as log_probs"
        batch.refuse("advantages", f"has the shape {list(shape)}; it is {wanted}")
    elif shape == tokens == (batch.rows,) and batch.longest > 1:
        batch.refuse("advantages", AMBIGUOUS)
