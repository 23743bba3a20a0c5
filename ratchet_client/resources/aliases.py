"""Aliases: names such as digits@production, each of which points at a checkpoint."""

from ratchet_client.resources.base import Resource, given, part
from ratchet_client.types import Alias, AliasChange, Page


class Aliases(Resource):
    def promote(self, checkpoint: str, alias: str, *, expected: str | None = None, note: str | None = None) -> Alias:
        """Let `alias` (MODEL@ALIAS) point at a checkpoint (its id, or another alias: what that points at now).

        `expected`: the id of the checkpoint that it must point at now, or "none": it must be new; otherwise RatchetApiError
        `alias_moved` (409). What already points there is not changed.
        """
        body = {"checkpoint": checkpoint, **given(expected=expected, note=note)}
        return self._transport.json("PUT", f"/v1/aliases/{part(alias)}", json=body)

    def list_aliases(self, *, after: str | None = None, limit: int | None = None) -> Page[Alias]:
        return self._get("/v1/aliases", {"after": after, "limit": limit})

    def get_alias(self, alias: str) -> Alias:
        return self._get(f"/v1/aliases/{part(alias)}")

    def alias_history(self, alias: str, *, after: str | None = None, limit: int | None = None) -> Page[AliasChange]:
        """What it pointed at, newest first: who changed it, when and why. It outlives the alias."""
        return self._get(f"/v1/aliases/{part(alias)}/history", {"after": after, "limit": limit})

    def rollback_alias(self, alias: str, *, expected: str | None = None, note: str | None = None) -> Alias:
        """Promote the checkpoint that it pointed at before; repeated, the one before that."""
        path = f"/v1/aliases/{part(alias)}/rollback"
        return self._transport.json("POST", path, json=given(expected=expected, note=note))

    def delete_alias(self, alias: str, *, expected: str | None = None, note: str | None = None) -> None:
        """The checkpoint stays, and so does the history."""
        params = {"expected": expected, "note": note}
        self._transport.request("DELETE", f"/v1/aliases/{part(alias)}", params=params)
