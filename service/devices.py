"""Detects this machine's accelerators without torch."""

import os
from pathlib import Path

GPU_NODES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers


def shows_gpu() -> bool:
    return any(Path(node).exists() for node in GPU_NODES)


def count_gpus() -> int:
    """How many GPUs this process may use. AMD's are not counted: 1 if there are any."""
    shown = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        shown = min(shown, len([name for name in chosen.split(",") if name.strip()]))
    return max(1, shown)


def missing_gpu(device: str) -> str | None:
    """An error message if RATCHET_DEVICE cannot be used on this machine, else None."""
    if device != "cuda" or shows_gpu():
        return None
    return (
        f"RATCHET_DEVICE is cuda, and this machine shows no GPU ({' and '.join(GPU_NODES)} are missing); "
        "set it to cpu or auto, or install the GPU's driver (in a container: pass the GPU on)"
    )
