"""Aliases: names in a project, each of which points at one checkpoint, and the history of what they pointed at.

A change is one UPDATE, conditional on the version that was read. Its entry in the history is in the same transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.ids import new_id
from service.store import checkpoints, webhooks
from service.store.dialect import insert
from service.store.paging import descending
from service.store.tables import Alias, AliasChange, Checkpoint
from service.validation import did_you_mean

MOST = 1000  # aliases of one project
MARK = "@"  # stands in every alias, and in no id
NOTHING = "none"  # as what is expected: that there is no such alias
SHOWN = 10  # aliases that a message names
TRIES = 20  # each that fails is a change of somebody else's that succeeded

Action = Literal["promote", "rollback", "delete"]


@dataclass(frozen=True)
class Wish:
    """Who asks for a change, and on which condition."""

    key_id: str
    now: datetime
    note: str | None = None
    expected: str | None = None  # the id of the checkpoint that it must point at, or NOTHING; None: whatever it points at


# ---------------------------------------------------------------- reading


def get(session: Session, project: str, name: str) -> Alias:
    """An alias of this project. Raises NotFound if there is none, or it was deleted."""
    row = _find(session, project, name)
    if row is None or row.checkpoint_id is None:
        raise _not_found(session, project, name)
    return row


def page(session: Session, project: str, *, after: str | None = None, limit: int = 20) -> tuple[list[Alias], bool]:
    """Those that are not deleted, newest first. Returns the rows and whether there are more. Raises InvalidRequest (cursor)."""
    query = select(Alias).where(Alias.project == project, Alias.checkpoint_id.is_not(None))
    place = (Alias.created_at, Alias.name)
    return descending(session, query, Alias.project == project, place, {"after": after}, limit=limit)


def history(
    session: Session, project: str, name: str, *, after: str | None = None, limit: int = 20
) -> tuple[list[AliasChange], bool]:
    """Its changes, newest first, also after its deletion. Returns the rows and whether there are more.

    Raises NotFound if there never was such an alias, InvalidRequest (cursor).
    """
    if _find(session, project, name) is None:
        raise _not_found(session, project, name)
    of_it = (AliasChange.project == project) & (AliasChange.alias == name)
    place = (AliasChange.seq, AliasChange.id)
    return descending(session, select(AliasChange).where(of_it), of_it, place, {"after": after}, limit=limit)


def newest_changes(session: Session, project: str, rows: Sequence[Alias]) -> dict[str, AliasChange]:
    """By name what these aliases were last changed by."""
    query = select(AliasChange).join(
        Alias, (Alias.project == AliasChange.project) & (Alias.name == AliasChange.alias) & (Alias.version == AliasChange.seq)
    )
    query = query.where(Alias.project == project, Alias.name.in_([row.name for row in rows]))
    return {change.alias: change for change in session.scalars(query)}


def checkpoint(session: Session, project: str, named: str, *, hold: bool = False) -> Checkpoint:
    """The checkpoint that this id or alias names. `hold`: it cannot be deleted until this transaction ends. Raises NotFound."""
    checkpoint_id = get(session, project, named).checkpoint_id if MARK in named else named
    assert checkpoint_id is not None
    return (checkpoints.hold if hold else checkpoints.get)(session, project, checkpoint_id)


# ---------------------------------------------------------------- changing


def promote(session: Session, project: str, name: str, named: str, wish: Wish) -> tuple[Alias, bool]:
    """Let the alias point at the checkpoint that `named` (an id or an alias) names. If it does already, nothing changes.

    Returns the alias, and whether this made it. Raises NotFound, Conflict `alias_moved` or `too_many_aliases`.
    """
    to = checkpoint(session, project, named, hold=True)
    fresh = {"project": project, "name": name, "version": 0, "created_at": wish.now}
    session.execute(insert(session, Alias).values(fresh).on_conflict_do_nothing())
    for _ in range(TRIES):
        row = _find(session, project, name)
        assert row is not None
        if row.checkpoint_id == to.id:
            return row, False
        made = row.checkpoint_id is None
        _check(row, wish)
        if made:
            _has_room(session, project)
        back_to, previous_id = (None, None) if made else (row.version, row.checkpoint_id)
        if _move(session, row, "promote", to, back_to, previous_id, wish):
            return get(session, project, name), made
    raise _moved(project, name)


def rollback(session: Session, project: str, name: str, wish: Wish) -> Alias:
    """Promote the checkpoint that it pointed at before. Repeated, it goes further back.

    Raises NotFound, Conflict `alias_moved`, `nothing_before` or `checkpoint_deleted`.
    """
    for _ in range(TRIES):
        row = get(session, project, name)
        _check(row, wish)
        now = _change(session, row, row.version)
        if now.back_to is None or row.previous_id is None:
            raise Conflict(f"{name} has pointed at nothing before {row.checkpoint_id}", code="nothing_before")
        try:
            to = checkpoints.hold(session, project, row.previous_id)
        except NotFound:
            detail = f"{row.previous_id}, at which {name} pointed before, was deleted"
            hint = "promote another checkpoint: its history names those that it pointed at"
            raise Conflict(detail, code="checkpoint_deleted", hint=hint) from None
        before = _change(session, row, now.back_to)
        further = None if before.back_to is None else _change(session, row, before.back_to).checkpoint_id
        if _move(session, row, "rollback", to, before.back_to, further, wish):
            return get(session, project, name)
    raise _moved(project, name)


def delete(session: Session, project: str, name: str, wish: Wish) -> None:
    """Let it point at nothing. Its history stays. Raises NotFound, Conflict `alias_moved`."""
    for _ in range(TRIES):
        row = get(session, project, name)
        _check(row, wish)
        if _move(session, row, "delete", None, None, None, wish):
            return
    raise _moved(project, name)


def _move(
    session: Session,
    row: Alias,
    action: Action,
    to: Checkpoint | None,
    back_to: int | None,
    previous_id: str | None,
    wish: Wish,
) -> bool:
    """Change it if it is as it was read. False if somebody else was quicker."""
    seq, to_id = row.version + 1, None if to is None else to.id
    change = AliasChange(
        id=new_id("chg"),
        project=row.project,
        alias=row.name,
        seq=seq,
        action=action,
        from_checkpoint_id=row.checkpoint_id,
        checkpoint_id=to_id,
        back_to=back_to,
        note=wish.note,
        key_id=wish.key_id,
        created_at=wish.now,
    )
    as_read = (Alias.project == row.project, Alias.name == row.name, Alias.version == row.version)
    made = {"created_at": wish.now} if row.checkpoint_id is None else {}
    moved = update(Alias).where(*as_read).values(checkpoint_id=to_id, previous_id=previous_id, version=seq, **made)
    if session.scalar(moved.returning(Alias.version), execution_options={"synchronize_session": False}) is None:
        return False
    session.add(change)
    session.flush()
    webhooks.tell_of_alias(session, change, None if to is None else to.job_id)
    return True


def _find(session: Session, project: str, name: str) -> Alias | None:
    query = select(Alias).where(Alias.project == project, Alias.name == name)
    return session.scalar(query.execution_options(populate_existing=True))


def _change(session: Session, row: Alias, seq: int) -> AliasChange:
    query = select(AliasChange).where(AliasChange.project == row.project, AliasChange.alias == row.name)
    return session.scalars(query.where(AliasChange.seq == seq)).one()


def _check(row: Alias, wish: Wish) -> None:
    wanted = None if wish.expected == NOTHING else wish.expected
    if wish.expected is not None and row.checkpoint_id != wanted:
        at = row.checkpoint_id or "nothing"
        raise Conflict(
            f"{row.name} points at {at}, and {wanted or 'nothing'} was expected: it was changed meanwhile",
            code="alias_moved",
            hint="look at its history, then decide; nothing was changed by this request",
            checkpoint_id=row.checkpoint_id,
        )


def _has_room(session: Session, project: str) -> None:
    there = select(func.count()).where(Alias.project == project, Alias.checkpoint_id.is_not(None))
    if (session.scalar(there) or 0) >= MOST:
        raise Conflict(f"a project has at most {MOST} aliases; delete one first", code="too_many_aliases")


def _not_found(session: Session, project: str, name: str) -> NotFound:
    known = [row.name for row in page(session, project, limit=MOST)[0]]
    there = f"there {'is' if len(known) == 1 else 'are'} {', '.join(known[:SHOWN])}{', …' * (len(known) > SHOWN)}"
    detail = f"no alias {name} in this project; {there if known else 'it has none yet'}{did_you_mean(name, known)}"
    return NotFound(detail, hint="GET /v1/aliases lists those that there are")


def _moved(project: str, name: str) -> Conflict:
    return Conflict(f"{name} of {project} is changed by others again and again; nothing was done", code="alias_moved")
