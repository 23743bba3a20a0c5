"""Requests to a URL that a caller named: where they may go. The host is looked up once, and the address used is the one that
was checked, because a second look-up could give another."""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any

import httpx

from service.spec.addresses import Address, Networks, host_of, literal, may_reach


class AddressNotAllowed(Exception):
    """The URL's host is an address that may not be reached."""


class NameNotAllowed(AddressNotAllowed):
    """The host's name is not found, or leads where nothing may be reached. Which of the two it is would tell what stands in an
    inner DNS, so both must end alike, after as many attempts."""


@cache
def certificates() -> ssl.SSLContext:
    """Whom TLS trusts. Read once: it takes 40 ms."""
    return httpx.create_ssl_context()


@dataclass(frozen=True)
class Checked:
    """A URL with an address in place of its host, the Host header, and httpx's extensions: for TLS the certificate's name."""

    url: httpx.URL
    host: str
    extensions: dict[str, Any]


async def checked(url: str, allowed: Networks, attempt: int) -> Checked:
    """Where a request to this URL goes. Each further attempt takes the next of the name's addresses.

    Raises ValueError for a text that is no URL, AddressNotAllowed, NameNotAllowed."""
    host_name, parsed = host_of(url), httpx.URL(url)
    written = literal(host_name)
    addresses = await _look_up(host_name, parsed) if written is None else [written]
    if not all(may_reach(address, allowed) for address in addresses):
        raise NameNotAllowed(host_name) if written is None else AddressNotAllowed(host_name)
    address = addresses[attempt % len(addresses)]
    host = f"[{address}]" if address.version == 6 else str(address)
    sni = {"sni_hostname": parsed.raw_host.decode("ascii")}
    return Checked(parsed.copy_with(host=host), parsed.netloc.decode("ascii"), sni)


async def _look_up(name: str, url: httpx.URL) -> list[Address]:
    """Every address of the URL's host, in the resolver's order."""
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NameNotAllowed(name) from None
    return [ip_address(str(entry[4][0]).partition("%")[0]) for entry in addresses]
