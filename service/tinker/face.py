"""The face of the Tinker wire. Errors are `{"detail": ...}`, and none is a 409, which clients would repeat for minutes."""

from typing import Any

from service.edge.faces import NATIVE, Face

PREFIX = "/api/v1"


def error(problem: dict[str, Any]) -> dict[str, Any]:
    detail = problem["detail"]
    if problem.get("hint"):
        detail = f"{detail} ({problem['hint']})"
    kept = ("code", "errors", "request_id")
    return {"detail": detail, **{name: problem[name] for name in kept if name in problem}}


FACE = Face(prefix=PREFIX, headers=NATIVE.headers, error=error, error_type="application/json", statuses={409: 422})
