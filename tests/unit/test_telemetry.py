import json
import logging
import subprocess
import sys

import pytest
from pydantic import SecretStr

from service.settings import Settings
from service.telemetry import JsonFormatter, PlainFormatter, Scrubber

SETTINGS = Settings(environment="development", grader_secrets={"mine": SecretStr("hunter2-hunter2")})


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("key tml-abcdefghijklmnop0123456789_-ABCDEFGHIJKLMNOPQ sent", "key tml-*** sent"),
        ("Authorization: Bearer abc.def-0123456789", "Authorization: Bearer ***"),
        ("authorization=Basic dXNlcjpwYXNz, next", "authorization=Basic ***, next"),
        ('{"X-API-Key": "whatever it is"}', '{"X-API-Key": "*** it is"}'),
        ("a bearer 0123456789abcdef came", "a bearer *** came"),
        ("the task basic arithmetic", "the task basic arithmetic"),
        ("postgresql+psycopg://ratchet:s3cret@db/x", "postgresql+psycopg://ratchet:***@db/x"),
        ("redis://:s3cret@host:6379/0", "redis://:***@host:6379/0"),
        ("signed with hunter2-hunter2", "signed with ***"),
        ("http://127.0.0.1:8000/v1/jobs answered", "http://127.0.0.1:8000/v1/jobs answered"),
    ],
)
def test_secrets_are_struck_out(text: str, clean: str) -> None:
    assert Scrubber(SETTINGS)(text) == clean


def test_json_lines_are_json_and_clean_in_every_field() -> None:
    try:
        raise ValueError("cannot reach redis://:s3cret@host")
    except ValueError as error:
        record = logging.LogRecord(
            "service.x", logging.ERROR, "", 1, "no %s", ("luck",), (ValueError, error, error.__traceback__)
        )
    record.job_id, record.key = "job_1", "tml-abcdefghijklmnop"
    line = json.loads(JsonFormatter(Scrubber(SETTINGS)).format(record))
    assert (line["level"], line["message"], line["job_id"], line["key"]) == ("ERROR", "no luck", "job_1", "tml-***")
    assert "s3cret" not in line["exception"]
    assert "redis://:***@host" in line["exception"]


def test_plain_lines_are_clean_down_to_the_traceback() -> None:
    try:
        raise ValueError("hunter2-hunter2")
    except ValueError as error:
        record = logging.LogRecord("service.x", logging.ERROR, "", 1, "failed", (), (ValueError, error, error.__traceback__))
    line = PlainFormatter(Scrubber(SETTINGS)).format(record)
    assert "ValueError: ***" in line
    assert "hunter2" not in line


FORGED = "refused\n09:00:00 ERROR   service.x: forged\r\x85\u2028\x1b[31m\x9b31m\x7f\u202eend"


def test_no_text_forges_a_line_or_drives_a_terminal() -> None:
    """An answer of a reward service, for example, stands in the message and in the trace."""
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        trace = (ValueError, error, error.__traceback__)
        record = logging.LogRecord("service.x", logging.ERROR, "", 1, "judge: %s", (FORGED,), trace)
    first, *rest = PlainFormatter(Scrubber(SETTINGS)).format(record).split("\n")
    assert first.endswith(r"judge: refused\n09:00:00 ERROR   service.x: forged\r\x85\u2028\x1b[31m\x9b31m\x7f\u202eend")
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)
    assert any("forged" in line for line in rest)
    line = JsonFormatter(Scrubber(SETTINGS)).format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == f"judge: {FORGED}"


def test_a_warning_of_a_library_is_a_log_line_without_secrets() -> None:
    program = """
import warnings
from pydantic import SecretStr
from service.settings import Settings
from service.telemetry import configure_logging
configure_logging(Settings(grader_secrets={"mine": SecretStr("hunter2-hunter2")}), json_lines=JSON)
warnings.warn("hunter2-hunter2\\nforged", FutureWarning)
"""
    for as_json in (False, True):
        command = [sys.executable, "-c", program.replace("JSON", str(as_json))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        [line] = done.stderr.splitlines()
        assert "FutureWarning: ***" in line and "py.warnings" in line and "hunter2" not in line
        assert (json.loads(line)["level"] if as_json else line.split()[1]) == "WARNING"
