"""What a process pays for memory that it takes again and again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from service.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def blocks():
    return [bytes([1]) * 4 * 2**20 for _ in range(5)]
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_freed_memory_is_taken_again_without_asking_the_kernel() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60)
        return int(done.stdout)

    assert faults("as by default") > 5000, "or this shows nothing"
    assert faults("kept") < 500
