"""The error tree. No HTTP in here: `service.api.problems` maps each class to a status."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong with an input: where (JSON pointer), what came, what is allowed."""

    pointer: str
    detail: str
    code: str = "invalid"
    got: Any = None
    allowed: Any = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class RatchetError(Exception):
    """The root: `code` for programs, `detail` for people, `retryable` for both."""

    code = "internal"
    retryable = False

    def __init__(self, detail: str, *, code: str | None = None, hint: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.hint = hint
        self.extra = extra  # further members of the problem document, for example allowed_moves


class InvalidRequest(RatchetError):
    """The caller's input cannot be taken as it is."""

    code = "invalid_request"

    def __init__(self, detail: str, errors: list[FieldError] | None = None, **kwargs: Any) -> None:
        super().__init__(detail, **kwargs)
        self.errors = errors or []


class Malformed(InvalidRequest):
    """The body is not the JSON, YAML or JSONL that it claims to be."""

    code = "malformed_body"


class Unauthorized(RatchetError):
    code = "unauthorized"


class Forbidden(RatchetError):
    code = "forbidden"


class NotFound(RatchetError):
    code = "not_found"


class Conflict(RatchetError):
    """The object's state does not allow this now; `extra["allowed_moves"]` says what is."""

    code = "conflict"


class InFlight(Conflict):
    """The first request with this Idempotency-Key has not been answered yet."""

    code = "idempotency_in_flight"
    retryable = True


class BodyTooLarge(RatchetError):
    code = "body_too_large"


class UnsupportedMedia(RatchetError):
    """The body is in a format, or a compression, that is not taken here."""

    code = "unsupported_media_type"


class Unavailable(RatchetError):
    """Something that we stand on does not answer just now."""

    code = "unavailable"
    retryable = True


class LeaseLost(RatchetError):
    """This worker is a zombie: another attempt owns the job. It must stop and write nothing."""

    code = "lease_lost"


Category = Literal["user", "infra", "internal"]


@dataclass
class Failure:
    """Why a job failed or was put back, as stored in `jobs.error` and shown to its owner."""

    code: str
    detail: str
    category: Category = "internal"
    retryable: bool = False
    hint: str | None = None
    pointer: str | None = None
    phase: str | None = None
    step: int | None = None
    attempt: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


class JobFailed(RatchetError):
    """Raised inside a worker: ends the job (or its attempt, when retryable) with a named code."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        category: Category = "user",
        retryable: bool = False,
        hint: str | None = None,
        pointer: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(detail, code=code, hint=hint)
        self.retryable = retryable
        self.failure = Failure(code, detail, category, retryable, hint, pointer, details=details)
