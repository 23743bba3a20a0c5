"""Single sign-on by a reverse proxy: it signs people in, and names them in a header. Off unless RATCHET_SSO_HEADER is set.

The header counts only on a connection that comes from RATCHET_SSO_PROXIES; from anywhere else it is refused. Each person
gets an API key without a text, named `sso:USER`: rates, the audit log and revocation are those of any key.
"""

import re
from dataclasses import replace
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from fastapi import Request
from sqlalchemy.exc import IntegrityError

from service.edge.protocol import PEER
from service.errors import Forbidden, Unauthorized
from service.settings import Settings
from service.store import keys
from service.store.keys import Known
from service.store.session import Store

USER = re.compile(r"[A-Za-z0-9._%+@=:/\\|-]{1,120}")
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
OURS = frozenset({"same-origin", "none"})  # Sec-Fetch-Site: by our own page, or typed by the user


def user_of(request: Request, settings: Settings) -> str | None:
    """Who the proxy says asks; None if there is no such header, or the mode is off. Raises Unauthorized, Forbidden."""
    if settings.sso_header is None or not (said := request.headers.getlist(settings.sso_header)):
        return None
    if not _is_proxy(request, settings):
        raise Unauthorized(
            f"the header {settings.sso_header} is believed from the sign-on proxy alone, and this came from elsewhere",
            code="sso_not_trusted",
            hint="ask through the proxy, or send an API key; the operator names the proxy in RATCHET_SSO_PROXIES",
        )
    if len(said) != 1 or USER.fullmatch(said[0]) is None:
        raise Unauthorized(
            f"the header {settings.sso_header} must come once, with a name of 1 to 120 letters, digits and ._%+@=:/\\|-",
            code="sso_bad_user",
            hint="have the proxy remove what the browser sent under this name before it sets its own",
        )
    if request.method not in SAFE and _is_foreign(request):
        raise Forbidden(
            "a page of another site made the browser ask for this", code="cross_site", hint="use the dashboard itself"
        )
    return said[0]


def _is_proxy(request: Request, settings: Settings) -> bool:
    """By the socket's own address, whatever X-Forwarded-For says."""
    try:
        peer = ip_address(request.scope[PEER][0])
    except (KeyError, TypeError, ValueError):  # a Unix socket, or another server than ours
        return False
    if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
        peer = peer.ipv4_mapped
    return any(peer in network for network in settings.sso_proxies)


def _is_foreign(request: Request) -> bool:
    """The proxy knows people by a cookie, which browsers send with the requests of any site."""
    if (site := request.headers.get("sec-fetch-site")) is not None:
        return site not in OURS
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def text_of(settings: Settings, user: str) -> str:
    """Stands for the text of the user's key. No request can send it as one, because those begin with tml-."""
    return f"{keys.SIGNED_ON}{settings.sso_project}:{user}"


def look(store: Store, settings: Settings, user: str) -> Known:
    """The user's key, made when the user first comes, with the scope of the settings. Raises Unauthorized if it was revoked."""
    text, project = text_of(settings, user), settings.sso_project
    assert project is not None  # the settings have been checked
    with store.look() as connection:
        key = keys.known(connection, text)
        revoked = key is None and keys.is_revoked(connection, text)
    if key is None and not revoked:
        try:
            with store.begin() as session:
                keys.create(session, project=project, name=f"{keys.SIGNED_ON}{user}", text=text, scopes=[settings.sso_scope])
        except IntegrityError:  # another request was first
            pass
        with store.look() as connection:
            key = keys.known(connection, text)
    if key is None:
        raise Unauthorized(
            f"{user} was shut out: the key {keys.SIGNED_ON}{user} is revoked", code="invalid_api_key", hint="ask an operator"
        )
    scopes = keys.with_implied([settings.sso_scope])
    if key.scopes != scopes:  # the setting was another when the user first came
        with store.begin() as session:
            keys.change_scopes(session, key.id, scopes)
    return replace(key, scopes=scopes)
