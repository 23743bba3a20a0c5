"""Checkpoints: listed, downloaded, kept, deleted."""

from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from ratchet_client import archive
from ratchet_client.errors import RatchetError
from ratchet_client.resources.base import CHUNK_BYTES, Resource, given, part
from ratchet_client.types import Checkpoint, Page

OPTIMIZER = "optimizer.safetensors"


class Checkpoints(Resource):
    def list_checkpoints(
        self, *, job_id: str | None = None, after: str | None = None, limit: int | None = None
    ) -> Page[Checkpoint]:
        return self._get("/v1/checkpoints", {"job_id": job_id, "after": after, "limit": limit})

    def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """By its id, or by an alias that points at it."""
        return self._get(f"/v1/checkpoints/{part(checkpoint_id)}")

    def best_checkpoint(self, job_id: str) -> Checkpoint:
        """The job's checkpoint with the best evaluation, by the rule of its spec: early_stopping, else keep_best, else the
        highest mean reward, else the lowest loss. Raises RatchetApiError (404) if none was evaluated when it was saved."""
        return self._get(f"/v1/jobs/{part(job_id)}/checkpoints/best")

    def download_checkpoint(self, checkpoint_id: str, directory: str | Path, *, optimizer: bool = True) -> Path:
        """Unpack a checkpoint into a new folder, whose `model/` peft or transformers load as it is. Returns the folder.

        An alias stands for the checkpoint that it points at when this begins.
        README.md in it is the checkpoint's card, which says so, and how it was trained.
        Only regular files below that folder are taken; their sha256 sums are compared with the checkpoint's manifest.
        `optimizer=False` leaves out the optimizer's state, which only a resume needs.
        """
        place = Path(directory).absolute()  # the folder appears by a rename, and `.` would go on meaning the one before
        if "@" in checkpoint_id:
            checkpoint_id = self.get_checkpoint(checkpoint_id)["id"]
        path, params = f"/v1/checkpoints/{part(checkpoint_id)}/archive", None if optimizer else {"optimizer": "false"}
        response = self._transport.request("GET", path, params=params, stream=True)
        with closing(response):
            card = None
            with suppress(RatchetError):  # an older service has none; the weights are there all the same
                card = self.checkpoint_card(checkpoint_id)
            without = () if optimizer else (OPTIMIZER,)
            try:
                archive.unpack(response.iter_bytes(CHUNK_BYTES), place, without=without, card=card)
            except httpx.TransportError as error:
                raise self._transport.unreachable(error) from error
        return Path(directory)

    def checkpoint_card(self, checkpoint_id: str) -> str:
        """What the checkpoint is, where it comes from and how to load it, as markdown."""
        response = self._transport.request("GET", f"/v1/checkpoints/{part(checkpoint_id)}/card")
        if not response.headers.get("Content-Type", "").startswith("text/markdown"):
            raise RatchetError(f"the card of {checkpoint_id} came as {response.headers.get('Content-Type')}, not as markdown")
        return response.text

    def delete_checkpoint(self, checkpoint_id: str) -> None:
        self._transport.request("DELETE", f"/v1/checkpoints/{part(checkpoint_id)}")

    def pin_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Keep it whatever comes, until `unpin_checkpoint`."""
        return self._transport.json("POST", f"/v1/checkpoints/{part(checkpoint_id)}/pin")

    def unpin_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return self._transport.json("POST", f"/v1/checkpoints/{part(checkpoint_id)}/unpin")

    def checkpoint_lineage(self, checkpoint_id: str) -> dict[str, Any]:
        """`data`: the checkpoint and those that it comes from, back to `base`, the model that the first job started from."""
        return self._get(f"/v1/checkpoints/{part(checkpoint_id)}/lineage")

    def delete_checkpoints(
        self,
        *,
        ids: Iterable[str] | None = None,
        job_id: str | None = None,
        older_than_s: float | None = None,
        keep_last: int | None = None,
        final: bool | None = None,
        dry_run: bool = True,
    ) -> dict[str, Any]:
        """Delete all that fit, save what is pinned or needed; by default only say what would go."""
        which = given(ids=None if ids is None else list(ids), job_id=job_id, older_than_s=older_than_s)
        body = {**which, **given(keep_last=keep_last, final=final), "dry_run": dry_run}
        return self._transport.json("POST", "/v1/checkpoints:delete", json=body)
