"""From the bytes of a loss request to a work order for a worker, or to the errors of all its items."""

from typing import Any

from service import tracing
from service.edge.arrays import parse_arrays
from service.edge.documents import parse_json
from service.errors import FieldError, InvalidRequest, Malformed
from service.losses import request as requests
from service.relay.orders import Order, Parcel
from service.relay.tensors import LENGTH_BYTES
from service.validation import invalid

JSON, TENSORS = "application/json", "application/vnd.safetensors"  # the media types of a request
QUICK_BYTES = 2**10  # even with errors this takes at most 10 ms; without, less than waking a thread


def is_quick(raw: bytes, sent_as: str) -> bool:
    """Whether to read the body here and not in a thread. For safetensors only the header is read."""
    return (len(raw) if sent_as == JSON else int.from_bytes(raw[:LENGTH_BYTES], "little")) <= QUICK_BYTES


def order(raw: bytes, sent_as: str, loss_id: str, project: str, deadline: float) -> Parcel:
    """The work order for a body; `deadline` in unix seconds. Raises Malformed, BodyTooLarge, and InvalidRequest if no item can
    be computed."""
    if sent_as == TENSORS:
        tensors, text = requests.decoded(raw)
        try:
            checked = requests.check(parse_json(text.encode()), tensors)
        except Malformed as error:
            raise Malformed(f"in the header's metadata `request`: {error.detail}", code=error.code) from None
    else:
        checked = requests.check(parse_arrays(raw))
    if checked.is_hopeless:
        raise none_answered(checked.items, checked.errors)
    trace = tracing.here()
    made = Order(loss_id, project, deadline, checked.all_or_nothing, checked.items, checked.tensors, trace)
    return made.encode(raw if sent_as == TENSORS else None)


def errors_of(data: list[dict[str, Any]]) -> list[FieldError]:
    """The errors of the items in a worker's answer."""
    said = [error for item in data if "error" in item for error in item.get("errors", [item["error"]])]
    return [FieldError(**{name: entry.get(name) for name in ("pointer", "detail", "code", "got", "allowed")}) for entry in said]


def none_answered(items: list[dict[str, Any]], errors: list[FieldError]) -> InvalidRequest:
    """The error for a request of which no item was computed."""
    error = invalid(errors)
    return InvalidRequest(error.detail, error.errors, code=errors[0].code, data=requests.withheld(items))
