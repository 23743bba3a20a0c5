"""What the client of an operation reads when it fails."""

from typing import Any

from service.errors import InvalidRequest
from service.failures import CODES
from workers.tenure.failures import failure_of

LOST: dict[str, Any] = {
    "code": "operation_lost",
    "detail": "the worker died each time it ran this operation; nothing of it was kept",
    "category": "server",
    "hint": "send less at once: it may not fit the worker's memory",
}


def told(error: Exception) -> dict[str, Any]:
    """The error as it is stored: a code, whose fault it is, and for a fault of the request where it is."""
    if isinstance(error, InvalidRequest):
        where = error.errors[0].pointer if error.errors else None
        found = {"code": error.code, "detail": error.detail, "category": "user", "pointer": where or None, "hint": error.hint}
        return {name: value for name, value in found.items() if value is not None}
    failure = failure_of(error)
    category = "user" if CODES[failure.code].category == "user" else "server"
    return {"code": failure.code, "detail": failure.detail, "category": category}
