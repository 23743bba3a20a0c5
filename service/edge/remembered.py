"""A cache for one costly result. It keeps the result so long that computing takes a bounded part of the time."""

from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")

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
