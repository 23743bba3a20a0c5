"""Loss requests: send one, wait for the answer, send it again if it was lost. Bodies and answers are bytes here.

A loss is a pure computation, so sending a request twice costs time and changes nothing. Errors that pass by themselves (no
connection, 429, 503: a worker died, Redis was restarted) are therefore handled by sending the request again.
"""

from math import ceil
from time import monotonic, sleep

import httpx

from ratchet_client.errors import RatchetLossPending
from ratchet_client.transport import Transport

PATH = "/v1/losses"
JSON, TENSORS = "application/json", "application/vnd.safetensors"
LONGEST_HOLD_S = 60.0  # the service holds a request no longer than this
POLL_S = 1.0  # between two polls, if a proxy on the way does not let the service hold requests


def ask(transport: Transport, body: bytes, media_type: str, wait_s: float) -> httpx.Response:
    """The finished answer to POST /v1/losses, in the type of the body.

    Raises RatchetLossPending if it is not there after `wait_s`.
    """
    until = monotonic() + wait_s

    def attempt() -> httpx.Response:
        headers = {"Content-Type": media_type, "Accept": media_type}
        return _settled(transport, _send(transport, "POST", PATH, headers, until, body), media_type, until)

    return transport.until_answered(attempt, until=until)


def collect(transport: Transport, loss_id: str, media_type: str, wait_s: float) -> httpx.Response:
    """The finished answer to a request that was accepted earlier. Raises the same errors as `ask`."""
    until = monotonic() + wait_s

    def attempt() -> httpx.Response:
        path = f"{PATH}/{loss_id}"
        return _settled(transport, _send(transport, "GET", path, {"Accept": media_type}, until), media_type, until)

    return transport.until_answered(attempt, until=until)


def _settled(transport: Transport, response: httpx.Response, media_type: str, until: float) -> httpx.Response:
    """Poll as long as the response is 202."""
    while response.status_code == httpx.codes.ACCEPTED:
        ticket = response.json()
        if monotonic() >= until:
            raise RatchetLossPending(ticket["id"], ticket["status"])
        asked_at = monotonic()
        response = _send(transport, "GET", ticket["url"], {"Accept": media_type}, until)
        if response.status_code == httpx.codes.ACCEPTED and monotonic() - asked_at < POLL_S:
            sleep(max(0.0, min(POLL_S, until - monotonic())))
    return response


def _send(
    transport: Transport, method: str, path: str, headers: dict[str, str], until: float, body: bytes | None = None
) -> httpx.Response:
    """One exchange, which the service may hold for the time left."""
    hold_s = ceil(min(max(0.0, until - monotonic()), LONGEST_HOLD_S))
    prefer = {"Prefer": f"wait={hold_s}"} if hold_s else {}
    return transport.attempt(method, path, headers=headers | prefer, content=body, timeout_s=transport.timeout_s + hold_s)
