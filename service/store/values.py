"""What a value becomes before it is stored, on both databases alike: SQLite takes more than PostgreSQL, and more than JSON has.

What callers send is refused long before; this is for what models, graders and libraries bring.
"""

import json
import re
from math import isfinite
from typing import Any

NUL_SHOWN = "\u2400"  # ␀, the picture of it
_UNFIT = re.compile("[\0\ud800-\udfff]")
_UNFIT_ESCAPED = re.compile(r"\\u(?:0000|d[89a-f])")  # as json writes them; and halves of characters beyond the first 65,536


def storable(text: str) -> str:
    """The text without NUL and lone surrogates, for which pictures stand then."""
    return _UNFIT.sub(lambda found: NUL_SHOWN if found[0] == "\0" else "\ufffd", text)


def dumps(value: Any) -> str:
    """JSON that both databases take: null for what is not finite, as in the metrics. Raises TypeError for what JSON has not."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # NaN, an infinity: seldom, so they are looked for only then
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
