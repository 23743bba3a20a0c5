"""Loss requests: ask, wait for the answer, ask anew when it got lost. Bodies and answers are bytes here.

A loss is a pure computation that the service keeps in memory only: asking twice costs time and changes nothing. So whatever
passes by itself (no connection, 429, 503: a worker died, Redis was restarted) is answered by sending the request again.
"""

from math import ceil
from time import monotonic, sleep

import httpx

from ratchet_client.errors import RatchetLossPending
from ratchet_client.transport import Transport

PATH = "/v1/losses"
JSON, TENSORS = "application/json", "application/vnd.safetensors"
LONGEST_HOLD_S = 60.0  # the service holds no request for longer
POLL_S = 1.0  # between two questions where something on the way does not let the service hold them


def ask(transport: Transport, body: bytes, media_type: str, wait_s: float) -> httpx.Response:
    """The finished answer to POST /v1/losses, in the type of the body.

    Raises RatchetLossPending when it is not there after `wait_s`.
    """
    until = monotonic() + wait_s

    def attempt() -> httpx.Response:
        headers = {"Content-Type": media_type, "Accept": media_type}
        return _settled(transport, _send(transport, "POST", PATH, headers, until, body), media_type, until)

    return transport.until_answered(attempt, until=until)


def collect(transport: Transport, loss_id: str, media_type: str, wait_s: float) -> httpx.Response:
    """The finished answer to a request that was accepted before. Raises as `ask`."""
    until = monotonic() + wait_s

    def attempt() -> httpx.Response:
        path = f"{PATH}/{loss_id}"
        return _settled(transport, _send(transport, "GET", path, {"Accept": media_type}, until), media_type, until)

    return transport.until_answered(attempt, until=until)


def _settled(transport: Transport, response: httpx.Response, media_type: str, until: float) -> httpx.Response:
    """Goes on asking for as long as the answer is 202."""
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
    """One exchange that the service may hold for as long as there is time."""
    hold_s = ceil(min(max(0.0, until - monotonic()), LONGEST_HOLD_S))
    prefer = {"Prefer": f"wait={hold_s}"} if hold_s else {}
    return transport.attempt(method, path, headers=headers | prefer, content=body, timeout_s=transport.timeout_s + hold_s)
