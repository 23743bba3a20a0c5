"""API keys: 256 random bits behind `tml-`, of which only the sha256 is stored."""

from datetime import datetime, timedelta
from hashlib import sha256
from secrets import token_urlsafe

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.ids import new_id, utcnow
from service.store.tables import ApiKey

PREFIX = "tml-"
TOUCH_EVERY = timedelta(minutes=1)  # last_used_at is for people: no write for each request


def generate() -> str:
    return PREFIX + token_urlsafe(32)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def create(session: Session, *, project: str, name: str, text: str | None = None) -> tuple[ApiKey, str]:
    """A new key and its text, which cannot be read again."""
    text = text or generate()
    key = ApiKey(id=new_id("key"), project=project, name=name, sha256=digest(text), ends_with=text[-4:], created_at=utcnow())
    session.add(key)
    session.flush()
    return key, text


def find(session: Session, text: str) -> ApiKey | None:
    """The key of this text, unless it was revoked."""
    return session.scalar(select(ApiKey).where(ApiKey.sha256 == digest(text), ApiKey.revoked_at.is_(None)))


def is_in_force(session: Session, key_id: str) -> bool:
    """Whether the key has not been revoked."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))) is not None


def ensure(session: Session, *, project: str, name: str, text: str) -> ApiKey:
    """The key of this text, created when it is missing (the bootstrap key)."""
    return find(session, text) or create(session, project=project, name=name, text=text)[0]


def touch(session: Session, key_id: str, now: datetime) -> None:
    """Note that the key was used, at most once a minute."""
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - TOUCH_EVERY)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now))


def page(session: Session, project: str) -> list[ApiKey]:
    """All keys of a project that are in force, newest first."""
    query = select(ApiKey).where(ApiKey.project == project, ApiKey.revoked_at.is_(None))
    return list(session.scalars(query.order_by(ApiKey.created_at.desc(), ApiKey.id.desc())))


def revoke(session: Session, project: str, key_id: str) -> ApiKey:
    """Raises NotFound for another project's key and for one that is revoked already."""
    key = session.scalar(select(ApiKey).where(ApiKey.project == project, ApiKey.id == key_id, ApiKey.revoked_at.is_(None)))
    if key is None:
        raise NotFound(f"no key {key_id} in this project")
    key.revoked_at = utcnow()
    session.flush()
    return key
