"""Ending streams and long polls when the server is told to stop.

uvicorn waits for open answers before it ends the application's lifespan, so the lifespan's own end would be too late: a
stream would hold the process until it is cut. uvicorn handles signals by plain handlers; this one stands before them.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_stop_signal(do: Callable[[], object]) -> Iterator[None]:
    """Call `do` in the signal handler, then whatever handled the signal before. Does nothing beside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {stop_signal: signal.getsignal(stop_signal) for stop_signal in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        do()
        if callable(before[number]):
            before[number](number, frame)

    taken = [stop_signal for stop_signal in SIGNALS if callable(before[stop_signal])]
    for stop_signal in taken:
        signal.signal(stop_signal, handle)
    try:
        yield
    finally:
        for stop_signal in taken:
            signal.signal(stop_signal, before[stop_signal])
