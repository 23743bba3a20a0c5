"""Make values storable, alike on both databases: SQLite accepts values that PostgreSQL or JSON does not.

Such values from callers are refused earlier; this is for values from models, graders and libraries.
"""

import json
import re
from math import isfinite
from typing import Any

import orjson

NUL_SHOWN = "\u2400"  # ␀, the symbol for NUL
_UNFIT = re.compile("[\0\ud800-\udfff]")
_UNFIT_ESCAPED = re.compile(r"\\u(?:0000|d[89a-f])")  # as json escapes them; it also matches valid surrogate pairs


def storable(text: str) -> str:
    """The text with NUL replaced by U+2400 and lone surrogates by U+FFFD."""
    return _UNFIT.sub(lambda found: NUL_SHOWN if found[0] == "\0" else "\ufffd", text)


def dumps(value: Any) -> str:
    """JSON that both databases accept. NaN and infinities become null, as in metrics. Raises TypeError for non-JSON types."""
    try:  # five times as fast, and it writes null for NaN, too
        raw = orjson.dumps(value, option=orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME)
        if b"\\u0000" not in raw:
            return raw.decode()
    except TypeError:  # it refuses lone surrogates, long integers and keys that are no strings
        pass
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # NaN or an infinity: rare, so they are searched for only here
        return json.dumps(_clean(value))
    return json.dumps(_clean(value)) if _UNFIT_ESCAPED.search(text) else text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(name) if isinstance(name, str) else name: _clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value
