"""Errors as HTTP answers: RFC 9457 problem documents that also contain an `error` object in OpenAI's shape. A face whose
clients expect another shape converts them (`service.edge.faces`).

One table maps the classes of `service.errors` to statuses. An unexpected error becomes a 500 that does not tell its cause;
the log has the cause under the same request id.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.edge.faces import PROBLEM, face_of
from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    BucketRefused,
    Busy,
    Conflict,
    DiskFull,
    FieldError,
    Forbidden,
    HeadersTooLarge,
    InFlight,
    InvalidRequest,
    Malformed,
    NotAcceptable,
    NotFound,
    RatchetError,
    RateLimited,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
    UriTooLong,
)
from service.store.blobs import FULL, disk_full
from service.validation import field_errors, invalid, shown, unknown_key, without_secrets

log = logging.getLogger(__name__)

STATUSES: Mapping[type[RatchetError], int] = {
    Malformed: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    NotAcceptable: 406,
    BodyTooSlow: 408,
    Conflict: 409,
    BodyTooLarge: 413,
    UriTooLong: 414,
    UnsupportedMedia: 415,
    InvalidRequest: 422,
    Busy: 429,
    RateLimited: 429,
    HeadersTooLarge: 431,
    Unavailable: 503,
    DiskFull: 507,
    RatchetError: 500,
}
HEADERS: Mapping[type[RatchetError], dict[str, str]] = {
    Unauthorized: {"WWW-Authenticate": 'Bearer realm="ratchet"'},
    InFlight: {"Retry-After": "1"},
    Busy: {"Retry-After": "1"},
    BodyTooSlow: {"Connection": "close"},  # do not keep the connection open for the rest of the body
    BucketRefused: {},
    Unavailable: {"Retry-After": "5"},
    DiskFull: {"Connection": "close"},  # the same for a body that does not fit
}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
POSTGRES_FULL = "53100"  # SQLSTATE disk_full; SQLite has only a message
CODES = {404: "route_not_found", 405: "method_not_allowed"}  # of errors that the framework raises


class ProblemField(BaseModel):
    """One thing that is wrong with the request."""

    model_config = ConfigDict(extra="allow")

    pointer: Annotated[str, Field(description="JSON pointer into the body; /query/... for a query parameter")]
    detail: Annotated[str, Field(description="what is wrong, what is allowed")]
    code: str
    got: Annotated[Any, Field(description="what came, shortened")] = None
    allowed: Annotated[Any, Field(description="what may stand there")] = None


class OpenAIError(BaseModel):
    """The same in the shape that clients of OpenAI's API know."""

    message: str
    type: str
    param: str | None = None
    code: str


class Problem(BaseModel):
    """What went wrong (RFC 9457). Some codes bring further members, such as allowed_moves."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: Annotated[str, Field(description="for people: what came, what is allowed, what to do")]
    instance: str
    code: Annotated[str, Field(description="for programs; stable")]
    retryable: Annotated[bool, Field(description="the same request may succeed later")]
    hint: str | None = None
    request_id: str | None = None
    errors: Annotated[list[ProblemField] | None, Field(description="every field that is wrong")] = None
    error: OpenAIError


def problem(
    request: Request, error: RatchetError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The HTTP answer for this error."""
    face = face_of(request.scope)
    status = status or int(_of_class(STATUSES, error))
    status = face.statuses.get(status, status)
    closing = {"Connection": "close"} if status == 500 else {}  # the server closes it after a 500; tell the client
    if status >= 500 and not isinstance(error, Unavailable | DiskFull):
        error = RatchetError(
            "something went wrong here; the log has it under this request_id", hint="try again, then report it"
        )
    errors = [_field(field_error) for field_error in error.errors] if isinstance(error, InvalidRequest) else []
    detail = without_secrets(error.detail)
    body = Problem(
        type=f"urn:ratchet:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=without_secrets(request.url.path),
        code=error.code,
        retryable=error.retryable,
        hint=error.hint,
        request_id=request.scope.get("request_id"),
        errors=errors or None,
        error=OpenAIError(
            message=detail,
            type=OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            param=errors[0].pointer if errors else None,
            code=error.code,
        ),
        **{name: value for name, value in error.extra.items() if name not in Problem.model_fields},
    )
    content = face.error(body.model_dump(mode="json", exclude_none=True, fallback=str))
    all_headers = {
        **face.headers,
        "X-Request-Id": body.request_id or "",
        **_of_class(HEADERS, error, {}),
        **(headers or {}),
        **closing,
    }
    if "retry_after_s" in error.extra:
        all_headers["Retry-After"] = str(error.extra["retry_after_s"])
    return JSONResponse(content, face.statuses.get(status, status), all_headers, face.error_type)


def _field(error: FieldError) -> ProblemField:
    name = error.pointer.rpartition("/")[2]
    said = {"pointer": without_secrets(error.pointer), "detail": without_secrets(error.detail), "got": shown(error.got, name)}
    return ProblemField(**{**error.as_dict(), **said})


def files_missing(what: str) -> NotFound:
    """The error for an object whose row exists while its blobs do not."""
    hint = "API and workers must share one data directory (RATCHET_DATA_DIR), or one bucket (RATCHET_BLOB_URL)"
    return NotFound(f"the files of {what} are not on this machine", code="files_missing", hint=hint)


