"""Parse JSON bodies of many megabytes that are mostly arrays of numbers.

A parser written in C blocks all other threads until it is done. So Python walks the document down to its innermost arrays,
and only these are parsed in C, one by one: other requests run in between. NaN and Infinity are accepted, spelled as Python
writes them.
"""

from json.decoder import JSONArray, JSONDecoder  # pyright: ignore[reportAttributeAccessIssue]
from json.scanner import py_make_scanner  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

import orjson

from service.edge.documents import read_json
from service.errors import BodyTooLarge, Malformed
from service.validation.strict_json import LONE_SURROGATE, has_lone_surrogate, no_key_twice

MAX_PARTS = 2**18  # arrays, objects and strings: a few bytes of JSON for one of them become about a hundred in memory


def parse_arrays(raw: bytes) -> Any:
    """Parse a body. Raises Malformed with line and column, or BodyTooLarge above MAX_PARTS."""
    return read_json(raw, lambda text: _Decoder().decode(text))


class _Decoder(JSONDecoder):
    """A decoder for one document."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self._in_c = self.scan_once
        self._string = self.parse_string
        self.parse_array, self.parse_string = self._array, self._text
        self.scan_once = py_make_scanner(self)
        self._parts = 0

    def _array(self, state: tuple[str, int], scan_once: Any) -> tuple[list[Any], int]:
        self._count()
        text, begin = state
        below = text.find("[", begin)
        end = text.find("]", begin, len(text) if below < 0 else below)
        if end < 0 or text.find('"', begin, end) >= 0 or text.find("{", begin, end) >= 0:
            return JSONArray(state, scan_once)
        try:
            return orjson.loads(text[begin - 1 : end + 1]), end + 1
        except orjson.JSONDecodeError:  # NaN or an error; the C scanner accepts NaN and says where an error is
            return self._in_c(text, begin - 1)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count()
        for key, _ in pairs:
            _whole(key)
        return no_key_twice(pairs)

    def _text(self, *state: Any) -> tuple[str, int]:
        self._count()
        text, end = self._string(*state)
        _whole(text)
        return text, end

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BodyTooLarge(
                f"the body holds more than {MAX_PARTS} arrays, objects and texts; send tensors: application/vnd.safetensors"
            )


def _whole(text: str) -> None:
    if has_lone_surrogate(text):
        raise Malformed(f"the body holds {LONE_SURROGATE}", code="not_storable")
