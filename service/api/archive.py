"""A folder as a tar stream. It has only regular files, whose names unpack into one folder and nowhere else."""

import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 2**20
BLOCK = tarfile.BLOCKSIZE
END = b"\0" * (2 * BLOCK)


@dataclass(frozen=True)
class Entry:
    path: Path
    header: bytes
    size: int


@dataclass(frozen=True)
class Archive:
    """A tar archive whose content and size are known before the first byte is sent."""

    entries: list[Entry]

    @property
    def size(self) -> int:
        """Bytes of the whole archive: its Content-Length."""
        return sum(len(entry.header) + _padded(entry.size) for entry in self.entries) + len(END)

    def stream(self) -> Iterator[bytes]:
        """Raises OSError if a file was removed or changed its size. The connection then breaks, so no wrong archive arrives."""
        for entry in self.entries:
            yield entry.header
            yield from _content(entry)
        yield END


def archive_of(folder: Path, name: str, *, without: Collection[str] = ()) -> Archive:
    """The regular files below `folder`, as `name`/relative/path, in order. Links, special files and the paths in `without` are
    left out."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.relative_to(folder).as_posix() in without:
            continue
        stat = path.stat()
        info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
        info.size, info.mtime, info.mode = stat.st_size, int(stat.st_mtime), 0o644
        entries.append(Entry(path, info.tobuf(tarfile.PAX_FORMAT), stat.st_size))
    return Archive(entries)


def _content(entry: Entry) -> Iterator[bytes]:
    left = entry.size
    with os.fdopen(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while left:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{entry.path.name} became shorter while it was sent")
            left -= len(chunk)
            yield chunk
    yield b"\0" * (_padded(entry.size) - entry.size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
