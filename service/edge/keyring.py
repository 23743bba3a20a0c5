"""Keys that were looked up a moment ago: most requests come from a key that came before, and need not ask the store again.

A revoked key stops at once all the same. Redis holds an edition of the keys, which is another one after each revocation, and
every request learns it with the token that counts it (`service.edge.rate`): a key that was looked up under another edition is
looked up anew, and so is every key while Redis is away. Where a revocation cannot be told to Redis, it takes KEPT_FOR_S longer:
by then nobody remembers the key. Only if the process dies in between may a key be taken for so long after it was revoked.
"""

from time import monotonic
from typing import NamedTuple

from service.store.keys import Known, digest

KEPT_FOR_S = 2.0
MAX_KEPT = 10_000


class Kept(NamedTuple):
    key: Known
    edition: bytes  # that was read before the key was
    until: float


class Keyring:
    """By the digest of their text. Keys that are not known are not kept, nor is any text."""

    now = staticmethod(monotonic)

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def find(self, text: str) -> Kept | None:
        known = self._kept.get(digest(text))
        return None if known is None or known.until < self.now() else known

    def keep(self, text: str, key: Known, edition: bytes, looked_at: float) -> None:
        """`looked_at`: when, of `now`, the looking began."""
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[digest(text)] = Kept(key, edition, looked_at + KEPT_FOR_S)

    def forget(self, text: str) -> None:
        self._kept.pop(digest(text), None)
