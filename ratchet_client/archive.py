"""Unpacks a checkpoint's tar while it arrives: only the regular files of its one folder."""

import errno
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from ratchet_client.errors import RatchetArchiveError

MANIFEST = "manifest.json"
OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO})  # not errors of the name


class Chunks(io.RawIOBase):
    """An iterator of bytes as a readable file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def unpack(chunks: Iterator[bytes], directory: Path, *, without: Collection[str] = (), card: str | None = None) -> None:
    """Fill `directory`, which must be absent or empty, atomically. The files `without` may be absent from the archive; `card`
    becomes its README.md.

    Raises RatchetArchiveError for a link, a device, a path that leads outside or is invalid, a duplicate file, or a file that
    the manifest does not list; OSError, with the name of the directory, if it cannot be written.
    """
    if directory.exists() and any(directory.iterdir()):
        raise RatchetArchiveError(f"{directory} is not empty: name a new folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _extract(chunks, temporary)
        _compare(temporary, without)
        if card is not None:
            (temporary / "README.md").write_text(card, "utf-8")
        temporary.chmod(0o755)
        temporary.replace(directory)  # also replaces an empty folder
    except (tarfile.TarError, ValueError) as error:  # ValueError: a name with a NUL, an invalid number
        raise RatchetArchiveError(f"the archive cannot be read: {error}") from error
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(chunks: Iterator[bytes], folder: Path) -> None:
    with tarfile.open(fileobj=io.BufferedReader(Chunks(chunks)), mode="r|") as archive:
        for member in archive:
            target = folder / _inside(member.name)
            if not (member.isdir() or (member.isreg() and not member.issparse())):
                raise RatchetArchiveError(f"the archive holds {member.name!r}, which is no regular file")
            try:
                (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
                file = None if member.isdir() else target.open("xb")
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                    raise
                raise RatchetArchiveError(f"the archive holds {member.name[:200]!r}, which no file can be called") from None
            if file is not None:
                with file, archive.extractfile(member) or io.BytesIO() as source:
                    shutil.copyfileobj(source, file)


def _inside(name: str) -> PurePosixPath:
    """The path inside the archive's one folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise RatchetArchiveError(f"the archive holds the path {name!r}, which leads outside")
    return path.relative_to(path.parts[0]) if path.parts else path


def _compare(folder: Path, without: Collection[str]) -> None:
    """Check that every file is exactly as the checkpoint's manifest says, and that there are no others. Those in `without` may
    be absent."""
    try:
        expected = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RatchetArchiveError(f"the archive holds no readable {MANIFEST}") from None
    unpacked = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    unpacked.pop(MANIFEST)
    if missing := sorted((expected.keys() ^ unpacked.keys()) - (set(without) - unpacked.keys())):
        raise RatchetArchiveError(f"the archive and its {MANIFEST} disagree about {missing[0]}")
    for name, path in unpacked.items():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]["sha256"]:
                raise RatchetArchiveError(f"{name} is not what was saved: its sha256 differs from that of the {MANIFEST}")
