"""`python -m service.local.tied PARENT COMMAND...`: become COMMAND, and be killed when the process PARENT ends.

The kernel does this however PARENT ends, even across exec. It works on Linux only; elsewhere COMMAND survives if its parent is
killed. This is a separate program because Python code between fork and exec is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(f"process {parent} has ended; not starting {command[0]}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
