"""The blob store: a folder. A rename makes a blob appear, whole or not at all; it is on disk when commit_* returns.

With a bucket (RATCHET_BLOB_URL) the blobs are there: commit_* returns when the blob is in the bucket, too, and the folder is
this machine's cache. Blobs never change, so that a cache needs no more than `fetch`, which downloads what is not here.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from threading import Lock
from uuid import uuid4
from weakref import WeakValueDictionary

from service.errors import BucketRefused, BucketUnavailable, DiskFull
from service.store.bucket import Bucket

log = logging.getLogger(__name__)

_fetching = WeakValueDictionary[str, Lock]()  # by path, while a blob is downloaded

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # the disk is full, or this user's quota is used up
TEMPORARY = "tmp"  # beside the blobs, on the same file system, so that a rename need not copy


@contextmanager
def room_on(disk: str) -> Iterator[None]:
    """Wrap code that writes to `disk`: if it has no room, raises DiskFull, naming the disk, instead of the system's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full(disk) from error


def disk_full(disk: str) -> DiskFull:
    hint = "whoever runs the service makes room there; deleting checkpoints and datasets that nobody needs does, too"
    return DiskFull(f"{disk} is full; nothing of this request was stored", hint=hint)


class Blobs:
    """Files and folders under `root`, and in the bucket if there is one, named by relative paths with forward slashes.

    What writes and reads raises BucketUnavailable and BucketRefused.
    """

    def __init__(self, root: Path, bucket: Bucket | None = None) -> None:
        self.root, self.bucket = root.absolute(), bucket

    def path(self, relative: str) -> Path:
        """The absolute path of a blob on this machine, whether it is here or not: `fetch` is what readers want.

        Raises ValueError if it is not plain (dots) or leaves the store by a link.
        """
        pure = PurePosixPath(relative)
        parts = relative.split("/")
        if pure.is_absolute() or "\\" in relative or "\0" in relative or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"a blob is named by a plain relative path, got {relative!r}")
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"blob {relative!r} leads out of the blob store")
        return path

    def fetch(self, relative: str, *, anew: bool = False) -> Path:
        """The absolute path of a blob, downloaded if it is not here. If it is nowhere, nothing is at that path.

        `anew`: what is here is broken; with a bucket it is replaced.
        """
        path = self.path(relative)
        if self.bucket is None:
            return path
        if anew:
            self._delete_here(path)
        with _fetching.setdefault(str(path), Lock()):  # of many that want it one downloads it
            with suppress(FileNotFoundError):
                os.utime(path)  # it is in use: see `unused`
                return path
            folder = self.temporary_dir()
            try:
                if self.bucket.get(relative, folder / "blob"):
                    _fsync_all(folder / "blob")
                    self._rename(folder / "blob", relative)
            except FileExistsError:
                pass  # another process was faster
            finally:
                self.discard(folder)
            return path

    def temporary_dir(self, attempt: tuple[str, int] | None = None) -> Path:
        """Create a private folder to write into. If it is left behind, it is swept after a day.

        `attempt` (the name of its owner, its number) lets a later attempt remove the folder sooner, see `discard_before`.
        """
        name = uuid4().hex if attempt is None else f"{attempt[0]}.{attempt[1]}.{uuid4().hex}"
        path = self.root / TEMPORARY / name
        path.mkdir(parents=True, mode=0o700)
        return path

    def commit_dir(self, temporary: Path, relative: str) -> Path:
        """Make a folder a blob: fsync all of it, rename it, fsync the parent. Raises FileExistsError if the name is taken."""
        _fsync_all(temporary)
        return self._commit(temporary, relative)

    def commit_file(self, temporary: Path, relative: str) -> Path:
        """Make a file a blob, as commit_dir does with a folder."""
        _fsync_all(temporary)
        return self._commit(temporary, relative)

    def _commit(self, temporary: Path, relative: str) -> Path:
        self._refuse_taken(relative)
        if self.bucket is not None:
            self.bucket.put(temporary, relative)
        return self._rename(temporary, relative)

    def delete(self, relative: str) -> None:
        """Remove a file or folder, and its parents if empty. A missing one is no error: two processes may sweep at once.

        A bucket that does not obey is no error either: its rows are deleted already, and `sweep` finds it again.
        """
        path = self.path(relative)
        if self.bucket is not None:
            try:
                self.bucket.delete(relative)
            except (BucketUnavailable, BucketRefused) as error:
                log.warning("%s is not removed yet: %s", relative, error.detail)
        self._delete_here(path)

    def _delete_here(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            # One rename hides it first, so that nobody reads half a checkpoint.
            doomed = self.root / TEMPORARY / uuid4().hex
            doomed.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.rename(doomed)
            except FileNotFoundError:
                return
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def discard(self, temporary: Path) -> None:
        """Remove a temporary file or folder that did not become a blob."""
        if not temporary.absolute().is_relative_to(self.root / TEMPORARY):
            raise ValueError(f"{temporary} is not a temporary path of this blob store")
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)

    def discard_before(self, owner: str, attempt: int) -> None:
        """Remove the temporary folders of this owner's earlier attempts, which have died or lost their lease."""
        for path in (self.root / TEMPORARY).glob(f"{owner}.*"):
            if int(path.name.split(".")[1]) < attempt:
                self.discard(path)

    @property
    def free(self) -> int:
        """Bytes left on the file system."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    def unclaimed(self, claimed: set[str]) -> Iterator[str]:
        """Relative paths of the topmost blobs that neither are in `claimed` (relative paths) nor contain anything in it."""
        ancestors = {str(parent) for path in claimed for parent in PurePosixPath(path).parents}
        pending = [self.root] if self.root.is_dir() else []
        while pending:
            for entry in sorted(pending.pop().iterdir()):
                relative = entry.relative_to(self.root).as_posix()
                if relative == TEMPORARY or relative in claimed:
                    continue
                if relative in ancestors or entry.parent == self.root:
                    pending.extend([entry] if entry.is_dir() and not entry.is_symlink() else [])
                else:
                    yield relative

    def unused(self, claimed: set[str], since: float) -> Iterator[str]:
        """With a bucket: the folders (checkpoints) that are cached here and that nobody fetched since `since` (Unix time)."""
        for relative in claimed if self.bucket is not None else ():
            path = self.path(relative)
            with suppress(FileNotFoundError):
                if path.is_dir() and path.stat().st_mtime < since:
                    yield relative

    def forget(self, relative: str) -> None:
        """Remove what is on this machine, and nothing in the bucket."""
        self._delete_here(self.path(relative))

    def _refuse_taken(self, relative: str) -> None:
        if self.path(relative).exists():
            raise FileExistsError(f"blob {relative!r} exists; blobs are never overwritten")

    def _rename(self, temporary: Path, relative: str) -> Path:
        self._refuse_taken(relative)
        target = self.path(relative)
        fresh = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(f"blob {relative!r} exists; blobs are never overwritten") from None
        for folder in [target.parent, *(parent.parent for parent in fresh)]:
            _fsync(folder)
        return target


def _fsync_all(blob: Path) -> None:
    for path in [*blob.rglob("*"), blob] if blob.is_dir() else [blob]:
        _fsync(path)
    if blob.is_dir():
        blob.chmod(0o755)


def _fsync(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path.name} is a link; blobs hold plain files only")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
