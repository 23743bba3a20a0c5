"""`tinker://{model id}/{weights | sampler_weights | external_weights}/{name}`, and the checkpoints behind such paths."""

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.errors import FieldError, NotFound
from service.sessions.body import NAME
from service.store import tinker
from service.store.checkpoints import Purpose
from service.store.tables import Checkpoint, TinkerModel
from service.validation import invalid

SCHEME = "tinker://"
EXTERNAL = f"{tinker.RESERVED}external."  # adapters that were exported: ours are plain folders of peft as they are
SAMPLER = tinker.EPHEMERAL  # its number follows
# By the path's second part: what the wire calls such a checkpoint, its purpose, and what stands before its name.
KINDS: dict[str, tuple[str, Purpose, str]] = {
    "weights": ("training", "training", ""),
    "sampler_weights": ("sampler", "sampler", ""),
    "external_weights": ("external", "sampler", EXTERNAL),
}


@dataclass(frozen=True)
class TinkerPath:
    model_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.kind}/{self.name}"

    @property
    def purpose(self) -> Purpose:
        return KINDS[self.kind][1]

    @property
    def stored_name(self) -> str:
        return KINDS[self.kind][2] + self.name


def parse(text: str, pointer: str) -> TinkerPath:
    """Raises InvalidRequest."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS or not all(parts):
        detail = f"must be {SCHEME}<training run>/<{' | '.join(KINDS)}>/<name>, got {text[:200]!r}"
        raise invalid([FieldError(pointer, detail, "invalid_path", text[:200])])
    return TinkerPath(*parts)


def checked_name(name: Any, pointer: str = "/path") -> str:
    """The name of a new checkpoint. Raises InvalidRequest."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or name.startswith(tinker.RESERVED):
        detail = f"must be a name of letters, digits, dots, - and _, beginning with a letter or digit, got {str(name)[:100]!r}"
        raise invalid([FieldError(pointer, detail, "invalid_name", str(name)[:100])])
    return name


def resolve(session: Session, project: str, path: TinkerPath) -> tuple[TinkerModel, Checkpoint]:
    """The model and the checkpoint. Raises NotFound, the same for another project's as for one that never was."""
    model = tinker.find(session, TinkerModel, project, path.model_id)
    row = None if model is None else tinker.checkpoint_named(session, model, path.purpose, path.stored_name)
    if model is None or row is None:
        raise NotFound(
            f"no checkpoint {str(path)[:300]} in this project: it never was, was deleted, or has expired",
            code="checkpoint_not_found",
        )
    return model, row


def path_of(model_id: str, purpose: str, name: str) -> TinkerPath:
    """The path of a checkpoint by its stored name."""
    if name.startswith(EXTERNAL):
        return TinkerPath(model_id, "external_weights", name.removeprefix(EXTERNAL))
    return TinkerPath(model_id, "weights" if purpose == "training" else "sampler_weights", name)
