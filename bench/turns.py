"""The side that is measured in a process of its own: one turn for each line that comes in, one line of JSON back. `peer.py` is
the other side. Torch and the standard library only, because interpreters without our packages import it."""

import ctypes
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWERS = sys.stdout


def quiet() -> None:
    """Whatever the libraries print stays out of the answers."""
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def tell(what: Any) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


def turn_asked() -> bool:
    return bool(sys.stdin.readline().strip())


def take_turns(run: Callable[[], object], model: Any) -> None:
    """Each starts without gradients."""
    tell("ready")
    while turn_asked():
        model.zero_grad(set_to_none=True)
        tell(spent(run))


def spent(run: Callable[[], object]) -> dict[str, float]:
    """Wall-clock and CPU seconds of a call, and the peak of the resident set beyond what was there before, in MB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    return {"wall_s": wall, "cpu_s": cpu, "extra_mb": (memory("VmHWM") - before) / 1000}


def memory(which: str) -> float:
    """Of this process, in kB."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition(which + ":")[2].split()[0]) * 1.024
