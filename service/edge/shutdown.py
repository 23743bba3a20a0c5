"""Ending streams and long polls when the server is told to stop.

uvicorn waits for open answers before it ends the application's lifespan. Ending streams there would be too late: a stream
would keep the process alive until it is cut. uvicorn uses plain signal handlers, and this handler runs before them.
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
    """On a stop signal call `do`, then the previous handler. Does nothing outside the main thread."""
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
