"""Small caches: for one costly result, which is kept so long that computing takes a bounded part of the time; and for what was
seen a moment ago."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

TIMES_ITS_COST = 20.0


class Remembered(Generic[T]):
    """Keeps a result for 20 times as long as it took to get: however often it is asked, it costs a twentieth of one core."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._kept: tuple[T] | None = None
        self._until = 0.0

    def get(self, ask: Callable[[], T]) -> T:
        """The cached result, or a new one of `ask`. One thread at a time calls `ask`; the others wait for it."""
        with self._lock:
            started = self._clock()
            if self._kept is None or started >= self._until:
                self._kept = (ask(),)
                now = self._clock()
                self._until = now + TIMES_ITS_COST * (now - started)
            return self._kept[0]


class Recent(Generic[K, T]):
    """The newest `most` entries, each for `for_s` seconds. Safe to share between threads: each change is one of the dict's."""

    def __init__(self, most: int, for_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._most, self._for_s, self._clock = most, for_s, clock
        self._kept: OrderedDict[K, tuple[float, T]] = OrderedDict()

    def put(self, key: K, value: T) -> None:
        self._kept.pop(key, None)
        self._kept[key] = (self._clock() + self._for_s, value)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, key: K) -> T | None:
        until, value = self._kept.get(key, (0.0, None))
        return value if self._clock() < until else None
