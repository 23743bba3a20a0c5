"""Before the first request: refuse well-known secrets, and create the first API key."""

import logging

from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from service.settings import WELL_KNOWN_SECRETS, Settings
from service.store import keys
from service.store.session import Store

log = logging.getLogger(__name__)

BOOTSTRAP_PROJECT = "default"
MIN_KEY_LENGTH = len(keys.PREFIX) + 32
MIN_DIFFERENT = 12  # characters; 32 random ones of base64 never have fewer


class BadSettings(RuntimeError):
    """The service must not start with these settings."""


def check_secrets(settings: Settings) -> None:
    """Raises BadSettings for a bootstrap key without its prefix; in production also for a weak one or a well-known secret."""
    _check_bootstrap_key(settings)
    if settings.environment != "production":
        return
    secrets = {f"RATCHET_GRADER_SECRETS[{name}]": secret.get_secret_value() for name, secret in settings.grader_secrets.items()}
    secrets |= {f"RATCHET_ROLLOUT_KEYS[{url}]": key.get_secret_value() for url, key in settings.rollout_keys.items()}
    for name, url in (("RATCHET_DATABASE_URL", settings.sql_url), ("RATCHET_REDIS_URL", settings.redis_url.get_secret_value())):
        password = make_url(url).password if "://" in url else None
        if password is not None:  # no password is allowed: for sockets and closed networks, as the operator decides
            secrets[f"the password in {name}"] = str(password)
    for name, secret in secrets.items():
        if secret.lower() in WELL_KNOWN_SECRETS:
            raise BadSettings(
                f"{name} is a well-known secret; set another one (openssl rand -hex 24), "
                "or RATCHET_ENVIRONMENT=development on a machine that nobody else reaches"
            )


def _check_bootstrap_key(settings: Settings) -> None:
    if settings.bootstrap_key is None:
        return
    text = settings.bootstrap_key.get_secret_value()
    is_weak = len(text) < MIN_KEY_LENGTH or len(set(text)) < MIN_DIFFERENT
    if not text.startswith(keys.PREFIX) or (is_weak and settings.environment == "production"):
        raise BadSettings(
            f"RATCHET_BOOTSTRAP_KEY must begin with {keys.PREFIX} and have at least {MIN_KEY_LENGTH} random characters: "
            "echo \"tml-$(openssl rand -base64 32 | tr '+/' '-_' | tr -d '=')\""
        )


def ensure_bootstrap_key(store: Store, settings: Settings) -> None:
    """Create the bootstrap key unless it exists; a revoked one stays revoked. BadSettings if the database cannot be used."""
    try:
        with store.begin() as session:
            if settings.bootstrap_key is not None:
                text = settings.bootstrap_key.get_secret_value()
                keys.ensure(session, project=BOOTSTRAP_PROJECT, name="bootstrap", text=text)
            else:
                keys.page(session, BOOTSTRAP_PROJECT)  # raises if the tables are missing
    except IntegrityError:
        log.warning("the bootstrap key was revoked, or another process has just made it")
    except (OperationalError, ProgrammingError) as error:
        raise BadSettings(
            f"the database cannot be used ({error.orig}); was it migrated? python -m migrations upgrade head"
        ) from error
