"""Forking: a new job from an old one's spec and checkpoint. An ended job never changes; to try again, fork it."""

from typing import Any

from service.store.tables import Job


def forked_spec(parent: Job, from_checkpoint: str | dict[str, Any] | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The spec of the fork: the parent's submitted spec with the overrides merged in (RFC 7396: null removes a key).

    It starts from `from_checkpoint`, else from the checkpoint that the overrides name, else from the parent's newest one. If
    the parent has none, it starts where the parent did: from the same checkpoint, whatever an alias points at by now.
    """
    spec = merged(parent.spec_sent, overrides)
    named = "from_checkpoint" in (overrides.get("model") or {})
    start = from_checkpoint or (None if named else parent.checkpoint_id)
    if not isinstance(spec.get("model"), dict):
        return spec
    if start is None and not named and parent.from_checkpoint_id is not None:
        sent = spec["model"].get("from_checkpoint")
        start = {**(sent if isinstance(sent, dict) else {}), "id": parent.from_checkpoint_id}
    if start is not None:
        spec["model"] = {**spec["model"], "from_checkpoint": start}
    return spec


def merged(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7396). Neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
