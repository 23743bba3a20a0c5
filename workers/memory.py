"""A worker's memory use, measured by its parent without torch."""

import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from billiard.process import active_children

log = logging.getLogger(__name__)

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits")
ANSWERS_WITHIN_S = 5.0


def taken(*, gpus: bool) -> dict[str, int]:
    """In bytes. `process`: resident memory of the parent and its training process. If nvidia-smi shows GPUs: `gpu_used` and
    `gpu_total`, summed over all GPUs of this machine or container, whoever uses them."""
    pids = [os.getpid(), *(child.pid for child in active_children())]
    return {"process": sum(map(_resident, pids)), **(_of_gpus() if gpus else {})}


def _resident(pid: int) -> int:
    with suppress(OSError, IndexError):  # the process has just ended, or this is not Linux
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _of_gpus() -> dict[str, int]:
    try:
        told = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=ANSWERS_WITHIN_S, check=True).stdout
        used, total = zip(*(map(int, line.split(",")) for line in told.splitlines()), strict=True)
    except (OSError, subprocess.SubprocessError, ValueError) as error:  # not NVIDIA's GPUs, or [N/A]
        log.debug("the memory of the GPUs is not known: %s", error)
        return {}
    return {"gpu_used": sum(used) * 2**20, "gpu_total": sum(total) * 2**20}
