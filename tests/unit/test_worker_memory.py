"""What a worker's parent says of its memory; nvidia-smi is a script of the test's own, which prints what the real one does."""

import os
import subprocess
import sys
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest

from workers import memory


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_resident_memory_of_the_process_is_counted() -> None:
    before = memory.taken(gpus=False)
    assert set(before) == {"process"} and before["process"] > 10_000_000
    with mmap(-1, 50_000_000) as ballast:  # new pages, not what this process has freed
        for page in range(0, len(ballast), PAGESIZE):
            ballast[page] = 1
        assert memory.taken(gpus=False)["process"] - before["process"] > 0.9 * len(ballast)


def test_a_process_that_has_ended_takes_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert memory._resident(process.pid) == 0 < memory._resident(os.getpid())


def test_the_memory_of_all_gpus_is_summed(nvidia_smi: Path) -> None:
    script(nvidia_smi, 'test "$1" = --query-gpu=memory.used,memory.total && printf "1024, 81559\\n3, 81559\\n"')
    found = memory.taken(gpus=True)
    assert (found["gpu_used"], found["gpu_total"]) == (1027 * 2**20, 2 * 81559 * 2**20)


@pytest.mark.parametrize("says", ["exit 9", "echo '[N/A], [N/A]'", "exit 0"])
def test_gpus_that_nvidia_smi_does_not_know_have_no_number(nvidia_smi: Path, says: str) -> None:
    script(nvidia_smi, says)
    assert set(memory.taken(gpus=True)) == {"process"}
