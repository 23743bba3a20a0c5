"""API keys: `tml-` and 256 random bits. Only the sha256 of the text is stored."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, or_, select, update
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.ids import new_id, utcnow
from service.store.tables import ApiKey

PREFIX = "tml-"
SIGNED_ON = "sso:"  # begins the names of the keys of people whom a proxy signs in, and of no other
SCOPES = ("read", "write", "admin")  # each includes those before it
TOUCH_EVERY = timedelta(minutes=1)  # last_used_at only informs people, so it is not written for each request


def generate() -> str:
    return PREFIX + token_urlsafe(32)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def with_implied(scopes: Collection[str]) -> list[str]:
    """The scopes with those they include: admin includes write, write includes read."""
    return list(SCOPES[: max(SCOPES.index(scope) for scope in scopes) + 1])


def create(
    session: Session,
    *,
    project: str,
    name: str,
    text: str | None = None,
    scopes: Collection[str] = SCOPES,
    expires_at: datetime | None = None,
    requests_per_s: float | None = None,
    burst: int | None = None,
) -> tuple[ApiKey, str]:
    """Create a key. Returns it and its text, which cannot be read again."""
    text = text or generate()
    key = ApiKey(
        id=new_id("key"),
        project=project,
        name=name,
        sha256=digest(text),
        ends_with=text[-4:],
        scopes=with_implied(scopes),
        requests_per_s=requests_per_s,
        burst=burst,
        created_at=utcnow(),
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, text


def names(session: Session, key_ids: Collection[str]) -> dict[str, str]:
    """What these keys are called, revoked ones too."""
    rows = session.execute(select(ApiKey.id, ApiKey.name).where(ApiKey.id.in_(list(key_ids))))
    return {row.id: row.name for row in rows}


@dataclass(frozen=True)
class Known:
    """What every request needs to know about its key: plain values, not an object of the session."""

    id: str
    project: str
    scopes: list[str]
    expires_at: datetime | None
    last_used_at: datetime | None
    requests_per_s: float | None
    burst: int | None


_KNOWN = select(*(getattr(ApiKey, name) for name in Known.__dataclass_fields__)).where(
    ApiKey.sha256 == bindparam("digest"), ApiKey.revoked_at.is_(None)
)


def known(connection: Connection, text: str) -> Known | None:
    """The key with this text; None if unknown or revoked. An expired key is found."""
    row = connection.execute(_KNOWN, {"digest": digest(text)}).one_or_none()
    return None if row is None else Known(*row)


def is_revoked(connection: Connection, text: str) -> bool:
    gone = select(ApiKey.id).where(ApiKey.sha256 == digest(text), ApiKey.revoked_at.is_not(None))
    return connection.scalar(gone) is not None


def change_scopes(session: Session, key_id: str, scopes: list[str]) -> None:
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(scopes=scopes))


def find(session: Session, text: str) -> Known | None:
    """Like `known`, within a session."""
    return known(session.connection(), text)


def in_force(session: Session | Connection, key_ids: Collection[str], now: datetime) -> set[str]:
    """Those of these keys that are neither revoked nor expired."""
    return set(session.scalars(_IN_FORCE, {"key_ids": list(key_ids), "now": now}))


def _lasts(now: Any) -> ColumnElement[bool]:
    lasts: Any = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now)
    return ApiKey.revoked_at.is_(None) & lasts


_IN_FORCE = select(ApiKey.id).where(ApiKey.id.in_(bindparam("key_ids", expanding=True)), _lasts(bindparam("now")))


def ensure(session: Session, *, project: str, name: str, text: str) -> None:
    """Create the key with this text if it is missing (for the bootstrap key)."""
    if find(session, text) is None:
        create(session, project=project, name=name, text=text)


def touch(session: Session, key_id: str, now: datetime) -> None:
    """Note that the key was used, at most once a minute."""
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - TOUCH_EVERY)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now))


def get(session: Session, project: str, key_id: str) -> ApiKey:
    """A key of this project. Raises NotFound."""
    key = session.get(ApiKey, key_id)
    if key is None or key.project != project:
        raise NotFound(f"no key {key_id} in this project")
    return key


def page(session: Session, project: str) -> list[ApiKey]:
    """All keys of a project that were not revoked, newest first."""
    query = select(ApiKey).where(ApiKey.project == project, ApiKey.revoked_at.is_(None))
    return list(session.scalars(query.order_by(ApiKey.created_at.desc(), ApiKey.id.desc())))


def revoke(session: Session, project: str, key_id: str) -> None:
    """Revoke a key. Raises NotFound if it belongs to another project or is already revoked. Of several requests at once, one
    revokes it and the others get NotFound."""
    theirs = ApiKey.project == project, ApiKey.id == key_id, ApiKey.revoked_at.is_(None)
    if session.scalar(update(ApiKey).where(*theirs).values(revoked_at=utcnow()).returning(ApiKey.id)) is None:
        raise NotFound(f"no key {key_id} in this project")


def rotate(
    session: Session, project: str, key_id: str, until: datetime, *, no_longer_than: datetime | None
) -> tuple[ApiKey, str]:
    """A new key like this one, which itself ends at `until` at the latest. The new one lasts as long as the old was made to.

    Returns the new key and its text. Raises NotFound; a second rotation makes a second key.
    """
    now = utcnow()
    theirs = select(ApiKey).where(ApiKey.id == key_id, ApiKey.project == project, _lasts(now))
    old = session.scalar(theirs.with_for_update())
    if old is None:
        raise NotFound(f"no key {key_id} in this project")
    if old.name.startswith(SIGNED_ON):
        raise Conflict(
            f"{old.name} signs in by the proxy, and has no key to rotate", code="sso_key", hint="revoke it, or make a key"
        )
    ends = [now + (old.expires_at - old.created_at)] if old.expires_at is not None else []
    ends += [no_longer_than] if no_longer_than is not None else []
    key, text = create(
        session,
        project=project,
        name=old.name,
        scopes=old.scopes,
        expires_at=min(ends, default=None),
        requests_per_s=old.requests_per_s,
        burst=old.burst,
    )
    old.expires_at = until if old.expires_at is None else min(old.expires_at, until)
    session.flush()
    return key, text


def sha256_of(session: Session, key_id: str) -> str | None:
    """The stored hash of a key that is valid: what its holder's URLs are signed with. None otherwise, and for the keys of
    people who sign in by a proxy, because these have no secret text: anybody could compute the hash."""
    now = utcnow()
    secret = ApiKey.name.not_like(f"{SIGNED_ON}%")
    valid = (secret, ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now))
    return session.scalar(select(ApiKey.sha256).where(ApiKey.id == key_id, *valid))


def project_of(session: Session, key_id: str) -> str | None:
    return session.scalar(select(ApiKey.project).where(ApiKey.id == key_id))
