"""The batch of a request's item: the fields it may have, as arrays of JSON or as tensors.

A batch has B sequences. Values per token are, in JSON, one array per sequence, of any length; as tensors they are flat [N] with
`cu_seqlens` [B + 1] (ragged), or [B, T] (padded). `shapes` checks whether the fields agree.
"""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, create_model
from pydantic_core import PydanticKnownError

from service.relay.tensors import Tensor
from service.spec.section import Section
from service.spec.tensors import TENSORS, BatchTensor

PER_TOKEN = sorted(
    (name for name, tensor in TENSORS.items() if tensor.per == ("token",)), key=lambda name: not TENSORS[name].is_float
)
PER_SEQUENCE = [name for name, tensor in TENSORS.items() if "row" in tensor.per and "token" not in tensor.per]
# The accepted dtypes, by name, in the order of openapi.json.
TAKEN = {name: TENSORS[name].dtypes for name in dict.fromkeys((*PER_TOKEN, *PER_SEQUENCE, *TENSORS))}


def _array_or_tensor(sent: Any) -> Any:
    if not isinstance(sent, list | Tensor):
        raise PydanticKnownError("list_type")
    return sent


_NUMBER: dict[str, Any] = {
    "anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}, {"type": "null"}]
}  # JSON has no word for what is not finite
_IN_JSON: dict[str, dict[str, Any]] = {
    "log_prob": _NUMBER,
    "number": _NUMBER,
    "flag": {"enum": [0, 1, False, True]},
    "id": {"type": "integer"},
    "label": {"type": ["integer", "string"]},
}


def _schema(tensor: BatchTensor) -> dict[str, Any]:
    """An array, or an array of arrays."""
    if tensor.holds not in _IN_JSON:
        return {"not": {}}
    flat = {"type": "array", "items": _IN_JSON[tensor.holds]}
    shapes = [flat if per in ("row", "reward") else {"type": "array", "items": flat} for per in tensor.per]
    return shapes[0] if len(shapes) == 1 else {"anyOf": shapes}


def _field(tensor: BatchTensor) -> Any:
    unseen = PlainValidator(_array_or_tensor)  # pydantic does not validate the content
    return Annotated[Any, unseen, WithJsonSchema(_schema(tensor)), Field(description=tensor.meaning)]


_FIELDS: dict[str, Any] = {name: (_field(tensor), ... if name == "log_probs" else None) for name, tensor in TENSORS.items()}


class LossBatch(create_model("LossTensors", __base__=Section, **_FIELDS)):
    """B sequences. Per token: an array for each sequence, of any lengths. What the objective does not need may be left out."""

    def sent(self) -> dict[str, Any]:
        """The fields that were sent, by name."""
        return {name: value for name, value in self if value is not None}
