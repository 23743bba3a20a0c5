"""The error tree. No HTTP in here: `service.edge.problems` maps each class to a status."""

from dataclasses import asdict, dataclass, field
from typing import Any

from service.failures import CODES, Category


@dataclass(frozen=True)
class FieldError:
    """One fault of an input: where it is (JSON pointer), what came, what is allowed."""

    pointer: str
    detail: str
    code: str = "invalid"
    got: Any = None
    allowed: Any = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Portable(Exception):
    """Can be pickled whatever its `__init__` takes: it is rebuilt from its attributes, and `__init__` is not called again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__


class RatchetError(Portable):
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
    """The caller's input is invalid."""

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
    """The object's state does not allow this now; `extra["allowed_moves"]` lists what it allows."""

    code = "conflict"


class InFlight(Conflict):
    """The first request with this Idempotency-Key has not been answered yet."""

    code = "idempotency_in_flight"
    retryable = True


class RateLimited(RatchetError):
    """Too many requests; `extra["retry_after_s"]` says when the next one may come."""

    code = "rate_limited"
    retryable = True


class HeadersTooLarge(RatchetError):
    code = "headers_too_large"


class UriTooLong(RatchetError):
    code = "uri_too_long"


class BodyTooSlow(RatchetError):
    """The body took longer to arrive than its size allows."""

    code = "body_too_slow"
    retryable = True


class BodyTooLarge(RatchetError):
    code = "body_too_large"


class UnsupportedMedia(RatchetError):
    """The body's format or compression is not supported here."""

    code = "unsupported_media_type"


class NotAcceptable(RatchetError):
    """The response cannot be produced in any format that the caller accepts."""

    code = "not_acceptable"


class Busy(RatchetError):
    """Too much work is waiting."""

    code = "busy"
    retryable = True


class Unavailable(RatchetError):
    """A service that we depend on does not answer."""

    code = "unavailable"
    retryable = True


class BucketUnavailable(Unavailable):
    """The bucket with the files of checkpoints and datasets does not answer."""

    code = "bucket_unavailable"


class BucketRefused(Unavailable):
    """The bucket is not there, or does not let us in: the operator must mend it."""

    code = "bucket_refused"
    retryable = False


class DiskFull(RatchetError):
    """What was to be stored does not fit. Nothing of it is left."""

    code = "disk_full"
    retryable = True


class LeaseLost(RatchetError):
    """This worker is a zombie: another attempt owns the job. It must stop and write nothing."""

    code = "lease_lost"


@dataclass
class Failure:
    """Why a job failed, paused or was put back, as stored in `jobs.error` and shown to its owner.

    The code determines who can fix it and whether it is retried. An unknown code (see service.failures) raises KeyError.
    """

    code: str
    detail: str
    category: Category = field(init=False)
    retryable: bool = field(init=False)
    hint: str | None = None
    pointer: str | None = None
    phase: str | None = None
    step: int | None = None
    attempt: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    log_tail: list[str] = field(default_factory=list)  # the attempt's last log lines, without secrets

    def __post_init__(self) -> None:
        known = CODES[self.code]
        self.category, self.retryable, self.hint = known.category, known.retryable, self.hint or known.remedy

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, [])}


class JobFailed(RatchetError):
    """Raised inside a worker: ends the attempt. The code decides what happens to the job (service.failures)."""

    def __init__(self, code: str, detail: str, *, hint: str | None = None, pointer: str | None = None, **details: Any) -> None:
        super().__init__(detail, code=code, hint=hint)
        self.failure = Failure(code, detail, hint=hint, pointer=pointer, details=details)
        self.retryable = self.failure.retryable
