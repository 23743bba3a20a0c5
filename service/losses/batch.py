"""The batch of an item as it is sent: what may be in it, as arrays of JSON or as tensors.

B sequences. Per token: in JSON an array for each sequence, of any lengths; as tensors flat [N] with `cu_seqlens` [B + 1]
(ragged), or [B, T] (padded). Whether the parts agree is asked in `shapes`.
"""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from service.relay.tensors import Tensor
from service.spec.section import Section

FLOATS = ("F64", "F32", "BF16")
INTEGERS = ("I64", "I32")
FLAGS = (*FLOATS, "BOOL", "U8", *INTEGERS)
# The dtypes that are taken, by name.
PER_TOKEN = {
    "log_probs": FLOATS,
    "old_log_probs": FLOATS,
    "rollout_log_probs": FLOATS,
    "ref_log_probs": FLOATS,
    "entropy": FLOATS,
    "weights": FLOATS,
    "response_mask": FLAGS,
    "segment_ids": INTEGERS,
}
PER_SEQUENCE = {"rewards": FLOATS, "group_ids": INTEGERS, "truncated": FLAGS}
TAKEN = PER_TOKEN | PER_SEQUENCE | {"advantages": FLOATS, "reward_weights": FLOATS, "cu_seqlens": INTEGERS}


def _array_or_tensor(sent: Any) -> Any:
    if not isinstance(sent, list | Tensor):
        raise PydanticKnownError("list_type")
    return sent


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


UNSEEN = PlainValidator(_array_or_tensor)  # pydantic does not look inside
_NUMBER = {
    "anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}, {"type": "null"}]
}  # JSON has no word for what is not finite
_FLAG = {"enum": [0, 1, False, True]}
Numbers = Annotated[Any, UNSEEN, WithJsonSchema(_array(_NUMBER))]
Rows = Annotated[Any, UNSEEN, WithJsonSchema(_array(_array(_NUMBER)))]
NumbersOrRows = Annotated[Any, UNSEEN, WithJsonSchema({"anyOf": [_array(_NUMBER), _array(_array(_NUMBER))]})]
Flags = Annotated[Any, UNSEEN, WithJsonSchema(_array(_FLAG))]
FlagRows = Annotated[Any, UNSEEN, WithJsonSchema(_array(_array(_FLAG)))]
IdRows = Annotated[Any, UNSEEN, WithJsonSchema(_array(_array({"type": "integer"})))]
Labels = Annotated[Any, UNSEEN, WithJsonSchema(_array({"type": ["integer", "string"]}))]
TensorOnly = Annotated[Any, UNSEEN, WithJsonSchema({"not": {}})]


class LossBatch(Section):
    """B sequences. Per token: an array for each sequence, of any lengths. What the objective does not need may be left out."""

    log_probs: Annotated[Rows, Field(description="per token, of the policy that is trained: what gradients are taken of")]
    old_log_probs: Annotated[Rows, Field(description="per token, of the same policy when it sampled")] = None
    rollout_log_probs: Annotated[Rows, Field(description="per token, as the sampler reported them")] = None
    ref_log_probs: Annotated[Rows, Field(description="per token, of the reference policy")] = None
    entropy: Annotated[Rows, Field(description="per token, of the policy's distribution")] = None
    response_mask: Annotated[FlagRows, Field(description="per token, 0 or 1: what counts; default: all of it")] = None
    segment_ids: Annotated[IdRows, Field(description="per token: the segment that it belongs to")] = None
    weights: Annotated[
        Rows, Field(description="per token: aggregation weights, as `return` gives them, in place of the aggregate axis")
    ] = None
    advantages: Annotated[NumbersOrRows, Field(description="one a sequence, or per token")] = None
    rewards: Annotated[
        NumbersOrRows,
        Field(description="one a sequence, or several, [B, R]; advantages are made of them unless given"),
    ] = None
    group_ids: Annotated[Labels, Field(description="one a sequence: which of them answer the same prompt")] = None
    truncated: Annotated[Flags, Field(description="one a sequence: whether it was cut at the token limit")] = None
    reward_weights: Annotated[Numbers, Field(description="[R], of several rewards; default: all 1")] = None
    cu_seqlens: Annotated[TensorOnly, Field(description="of flat tensors [B + 1]: where each sequence begins, and the end")] = (
        None
    )
