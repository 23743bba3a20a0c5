"""A cache of API keys that were looked up a moment ago, so that most requests need not query the store for their key.

A revoked key still stops working at once. Redis holds an edition of the keys, which changes with each revocation. Every
request gets the edition together with its rate-limit token (`service.edge.rate`). A key that was cached under another edition
is looked up again; while Redis is away, every key is. If Redis cannot be told of a revocation, the revocation takes
KEPT_FOR_S longer: by then no process has the key cached. Only if the process dies in between can a revoked key be accepted
for up to KEPT_FOR_S.
"""

from time import monotonic
from typing import NamedTuple

from service.store.keys import Known, digest

KEPT_FOR_S = 2.0
MAX_KEPT = 10_000


class Kept(NamedTuple):
    key: Known
    edition: bytes  # the edition that was read before the key
    until: float


class Keyring:
    """Cached keys by the digest of their text. The text itself and unknown keys are never cached."""

    now = staticmethod(monotonic)

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def find(self, text: str) -> Kept | None:
        known = self._kept.get(digest(text))
        return None if known is None or known.until < self.now() else known

    def keep(self, text: str, key: Known, edition: bytes, looked_at: float) -> None:
        """`looked_at`: the time by `now` at which the lookup began."""
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[digest(text)] = Kept(key, edition, looked_at + KEPT_FOR_S)

    def forget(self, text: str) -> None:
        self._kept.pop(digest(text), None)
