"""Parses what callers send. Pydantic's errors become JSON pointers with what came and what is allowed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from service.errors import FieldError, InvalidRequest
from service.validation.complaints import complaint, merge_unions, unknown_key
from service.validation.walk import escape, walk
from service.validation.words import did_you_mean, nearest, quoted, shown, without_secrets

__all__ = [
    "below",
    "did_you_mean",
    "escape",
    "field_errors",
    "invalid",
    "nearest",
    "parse",
    "quoted",
    "shown",
    "unknown_key",
    "without_secrets",
]

T = TypeVar("T")

MAX_ERRORS = 50  # that are told
MAX_DETAILS = 200  # that are put into words: each takes a search for the word that was meant


@overload
def parse(model: type[T], raw: Any, pointer: str = "") -> T: ...
@overload
def parse(model: TypeAdapter[T], raw: Any, pointer: str = "") -> T: ...
@overload
def parse(model: Any, raw: Any, pointer: str = "") -> Any: ...
def parse(model: Any, raw: Any, pointer: str = "") -> Any:
    """An instance of the model (a class, an annotation or a TypeAdapter). Raises InvalidRequest with every FieldError.

    `pointer` is the place of `raw` in the caller's document.
    """
    adapter: TypeAdapter[Any] = model if isinstance(model, TypeAdapter) else _adapter(model)
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        details = error.errors(include_url=False)
        errors = field_errors(adapter._type, details[:MAX_DETAILS], pointer)
    raise invalid(errors, beside=len(details[MAX_DETAILS:]))


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    """Made once for each model: to make one takes longer than to use it."""
    return TypeAdapter(model)


def field_errors(annotation: Any, details: Iterable[ErrorDetails], pointer: str = "") -> list[FieldError]:
    """Each pydantic error as a FieldError. Errors about one place of a plain union are merged into one."""
    return merge_unions([complaint(walk(annotation, detail["loc"], pointer), detail) for detail in details])


def invalid(errors: list[FieldError], beside: int = 0) -> InvalidRequest:
    """The error that carries these, its detail made of the first; at most MAX_ERRORS are kept. `beside`: so many were not even
    put into words."""
    first, more = errors[0], len(errors) - 1 + beside
    detail = f"{first.pointer}: {first.detail}" if first.pointer else first.detail
    if more:
        detail += f" (and {more} more)"
    return InvalidRequest(detail, errors[:MAX_ERRORS])


@contextmanager
def below(pointer: str) -> Iterator[None]:
    """Errors raised inside this block get `pointer` in front of their own pointers."""
    try:
        yield
    except InvalidRequest as error:
        error.errors = [replace(field_error, pointer=pointer + field_error.pointer) for field_error in error.errors]
        if error.detail.startswith("/"):
            error.detail = pointer + error.detail
        raise
