"""The batch of an item as it is sent: what may be in it, as arrays of JSON or as tensors.

B sequences. Per token: in JSON an array for each sequence, of any lengths; as tensors flat [N] with `cu_seqlens` [B + 1]
(ragged), or [B, T] (padded). Whether the parts agree is asked in `shapes`.
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
# The dtypes that are taken, by name, in the order of openapi.json.
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
    unseen = PlainValidator(_array_or_tensor)  # pydantic does not look inside
    return Annotated[Any, unseen, WithJsonSchema(_schema(tensor)), Field(description=tensor.meaning)]


_FIELDS: dict[str, Any] = {name: (_field(tensor), ... if name == "log_probs" else None) for name, tensor in TENSORS.items()}


class LossBatch(create_model("LossTensors", __base__=Section, **_FIELDS)):
    """B sequences. Per token: an array for each sequence, of any lengths. What the objective does not need may be left out."""

    def sent(self) -> dict[str, Any]:
        """What came, by name."""
        return {name: value for name, value in self if value is not None}
