"""From the bytes of a loss request to the work order that a worker gets, or to what is wrong with every item of it."""

from typing import Any

from service.edge.arrays import parse_arrays
from service.edge.documents import parse_json
from service.errors import FieldError, InvalidRequest, Malformed
from service.losses import request as requests
from service.relay.orders import Order, Parcel
from service.relay.tensors import LENGTH_BYTES
from service.validation import invalid

JSON, TENSORS = "application/json", "application/vnd.safetensors"  # what a request may come as
QUICK_BYTES = 2**10  # mistakes on so little are explained within 10 ms; what is right takes less than to wake a thread


def is_quick(raw: bytes, sent_as: str) -> bool:
    """Whether to read it on the spot. Of safetensors only the header is read."""
    return (len(raw) if sent_as == JSON else int.from_bytes(raw[:LENGTH_BYTES], "little")) <= QUICK_BYTES


def order(raw: bytes, sent_as: str, loss_id: str, project: str, deadline: float) -> Parcel:
    """The work order that a body asks for; `deadline` in unix seconds. Raises Malformed, BodyTooLarge, and InvalidRequest when
    no item of it can be computed."""
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
    made = Order(loss_id, project, deadline, checked.all_or_nothing, checked.items, checked.tensors)
    return made.encode(raw if sent_as == TENSORS else None)


def errors_of(data: list[dict[str, Any]]) -> list[FieldError]:
    """What a worker found wrong with the items of an order, as it stands in its answer."""
    said = [error for item in data if "error" in item for error in item.get("errors", [item["error"]])]
    return [FieldError(**{name: entry.get(name) for name in ("pointer", "detail", "code", "got", "allowed")}) for entry in said]


def none_answered(items: list[dict[str, Any]], errors: list[FieldError]) -> InvalidRequest:
    """The refusal of a request of which nothing was computed."""
    error = invalid(errors)
    return InvalidRequest(error.detail, error.errors, code=errors[0].code, data=requests.withheld(items))
