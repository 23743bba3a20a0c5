"""How aliases of checkpoints are written: MODEL@ALIAS, for example digits@production.

No id, no hub id and no tinker:// path has an @ there, so that each of them is told from an alias by its looks.
"""

import re

from service.errors import FieldError

PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,49}"
ALIAS = f"{PART}@{PART}"
RULE = (
    "an alias is MODEL@ALIAS, for example digits@production: each of the two 1 to 50 letters, digits, dots, underscores and "
    "hyphens, of which a letter or digit is the first"
)
_WHOLE = re.compile(ALIAS, re.ASCII)


def is_alias(name: str) -> bool:
    return _WHOLE.fullmatch(name) is not None


def wrong_alias(pointer: str, name: str) -> list[FieldError]:
    """An error if a new alias cannot have this name."""
    return [] if is_alias(name) else [FieldError(pointer, f"{RULE}; got {name[:200]!r}", "invalid_alias", name)]
