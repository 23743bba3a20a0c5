"""Errors in the shape that OpenAI's clients read."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, Field

from service.edge.faces import NATIVE, Face
from service.edge.problems import DESCRIPTIONS, OpenAIError

JSON = "application/json"
UNPROCESSABLE, BAD_REQUEST = 422, 400  # OpenAI has one status for all that is wrong with a request


class OpenAIErrors(BaseModel):
    """What went wrong, in OpenAI's shape."""

    error: Annotated[OpenAIError, Field(description="`code` is for programs, `message` for people")]


def shaped(problem: dict[str, Any]) -> dict[str, Any]:
    """The problem as OpenAI's error object. `param` has OpenAI's form: messages[0].content for /messages/0/content."""
    error = dict(problem["error"])
    message, hint = re.sub(r"^/(\S+): ", lambda found: f"{_param(found[1])}: ", error["message"]), problem.get("hint")
    pointer = error.get("param")
    param = None if not pointer else _param(pointer.removeprefix("/"))
    return {"error": {**error, "message": f"{message} ({hint})" if hint else message, "param": param}}


def _param(pointer: str) -> str:
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")]
    return parts[0] + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts[1:])


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: errors with these statuses."""
    schema = {"$ref": "#/components/schemas/OpenAIErrors"}
    return {status: {"description": DESCRIPTIONS[status], "content": {JSON: {"schema": schema}}} for status in sorted(statuses)}


FACES = tuple(
    Face(prefix, NATIVE.headers, shaped, JSON, {UNPROCESSABLE: BAD_REQUEST})
    for prefix in ("/v1/completions", "/v1/chat", "/v1/files", "/v1/fine_tuning")
)
