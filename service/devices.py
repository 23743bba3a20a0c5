"""Detects this machine's accelerators without torch."""

from pathlib import Path

GPU_NODES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers


def shows_gpu() -> bool:
    return any(Path(node).exists() for node in GPU_NODES)


def missing_gpu(device: str) -> str | None:
    """An error message if RATCHET_DEVICE cannot be used on this machine, else None."""
    if device != "cuda" or shows_gpu():
        return None
    return (
        f"RATCHET_DEVICE is cuda, and this machine shows no GPU ({' and '.join(GPU_NODES)} are missing); "
        "set it to cpu or auto, or install the GPU's driver (in a container: pass the GPU on)"
    )
