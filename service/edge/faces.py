"""Faces: the APIs that this server offers. The native API and others beside it, each under its own path prefix.

A face defines what differs between them outside the routes: the shape of errors, and the headers of every answer. If an
answer sets one of these headers itself, its own value stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.types import Scope

PROBLEM = "application/problem+json"


def as_it_is(problem: dict[str, Any]) -> dict[str, Any]:
    return problem


@dataclass(frozen=True)
class Face:
    """`error` converts a problem document (RFC 9457) to this face's error body; `error_type` is the media type of that body.

    `statuses` replaces statuses of errors that this face's clients would take for something else.
    """

    prefix: str  # of its paths; "" matches all paths that no other face matches
    headers: Mapping[str, str]
    error: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is
    error_type: str = PROBLEM
    statuses: Mapping[int, int] = field(default_factory=dict)  # other statuses than the native face's, by those


# Only /docs and the dashboard are pages, with a Content-Security-Policy of their own. No-store: caches must not keep a
# caller's private data.
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
    """Register the faces for `face_of`. The longest matching prefix wins."""
    app.state.faces = (*sorted(beside_native, key=lambda face: -len(face.prefix)), NATIVE)


def face_of(scope: Scope) -> Face:
    """The face of this path. A prefix matches whole path segments: /pages is not under /page."""
    path: str = scope["path"]
    faces: Sequence[Face] = scope["app"].state.faces
    return next(face for face in faces if not face.prefix or path == face.prefix or path.startswith(f"{face.prefix}/"))
