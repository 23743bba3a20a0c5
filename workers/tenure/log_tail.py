"""The last log lines of an attempt, to find out why it failed."""

import logging
from collections import deque
from types import TracebackType
from typing import Self

from service.errors import Failure
from service.settings import Settings
from service.telemetry import Scrubber, one_line

LINES = 20
LONGEST_LINE = 500


class LogTail(logging.Handler):
    """Keeps the last lines of what this process logs inside the `with` block.

    Secrets are removed. Traces of exceptions are left out, because they may quote data that is not the owner's.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._scrub = Scrubber(settings)
        self._lines: deque[str] = deque(maxlen=LINES)
        self._format = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        record.message = record.getMessage()
        record.asctime = self._format.formatTime(record)
        self._lines.append(one_line(self._scrub(self._format.formatMessage(record)))[:LONGEST_LINE])

    def add_to(self, failure: Failure) -> Failure:
        """Add these lines to the failure, and remove secrets from its texts."""
        failure.log_tail = list(self._lines)
        failure.detail = self._scrub(failure.detail)
        failure.details = {
            name: self._scrub(value) if isinstance(value, str) else value for name, value in failure.details.items()
        }
        return failure
