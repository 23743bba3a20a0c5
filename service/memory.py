"""What malloc does with freed memory, in a process that takes and frees blocks of megabytes all the time."""

import ctypes
from contextlib import suppress

KEPT_BYTES = 64 * 2**20  # of freed memory stay here; larger blocks than half of it are given back as ever
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Freed blocks wait for the next request. By default glibc returns large ones to the kernel at once, and for the next
    request gets each page anew, cleared: a quarter of the API's time for a loss request of 2 MiB. Nothing where no glibc is.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
