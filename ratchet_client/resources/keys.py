"""API keys: made, listed, revoked."""

from collections.abc import Iterable

from ratchet_client.resources.base import Resource, given, part
from ratchet_client.types import AuditEntry, Key, NewKey, Page, Scope


class Keys(Resource):
    def create_key(
        self,
        name: str,
        *,
        project: str | None = None,
        scopes: Iterable[Scope] | None = None,
        expires_in_s: float | None = None,
        requests_per_s: float | None = None,
        burst: int | None = None,
    ) -> NewKey:
        """A new API key; its text stands in this answer and nowhere else. By default it may do everything (`admin`),
        does not expire, and has the rate that the operator has set."""
        rate = {"requests_per_s": requests_per_s, "burst": burst} if (requests_per_s, burst) != (None, None) else None
        asked = {"project": project, "scopes": list(scopes) if scopes is not None else None}
        asked |= {"expires_in_s": expires_in_s, "rate": rate}
        body = {"name": name} | {field: value for field, value in asked.items() if value is not None}
        return self._transport.json("POST", "/v1/keys", json=body)

    def list_keys(self) -> Page[Key]:
        return self._get("/v1/keys")

    def delete_key(self, key_id: str) -> None:
        """Revoke a key; it stops working at once."""
        self._transport.request("DELETE", f"/v1/keys/{part(key_id)}")

    def rotate_key(self, key_id: str, *, grace_s: float | None = None) -> NewKey:
        """A new key in place of this one, which works for `grace_s` seconds more (default: a day)."""
        return self._transport.json("POST", f"/v1/keys/{part(key_id)}/rotate", json=given(grace_s=grace_s))

    def audit_log(
        self, *, key_id: str | None = None, object_id: str | None = None, after: str | None = None, limit: int = 20
    ) -> Page[AuditEntry]:
        """Which key changed what, newest first."""
        return self._get("/v1/audit", given(key_id=key_id, object_id=object_id, after=after, limit=limit))
