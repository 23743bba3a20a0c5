"""A checkpoint folder's manifest: the size and sha256 of each file, so that a torn or altered file is detected.

model/                  a plain transformers folder, or a plain peft adapter
optimizer.safetensors   AdamW's moments, and float32 masters of bfloat16 weights
trainer.json            how many optimizer steps were done
manifest.json           written by this module; the loops add their own files
"""

import hashlib
from pathlib import Path
from typing import Any

import orjson

from service.errors import RatchetError
from service.store.bucket import MANIFEST


class CheckpointBroken(RatchetError):
    """The folder differs from what was written: use the checkpoint before it."""

    code = "checkpoint_broken"


def write_manifest(folder: Path) -> str:
    """Write the manifest, which lists every file of the folder. Returns the manifest's own sha256."""
    files = {
        name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size}
        for name, path in _files(folder).items()
        if name != MANIFEST
    }
    body = orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    (folder / MANIFEST).write_bytes(body)
    return hashlib.sha256(body).hexdigest()


def verify(folder: Path, manifest_sha256: str | None = None) -> None:
    """Raise CheckpointBroken unless the folder holds exactly the files of its manifest, byte for byte.

    With `manifest_sha256`, the manifest itself must have that sha256.
    """
    expected = _read_manifest(folder, manifest_sha256)
    present = _files(folder)
    for name, entry in expected.items():
        if name not in present:
            raise CheckpointBroken(f"{folder.name}: {name} is missing")
        size = present[name].stat().st_size
        if size != entry["size_bytes"]:
            raise CheckpointBroken(f"{folder.name}: {name} has {size} bytes, written were {entry['size_bytes']}")
        if _sha256(present[name]) != entry["sha256"]:
            raise CheckpointBroken(f"{folder.name}: {name} was altered, its sha256 is not that of the manifest")
    if strangers := present.keys() - expected.keys() - {MANIFEST}:
        raise CheckpointBroken(f"{folder.name}: {min(strangers)} is not in the manifest")


def _read_manifest(folder: Path, manifest_sha256: str | None) -> dict[str, Any]:
    try:
        body = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointBroken(f"{folder.name}: there is no readable {MANIFEST} ({error.strerror})") from None
    if manifest_sha256 is not None and hashlib.sha256(body).hexdigest() != manifest_sha256:
        raise CheckpointBroken(f"{folder.name}: {MANIFEST} is not the one that was written")
    try:
        files: dict[str, Any] = orjson.loads(body)["files"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise CheckpointBroken(f"{folder.name}: {MANIFEST} is not a manifest") from None
    return files


def _files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointBroken(f"{folder.name}: {name} is a link; a checkpoint holds plain files")
        if path.is_file():
            files[name] = path
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
