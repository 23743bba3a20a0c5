"""Logs and metrics: JSON or plain lines on stderr without secrets, and the few counters that several modules use."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from traceback import format_exception
from urllib.parse import unquote, urlsplit

from prometheus_client import Counter
from pydantic import SecretStr

from service.settings import WELL_KNOWN_SECRETS, Settings
from service.validation.words import nearest

log = logging.getLogger(__name__)

RINGS = Counter("ratchet_rings_total", "Rings of the doorbell", ["heard"])
RECONCILED = Counter("ratchet_reconciled_total", "Jobs that the reconciler settled or rang for", ["move"])
WEBHOOKS = Counter("ratchet_webhook_attempts_total", "Attempts to deliver to webhooks", ["outcome"])
for outcome in ("delivered", "retried", "failed"):
    WEBHOOKS.labels(outcome)

STRUCK = "***"
_PATTERNS = (
    (re.compile(r"tml-[A-Za-z0-9_-]{8,}"), f"tml-{STRUCK}"),
    (re.compile(r"whsec_[A-Za-z0-9+/=]{8,}"), f"whsec_{STRUCK}"),
    (
        re.compile(r"(?i)(authorization|x-api-key)(['\"]?\s*[:=]\s*['\"]?)((?:bearer|basic|token)\s+)?[^\s,'\"]+"),
        rf"\1\2\3{STRUCK}",
    ),
    (re.compile(r"(?i)\b(bearer)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {STRUCK}"),
    (re.compile(r"(://[^\s:/@]*:)[^\s@/]+@"), rf"\1{STRUCK}@"),
)


class Scrubber:
    """Removes API keys, passwords in URLs, and the values of all secrets in the settings."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._secrets = sorted(_secrets_of(settings), key=len, reverse=True) if settings else []

    def __call__(self, text: str) -> str:
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        for secret in self._secrets:
            text = text.replace(secret, STRUCK)
        return text


def _secrets_of(settings: Settings) -> set[str]:
    """The secrets' values, except short and well-known words, which also occur in harmless text."""
    secrets = [*settings.grader_secrets.values(), *settings.rollout_keys.values(), settings.bootstrap_key]
    texts = {secret.get_secret_value() for secret in secrets if isinstance(secret, SecretStr)}
    for url in (settings.sql_url, settings.redis_url.get_secret_value()):
        with suppress(ValueError):  # not a URL: connecting to it will report that
            password = urlsplit(url).password or ""
            texts |= {password, unquote(password)}
    return {text for text in texts if len(text) >= 6 and text not in WELL_KNOWN_SECRETS}


def one_line(text: str) -> str:
    """The text as a single line in which nothing drives a terminal: what cannot be printed is written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text.rstrip())


class PlainFormatter(logging.Formatter):
    """One line a record, for people; the lines of a trace stand behind a bar. So no foreign text forges a record."""

    def __init__(self, scrub: Scrubber) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        self._scrub = scrub

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = record.getMessage(), self.formatTime(record, self.datefmt)
        lines = [one_line(self._scrub(self.formatMessage(record)))]
        if record.exc_info and record.exc_info[0] is not None:
            trace = self._scrub("".join(format_exception(*record.exc_info)))
            lines += [f"  | {one_line(line)}" for line in trace.rstrip().split("\n")]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, for programs; the fields of `extra=` become members."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def __init__(self, scrub: Scrubber) -> None:
        super().__init__()
        self._scrub = scrub

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self._STANDARD}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(format_exception(*record.exc_info))
        return json.dumps({name: self._clean(value) for name, value in line.items()})

    def _clean(self, value: object) -> object:
        return value if value is None or isinstance(value, bool | int | float) else self._scrub(str(value))


# Our variables that are not settings: those of the CLI, the compose file, a worker's child and the tests.
NO_SETTINGS = {"URL", "API_KEY", "WORKER_ID", "API_IMAGE", "WORKER_IMAGE", "PUBLISH"}


def warn_of_unknown_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Log RATCHET_ variables that have no effect, because a misspelt one is easily overlooked."""
    for said in unknown_variables(environment):
        log.warning("%s", said)


def unknown_variables(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Of each RATCHET_ variable that has no effect, that this is so, and what was probably meant."""
    known = {name.upper() for name in Settings.model_fields} | NO_SETTINGS
    for variable in sorted(environment):
        prefix, name = variable[:8], variable[8:]
        if prefix == "RATCHET_" and name not in known and not name.startswith("TEST_"):
            meant = nearest(name, sorted(known))
            yield f"{variable} sets nothing" + (f"; did you mean {prefix}{meant}?" if meant else "")


def _one_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """As the standard library writes it, without the line of code."""
    return f"{filename}:{lineno}: {category.__name__}: {message}"


def configure_logging(settings: Settings, *, json_lines: bool | None = None) -> None:
    """Set up the root logger of this process. Default: JSON in production, plain lines in development."""
    if json_lines is None:
        json_lines = settings.log_format == "json" or (settings.log_format == "auto" and settings.environment == "production")
    scrub = Scrubber(settings)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(scrub) if json_lines else PlainFormatter(scrub))
    # Warnings of libraries become log lines, too: without secrets, and one line each.
    warnings.formatwarning = _one_warning
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries log only warnings and errors
    for name in ("service", "workers", "uvicorn.error"):
        logging.getLogger(name).setLevel(settings.log_level)
