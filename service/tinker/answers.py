"""Answers of operations as the protobuf messages of the wire."""

from array import array
from math import isnan
from typing import Any

from service.losses.numbers import integers
from service.relay.tensors import Tensor, Tensors
from service.tinker.messages import FLOAT32, LENGTH, STOP, ForwardBackwardOutput, SampleResponse

EMPTY_LOG_PROB = -99999.0  # of a place without alternatives; its token is 0


def forward_backward(head: dict[str, Any], tensors: Tensors) -> bytes:
    """A ForwardBackwardOutput with the log-probs of each datum, cut to its own width."""
    message = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for name, value in head["metrics"].items():
        if value is not None:
            message.metrics[_metric(name)] = float(value)
    log_probs, cuts = tensors["log_probs"], integers(tensors["cu_seqlens"])
    columns = log_probs.shape[1] if len(log_probs.shape) == 2 else 0
    at = 0
    for count, width in head.get("widths", [(len(cuts) - 1, columns)]):
        _record(message, log_probs, cuts[at : at + count + 1], columns, width)
        at += count
    return message.SerializeToString()


def _metric(name: str) -> str:
    """A name with exactly one colon, behind which the client looks for how to combine chunks."""
    return name if name.count(":") == 1 else f"{name.replace(':', '_')}:mean"


def _record(message: Any, log_probs: Tensor, cuts: "array[int]", columns: int, width: int) -> None:
    """The datums between the first and the last of `cuts`, `width` of their `columns` (0: one-dimensional)."""
    record = message.loss_fn_outputs.add(type_tag="LossFnOutput", num_datums=len(cuts) - 1)
    row_bytes = 4 * (columns or 1)
    data = log_probs.data[cuts[0] * row_bytes : cuts[-1] * row_bytes]
    kept = width or 1
    if columns and kept < columns:
        data = _cut(data, columns, kept)
    field = record.fields["logprobs"]
    field.data, field.dtype = bytes(data), FLOAT32
    field.offsets = array("q", [(cut - cuts[0]) * 4 * kept for cut in cuts]).tobytes()
    if width:
        field.trailing_shape.append(width)


def _cut(data: memoryview, columns: int, kept: int) -> bytes:
    numbers = array("f", data.tobytes())
    narrow = array("f", bytes(4 * kept * (len(numbers) // columns)))
    for column in range(kept):
        narrow[column::kept] = numbers[column::columns]
    return narrow.tobytes()


def sample(head: dict[str, Any], tensors: Tensors, last_n: int | None) -> bytes:
    """A SampleResponse of one prompt. `last_n`: only so many of the prompt's log-probs were asked for."""
    message = SampleResponse()
    cuts = integers(tensors["cu_seqlens"])
    tokens, log_probs = tensors["tokens"].data, tensors["log_probs"].data
    for i, reason in enumerate(head["finish_reasons"]):
        begin, end = cuts[i], cuts[i + 1]
        sequence = message.sequences.add(stop_reason=STOP if reason == "stop" else LENGTH)
        sequence.tokens, sequence.logprobs = bytes(tokens[4 * begin : 4 * end]), bytes(log_probs[4 * begin : 4 * end])
        if "top_ids" in tensors and begin < end:
            _top(sequence.topk_sampled_logprobs, tensors["top_ids"], tensors["top_log_probs"], begin, end)
    if "prompt_log_probs" in tensors:
        message.prompt_logprobs = _prompt(tensors["prompt_log_probs"], last_n)
    if "top_prompt_ids" in tensors:
        ids, values = tensors["top_prompt_ids"], tensors["top_prompt_log_probs"]
        _top(message.topk_prompt_logprobs, ids, values, 0, ids.shape[0], empty=ids.shape[0] - _last(ids.shape[0], last_n))
    if "target_log_probs" in tensors:
        _targets(message.target_prompt_logprobs, tensors["target_log_probs"])
    return message.SerializeToString()


def _last(length: int, last_n: int | None) -> int:
    """How many of a prompt's places have log-probs: its first one has none."""
    return length - 1 if last_n is None else min(last_n, length - 1)


def _prompt(log_probs: Tensor, last_n: int | None) -> bytes:
    numbers = array("f", log_probs.data.tobytes())
    empty = len(numbers) - _last(len(numbers), last_n)
    numbers[:empty] = array("f", [float("nan")]) * empty
    return numbers.tobytes()


def _top(message: Any, ids: Tensor, log_probs: Tensor, begin: int, end: int, *, empty: int = 0) -> None:
    """Rows `begin` to `end` of [n, k]; the first `empty` of them have no alternatives."""
    k = ids.shape[1]
    row = 4 * k
    message.k, message.length = k, end - begin
    blank_ids = bytes(row * empty)
    blank_values = array("f", [EMPTY_LOG_PROB]).tobytes() * (k * empty)
    message.token_ids = blank_ids + bytes(ids.data[row * (begin + empty) : row * end])
    message.logprobs = blank_values + bytes(log_probs.data[row * (begin + empty) : row * end])


def _targets(message: Any, log_probs: Tensor) -> None:
    """[len(prompt) - 1, K]: ours without the first place. Sparse, as the client reads it, if some cells were not asked for."""
    length, k = log_probs.shape
    numbers = array("f", log_probs.data[4 * k :].tobytes())
    message.dtype = FLOAT32
    message.shape.extend((length - 1, k))
    if not any(map(isnan, numbers)):
        message.dense = numbers.tobytes()
        return
    values, columns, rows = array("f"), array("q"), array("q", [0])
    for begin in range(0, len(numbers), k):
        for column, value in enumerate(numbers[begin : begin + k]):
            if not isnan(value):
                values.append(value)
                columns.append(column)
        rows.append(len(values))
    csr = message.sparse_csr
    csr.values, csr.crow_indices, csr.col_indices = values.tobytes(), rows.tobytes(), columns.tobytes()
