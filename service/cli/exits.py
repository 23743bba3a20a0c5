"""Exit statuses, which scripts may rely on. `ratchet --help` lists them, too."""

from ratchet_client.types import Status

OK = 0
REFUSED = 1  # the service refused, or something local failed
USAGE = 2  # the command line itself is wrong (typer's own)
UNREACHABLE = 3  # no service, or no key for it
JOB_FAILED = 4
JOB_CANCELLED = 5
JOB_PAUSED = 6
INTERRUPTED = 130

OF_STATUS: dict[Status, int] = {"succeeded": OK, "failed": JOB_FAILED, "cancelled": JOB_CANCELLED, "paused": JOB_PAUSED}

HELP = """\b
Exit status:
    0  done; a followed job has succeeded
    1  the service refused, or something here could not be done
    2  the command line is wrong
    3  no service was found, or it does not answer
    4  the followed job failed
    5  the followed job was cancelled
    6  the followed job paused; `ratchet resume JOB` goes on
    130  Ctrl-C
"""
