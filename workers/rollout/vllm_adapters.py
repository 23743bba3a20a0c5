"""The versions of a job's adapter on a vLLM server: each is a folder that both see, loaded under a name of its own.

A name is never used for other weights: it holds the job, the attempt and the version, and vLLM keeps prefixes by it. What an
attempt left behind that died is unloaded and deleted by the next one, or by any other job on that server once its own job has
ended.
"""

import asyncio
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from workers.rollout.vllm_server import Server

NAME = re.compile(r"ratchet-(job_[0-9a-z]+)-(\d+)-(\d+)")
CLOSE_S = 5.0  # for unloading, when the attempt is over

log = logging.getLogger(__name__)


class Weights(Protocol):
    """An adapter in training."""

    @property
    def updates(self) -> int:
        """Grows whenever the weights change."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write a plain peft adapter."""
        ...


class Adapters:
    """`folder` is where this process writes, `seen_as` its path on the server."""

    def __init__(
        self, server: Server, weights: Weights, *, job_id: str, attempt: int, folder: Path, seen_as: str | None = None
    ) -> None:
        self._server, self._weights, self._job_id, self._attempt = server, weights, job_id, attempt
        self._folder, self._seen_as = folder, (seen_as or str(folder.absolute())).rstrip("/")
        self._name: str | None = None  # of the version that is served
        self._stale: list[str] = []  # names that are to be unloaded
        self._reloading = asyncio.Lock()

    async def current(self) -> str:
        """The name of the weights as they are now, which are put onto the server if they changed."""
        name = f"ratchet-{self._job_id}-{self._attempt}-{self._weights.updates}"
        if name != self._name:
            self._write(name)
            if self._name is not None:
                self._stale.append(self._name)
            self._name = name
            await self._load(name)
            await self._drop_stale()
        return name

    async def reload(self, name: str) -> None:
        """Load it again: the server has lost it, most likely because it was started anew."""
        async with self._reloading:
            if name not in [model["id"] for model in await self._server.models()]:
                log.warning("the vLLM server at %s has lost %s; loading it again", self._server.spec.url, name)
                await self._load(name)

    async def sweep(self, ended: Callable[[str], bool]) -> list[str]:
        """Unload and delete what earlier attempts at this job left behind, and jobs that have ended. Returns the names."""
        there = {model["id"] for model in await self._server.models()}
        there |= {path.name.lstrip(".") for path in self._folder.iterdir()} if self._folder.is_dir() else set()
        left = sorted(name for name in there if self._is_left_over(name, ended))
        self._stale += left
        await self._drop_stale()
        return left

    async def close(self) -> None:
        """Unload what this attempt loaded, as far as the server answers soon."""
        if self._name is not None:
            self._stale.append(self._name)
            self._name = None
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._drop_stale()
        except TimeoutError:
            log.warning("the vLLM server at %s keeps %s", self._server.spec.url, ", ".join(self._stale))
            for name in self._stale:
                self._delete(name)

    async def _load(self, name: str) -> None:
        await self._server.load(name, f"{self._seen_as}/{name}")

    async def _drop_stale(self) -> None:
        """A name whose unloading fails stays in the list, and is tried again at the next version."""
        for name in list(self._stale):
            if await self._server.unload(name):
                self._delete(name)  # not before: the server may read it again while the name is there
                self._stale.remove(name)

    def _is_left_over(self, name: str, ended: Callable[[str], bool]) -> bool:
        if (match := NAME.fullmatch(name)) is None:
            return False
        return int(match[2]) < self._attempt if match[1] == self._job_id else ended(match[1])

    def _write(self, name: str) -> None:
        """Under another name first, so that no half of a folder ever has this one."""
        self._delete(name)
        temporary = self._folder / f".{name}"
        temporary.mkdir(parents=True)
        self._weights.save_adapter(temporary)
        temporary.rename(self._folder / name)

    def _delete(self, name: str) -> None:
        for path in (self._folder / name, self._folder / f".{name}"):
            shutil.rmtree(path, ignore_errors=True)
