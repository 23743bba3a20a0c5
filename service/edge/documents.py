"""Parse JSON and YAML from callers: plain JSON values, no duplicate keys, nothing that databases or the stack cannot hold."""

import json
from codecs import BOM_UTF8
from collections.abc import Callable
from functools import partial
from typing import Any

import yaml

from service.errors import BodyTooLarge, Malformed, RatchetError
from service.spec.storable import MAX_DEPTH, not_storable
from service.validation import invalid
from service.validation.core_yaml import CoreLoader, DuplicateKey, events
from service.validation.strict_json import MAX_VALUES, BadJson, decoded, no_key_twice, read

MAX_KEYS = 2000  # of one object: validation reports an error for each unknown key


def parse_json(raw: bytes) -> Any:
    """Parse and check JSON. Raises Malformed (line, column), InvalidRequest (pointer), BodyTooLarge (MAX_VALUES, MAX_KEYS)."""
    return _check(read_json(raw, partial(json.loads, object_pairs_hook=no_key_twice), MAX_VALUES))


def read_json(raw: bytes, loads: Callable[[str], Any], max_values: int | None = None) -> Any:
    """Parse JSON with `loads`, without checks. Raises Malformed with line and column, BodyTooLarge above `max_values`."""
    try:
        return read(_content(raw, "JSON"), loads, max_values)
    except BadJson as error:
        raise _malformed("JSON", error) from None


def _content(raw: bytes, kind: str) -> bytes:
    if not raw.strip():
        raise Malformed(f"the body is empty; {kind} is expected", code="empty_body")
    return raw.removeprefix(BOM_UTF8)


def _malformed(kind: str, error: BadJson) -> RatchetError:
    match error.reason:
        case "too_many":
            return BodyTooLarge(f"a body may hold {error.what} values", hint="upload many rows as a dataset: POST /v1/datasets")
        case "too_deep":
            return _too_deep()
        case "number":
            return _too_long()
        case "key_twice":
            return Malformed(f"the key {error.what!r} stands twice in one object", code="duplicate_key")
    what = f"not UTF-8 (byte 0x{error.what})" if error.reason == "encoding" else error.what
    detail = f"the body is not {kind}: line {error.line}, column {error.column}: {what}"
    return Malformed(detail, line=error.line, column=error.column)


def _too_long() -> Malformed:
    return Malformed("the body holds an integer of more than 4300 digits")


def _too_deep() -> Malformed:
    return Malformed(f"the body is nested more than {MAX_DEPTH} levels deep", code="too_deep")


def _check(data: Any) -> Any:
    _check_shape(data)
    if errors := not_storable(data):
        raise invalid(errors)
    return data


def _check_shape(value: Any, depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise BodyTooLarge(f"an object may have {MAX_KEYS} keys, one has {len(value)}")
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(below, dict | list):
            _check_shape(below, depth + 1)


def canonical(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# ---------------------------------------------------------------- YAML


def parse_yaml(raw: bytes) -> Any:
    """Parse and check YAML. Raises Malformed (line, column), InvalidRequest (pointer), BodyTooLarge (MAX_KEYS)."""
    try:
        text = decoded(_content(raw, "YAML"))
        _check_events(text)
        data = yaml.load(text, Loader=CoreLoader)
    except BadJson as error:
        raise _malformed("YAML", error) from None
    except DuplicateKey as error:
        raise _at(error.problem_mark, str(error.problem), "duplicate_key") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _at(mark, ", ".join(filter(None, (error.context, error.problem)))) from None
    except yaml.YAMLError as error:
        raise Malformed(f"the body is not YAML: {str(error).splitlines()[0]}") from None
    except ValueError:
        raise _too_long() from None
    return _check(data)


def _check_events(text: str) -> None:
    """Refuse tags, too deep nesting and aliases before any value is built."""
    depth = 0
    for event in events(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_deep()


def _at(mark: Any, what: str, code: str | None = None) -> Malformed:
    if mark is None:
        return Malformed(f"the body is not YAML: {what}", code=code)
    line, column = mark.line + 1, mark.column + 1
    return Malformed(
        f"the body is not YAML that is taken: line {line}, column {column}: {what}", code=code, line=line, column=column
    )