def _of_class(table: Mapping[type[RatchetError], Any], error: RatchetError, default: Any = None) -> Any:
    return next((table[kind] for kind in type(error).__mro__ if kind in table), default)


# ---------------------------------------------------------------- handlers


def install(app: FastAPI) -> None:
    """Register the handlers: Ratchet's, the framework's and unexpected errors are all answered with a problem."""
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def _ours(request: Request, error: Any) -> JSONResponse:
    if _of_class(STATUSES, error) == 500:
        log.error("unexpected %s in %s", type(error).__name__, request.scope.get("request_id"), exc_info=error)
    return problem(request, error)


async def _parameters(request: Request, error: Any) -> JSONResponse:
    """Query parameters, headers and paths that FastAPI refused."""
    complaints = [complaint for complaint in error.errors() if complaint["type"] != "extra_forbidden"]
    errors = field_errors(Any, complaints)
    for complaint in error.errors():
        if complaint["type"] == "extra_forbidden":
            place, name = complaint["loc"]
            errors.append(unknown_key(f"/{place}/{name}", str(name), _legal_parameters(request, place)))
    return problem(request, invalid(errors))


def _legal_parameters(request: Request, place: str) -> list[str]:
    operation = _documented(request).get(request.method.lower(), {})
    return sorted(parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == place)


def _documented(request: Request) -> dict[str, Any]:
    """The entry of this path in openapi.json: its methods and their parameters."""
    path = getattr(request.scope.get("route"), "path_format", "")
    return request.app.openapi()["paths"].get(path, {})


async def _framework(request: Request, error: Any) -> JSONResponse:
    status, detail, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        detail = f"there is no {request.url.path}; the routes are listed under /docs and in /openapi.json"
    if status == 405:
        headers["Allow"] = ", ".join(sorted(method.upper() for method in _documented(request)))
        detail = f"{request.method} is not possible here; possible: {headers['Allow']}"
    code = CODES.get(status, HTTPStatus(status).phrase.lower().replace(" ", "_"))
    return problem(request, RatchetError(detail, code=code), status=status, headers=headers)


async def _store_is_away(request: Request, error: Any) -> JSONResponse:
    reason = error.orig if isinstance(error, OperationalError) else error
    if getattr(reason, "sqlstate", None) == POSTGRES_FULL or "disk is full" in str(reason):
        log.error("the database has no room: %s", reason)
        return problem(request, disk_full("the disk of the database"))
    log.warning("the database does not answer: %s", reason)
    return problem(request, Unavailable("the database does not answer just now", code="database_unavailable"))


async def _raced(request: Request, error: Any) -> JSONResponse:
    """Two requests raced, and no query noticed before the database did: it let one of them through."""
    log.error("request %s met a change at the same moment", request.scope.get("request_id"), exc_info=error)
    detail = "what this request needs was changed or deleted at the same moment; nothing was done"
    return problem(request, Conflict(detail, code="changed_meanwhile", hint="look again, then decide whether to repeat it"))


async def _system(request: Request, error: Any) -> JSONResponse:
    """An unexpected error of the operating system."""
    log.error("request %s failed", request.scope.get("request_id"), exc_info=error)
    return problem(request, disk_full("a disk of the service") if error.errno in FULL else RatchetError(""))


async def _client_went(request: Request, error: Any) -> JSONResponse:
    return problem(request, Malformed("the connection ended before the body did", code="body_incomplete"))


async def _unexpected(request: Request, error: Any) -> JSONResponse:
    """The exception is raised again after this answer, and then the server logs it."""
    log.error("request %s failed", request.scope.get("request_id"))
    return problem(request, RatchetError(""))


HANDLERS: Mapping[type[Exception], Any] = {
    RatchetError: _ours,
    RequestValidationError: _parameters,
    HTTPException: _framework,
    OperationalError: _store_is_away,
    InterfaceError: _store_is_away,
    IntegrityError: _raced,
    StaleDataError: _raced,
    ObjectDeletedError: _raced,
    PoolTimeout: _store_is_away,
    ClientDisconnect: _client_went,
    OSError: _system,
    Exception: _unexpected,
}


# ---------------------------------------------------------------- documentation

DESCRIPTIONS = {
    400: "The body or the request cannot be read.",
    401: "No API key, or a wrong one.",
    403: "The API key does not allow this: `missing_scope` says what it lacks.",
    404: "No such object in this project.",
    406: "The answer comes in none of the formats that Accept names.",
    408: "The body came too slowly.",
    409: "The state of the object does not allow this now.",
    413: "The body is too large.",
    414: "The path or the query is too long.",
    415: "The body is in a format that is not taken here.",
    422: "Something in the request is wrong; `errors` says what and where.",
    429: "The API key has asked too often, holds too many streams open, or too much waits already; see Retry-After.",
    431: "The headers are too large.",
    500: "Something went wrong in the service.",
    503: "Something that the service stands on is away; see Retry-After.",
    507: "A disk of the service is full; `detail` says which. Nothing was stored.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: problems with these statuses."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": DESCRIPTIONS[status], "content": {PROBLEM: {"schema": schema}}} for status in sorted(statuses)
    }


COMMON = (400, 401, 403, 414, 422, 429, 431, 500, 503, 507)
BODY = (408, 413, 415)
