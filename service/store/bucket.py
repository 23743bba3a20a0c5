"""A bucket that holds the blobs of all machines: S3 and what speaks its language, Google Cloud Storage, Azure (extra `s3`).

A blob is there when its last object is: a file is one object, a folder ends with its manifest, which names the other files. So
nobody reads half a folder, and a folder that `aws s3 sync` copied is as good as one that was written here.

Credentials come from the variables of the bucket's own command line tools. No text of an error holds more than the bucket's
URL and the code of the answer: headers and query strings can hold a signature.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson

from service.errors import BucketRefused, BucketUnavailable

MANIFEST = "manifest.json"  # in every blob that is a folder: {"files": {name: {"sha256", "size_bytes"}}}
PART_BYTES = 64 * 2**20  # one request; S3 takes at most 10,000 of them a file
RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=20)}
CLIENT: Any = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=120)}  # of one request
PLAIN = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
CODE = re.compile(r"<Code>(\w{1,60})</Code>")
STATUS = re.compile(r"status code: (\d{3})")
ABSENT = ("NoSuchKey", "BlobNotFound", "NotFoundError", "FileNotFoundError")
REFUSING = (
    *("401", "403", "404", *ABSENT),
    *("PermissionDeniedError", "PermissionError", "UnauthenticatedError", "UnknownConfigurationKeyError"),
)
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the path of a service account's file",
}


class Bucket:
    """The blobs below a URL such as s3://bucket/prefix. Safe to share between threads; each process opens its own.

    Methods raise BucketRefused (it is not there, or the credentials may not), and BucketUnavailable.
    """

    def __init__(self, url: str) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise BucketRefused(f"obstore is not installed ({error})", hint="pip install 'ratchet-rl[s3]'") from None
        self.url = url.rstrip("/")
        plain = any(
            os.environ.get(name, "").lower() in ("1", "true") for name in PLAIN
        )  # options of the client's would hide it
        try:
            self._objects: Any = from_url(self.url, retry_config=RETRIES, client_options=CLIENT | {"allow_http": plain})
        except (BaseError, OSError) as error:  # nobody was asked yet: another try would end the same way
            hint = f"see {VARIABLES[self.url.partition(':')[0]]}"
            raise BucketRefused(f"the bucket {self.url} cannot be opened: {type(error).__name__}", hint=hint) from None

    def put(self, path: Path, relative: str) -> None:
        """Upload a file or a folder with a manifest. It is there, whole, when this returns."""
        files = {relative: path}
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
            if MANIFEST not in names:
                raise ValueError(f"a folder in a bucket needs a {MANIFEST}; {relative!r} has none")
            files = {f"{relative}/{name}": path / name for name in sorted(names, key=lambda name: (name == MANIFEST, name))}
        import obstore

        with self._told():
            for key, file in files.items():
                obstore.put(self._objects, key, file, chunk_size=PART_BYTES, max_concurrency=2)

    def get(self, relative: str, into: Path) -> bool:
        """Download a blob to the path `into`, every file of a folder checked. False: it is not there, or not any more."""
        return self._get_file(relative, into) is not None or self._get_folder(relative, into)

    def _get_folder(self, relative: str, into: Path) -> bool:
        into.mkdir()
        if self._get_file(f"{relative}/{MANIFEST}", into / MANIFEST) is None:
            into.rmdir()
            return False
        for name, told in orjson.loads((into / MANIFEST).read_bytes())["files"].items():
            target = into / name
            if not target.resolve().is_relative_to(into.resolve()):
                raise BucketRefused(f"{self.url}: the manifest of {relative} names a file outside of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            got = self._get_file(f"{relative}/{name}", target)
            if got is None:
                return False  # it is being deleted
            if got != told["sha256"]:
                raise BucketUnavailable(f"{self.url}: {relative}/{name} came with another sha256 than its manifest's")
        return True

    def _get_file(self, key: str, target: Path) -> str | None:
        """The sha256 of what was written, in one request for each part; None: there is no such object."""
        import obstore

        digest, start = hashlib.sha256(), 0
        with target.open("wb") as file:
            try:
                with self._told(key):
                    found = obstore.get(self._objects, key)
                    size = found.meta["size"]
                    while start < size:
                        whole, end = size <= PART_BYTES, min(start + PART_BYTES, size)
                        part = found.bytes() if whole else obstore.get_range(self._objects, key, start=start, end=end)
                        digest.update(part)
                        start += file.write(part)
            except KeyError:
                target.unlink()
                return None
        return digest.hexdigest()

    def delete(self, relative: str) -> None:
        """Remove a blob, its last object first. One that is not there is no error."""
        import obstore

        with self._told():
            for key in (relative, f"{relative}/{MANIFEST}"):  # S3 does not say whether there was one; others may
                with suppress(FileNotFoundError):
                    obstore.delete(self._objects, key)
            rest = [each["path"] for batch in obstore.list(self._objects, prefix=relative) for each in batch]
            if rest := [key for key in rest if key.startswith(f"{relative}/")]:
                with suppress(FileNotFoundError):  # another process was faster
                    obstore.delete(self._objects, rest)

    def blobs(self, claimed: set[str]) -> tuple[set[str], dict[str, datetime]]:
        """Which of the claimed blobs are there; and those that nobody claims, each with its newest object's time."""
        import obstore

        there, others = set[str](), dict[str, datetime]()
        with self._told():
            for batch in obstore.list(self._objects):
                for each in batch:
                    blob = blob_of(each["path"])
                    if blob in claimed:
                        there.add(blob)
                    elif blob is not None:
                        others[blob] = max(others.get(blob, datetime.min.replace(tzinfo=UTC)), each["last_modified"])
        return there, others

    def probe(self) -> None:
        """Write, read and remove a small object: raises what is wrong."""
        import obstore

        key, text = f".doctor-{uuid4().hex}", b"ratchet"
        with self._told():
            obstore.put(self._objects, key, text)
            same = bytes(obstore.get_range(self._objects, key, start=0, end=len(text))) == text
            obstore.delete(self._objects, key)
        if not same:
            raise BucketUnavailable(f"{self.url} gives other bytes than it got")

    @contextmanager
    def _told(self, key: str | None = None) -> Iterator[None]:
        """Obstore's errors as ours; with a `key`, KeyError if the bucket is there and this object is not."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            said = str(error)
            code, status, token = CODE.search(said), STATUS.search(said), "token request" in said
            reason = code[1] if code else "no token for these credentials" if token else type(error).__name__
            if key is not None and reason in ABSENT:
                raise KeyError(key) from None
            refusals = {type(error).__name__, status[1] if status else ""}
            if not refusals.isdisjoint(REFUSING) or (token and "400" in refusals):  # 400: OAuth's code of a refused key
                hint = "see that the bucket exists, and that the service's credentials may list, read, write and delete in it"
                raise BucketRefused(f"the bucket {self.url} refuses: {reason}", hint=hint) from None
            raise BucketUnavailable(f"the bucket {self.url} does not answer as it should: {reason}") from None


def blob_of(key: str) -> str | None:
    """The blob that an object belongs to: datasets/FILE, checkpoints/JOB/CHECKPOINT/...; None: it is none of ours."""
    match key.split("/"):
        case ["datasets", name]:
            return f"datasets/{name}"
        case ["checkpoints", job, name, _, *_]:
            return f"checkpoints/{job}/{name}"
    return None
