"""The faces that HTTP shows: the native API, and others beside it, each under its prefix.

A face says what differs between them before any route is reached: how an error looks to its clients, and which headers
every answer carries. An answer that sets one of these headers itself keeps its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.types import Scope

PROBLEM = "application/problem+json"


def as_it_is(problem: dict[str, Any]) -> dict[str, Any]:
    return problem


@dataclass(frozen=True)
class Face:
    """`error` makes of a problem document (RFC 9457) the body that this face's clients know; `error_type` is its media type."""

    prefix: str  # of its paths; "": all that no other face takes
    headers: Mapping[str, str]
    error: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is
    error_type: str = PROBLEM


# Nothing here is a page but /docs, which has a policy of its own, and nothing that is anybody's own is to be kept on the way.
NATIVE = Face(
    prefix="",
    headers={
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
    },
)


def install(app: FastAPI, *beside_native: Face) -> None:
    """From here on `face_of` knows these faces; the longest prefix decides."""
    app.state.faces = (*sorted(beside_native, key=lambda face: -len(face.prefix)), NATIVE)


def face_of(scope: Scope) -> Face:
    """Whose path it is. Paths stand under a prefix as folders do: /pages is not under /page."""
    path: str = scope["path"]
    faces: Sequence[Face] = scope["app"].state.faces
    return next(face for face in faces if not face.prefix or path == face.prefix or path.startswith(f"{face.prefix}/"))
