"""The errors that the client raises."""

from typing import Any, Self

import httpx

LISTED = 5  # at most so many faults are in an error's message; `errors` has all


class RatchetError(Exception):
    """The root of all errors that this client raises on purpose. They can be pickled, so they work in a process pool."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilt from its attributes, because `__init__` may take other arguments than `args`."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class RatchetNotFound(RatchetError):
    """No address or no key was given or found."""


class RatchetConnectionError(RatchetError):
    """The service could not be reached, or the connection broke, and retries did not help."""


class RatchetArchiveError(RatchetError):
    """A downloaded archive is incomplete, or contains something that must not be unpacked."""


class RatchetLossPending(RatchetError, TimeoutError):
    """A loss was not computed within `wait_s`; `Ratchet.loss_request(id)` asks for it again."""

    def __init__(self, loss_id: str, status: str) -> None:
        self.id = loss_id
        self.status = status
        super().__init__(f"{loss_id} is still {status}: wait longer, or ask for it again by loss_request({loss_id!r})")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.id, self.status), self.__dict__  # an OSError has no args before its __init__ was called


class RatchetOperationError(RatchetError):
    """An operation of a session failed. It has changed nothing; the operations after it go on."""

    def __init__(self, operation: dict[str, Any]) -> None:
        error: dict[str, Any] = operation["error"]
        self.operation_id: str = operation["id"]
        self.seq: int = operation["seq"]
        self.kind: str = operation["kind"]
        self.code: str = error["code"]
        self.detail: str = error["detail"]
        self.category: str = error["category"]  # user or server: who can mend it
        self.pointer: str | None = error.get("pointer")
        self.hint: str | None = error.get("hint")
        super().__init__(f"{self.kind} (operation {self.seq}) failed: {self.detail} ({self.code})")


class RatchetApiError(RatchetError):
    """The service refused the request. `problem` is its RFC 9457 document; the main members are attributes."""

    def __init__(self, status: int, problem: dict[str, Any], *, retry_after_s: float | None = None) -> None:
        self.status = status
        self.problem = problem
        self.code: str = problem.get("code") or f"http_{status}"
        self.detail: str = problem.get("detail") or problem.get("title") or f"HTTP status {status}"
        self.hint: str | None = problem.get("hint")
        self.retryable = bool(problem.get("retryable", False))
        self.errors: list[dict[str, Any]] = problem.get("errors") or []  # pointer, detail, got, allowed
        self.retry_after_s = retry_after_s
        places = (_place(each) for each in self.errors[:LISTED])
        places = [place for place in places if place != self.detail]  # a single fault is the message itself
        super().__init__("\n  ".join((f"{self.detail} ({self.code}, HTTP {status})", *places)))

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """From a response that has been read. A body that is not a problem document (a proxy's page) is quoted."""
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {"title": response.reason_phrase, "detail": response.text[:200].strip() or response.reason_phrase}
        return cls(response.status_code, problem, retry_after_s=retry_after_s(response))


def _place(error: dict[str, Any]) -> str:
    """One fault as a line of the message."""
    return f"{error.get('pointer') or '(the whole)'}: {error.get('detail', '')}"


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header in its numeric form, the only one that Ratchet sends."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
