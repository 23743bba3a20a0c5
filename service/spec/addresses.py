"""The addresses that a caller's URL may lead to: public ones, and those that the operator has allowed in addition.

Without this check, anyone who may submit a job could make a worker talk to a cloud's metadata service, and to services that
trust every client in their network.
"""

import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpx

Address = IPv4Address | IPv6Address
Networks = Sequence[IPv4Network | IPv6Network]

NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
IPV4_COMPATIBLE = IPv6Network("::/96")
DEFAULT_PORTS = (("http", 80), ("https", 443))  # httpx leaves these out
NAME = re.compile(r"(?=.{1,254}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\.?")


def host_of(url: str) -> str:
    """The host of the URL as httpx, which sends the request, reads it: in ASCII, IPv6 without brackets.
    Raises ValueError if there is no valid host. All code that needs a URL's host calls this, so that all agree."""
    try:
        parts = httpx.URL(url)
        host = parts.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.port != (port := _port_of(url)) and (parts.scheme, port) not in DEFAULT_PORTS:
        raise ValueError("not a URL: its port must be a number in ASCII digits")
    if parts.port is not None and not 0 < parts.port < 65536:
        raise ValueError(f"not a URL: its port is {parts.port}, ports go from 1 to 65535")
    if not host:
        raise ValueError("the URL names no host")
    if ":" not in host and not NAME.fullmatch(host):
        raise ValueError(f"{host[:80]!r} is no host: write an address, or a name of letters, digits, hyphens and dots")
    return host


def _port_of(url: str) -> int | None:
    """The port as urllib reads it, which unlike httpx takes ASCII digits only. Raises ValueError if it is none."""
    try:
        return urlsplit(url).port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None


def names_user(url: str) -> bool:
    """Whether the URL has a user name or password, which would be shown with the rest of it."""
    return "@" in re.split(r"[/?#]", url, maxsplit=3)[2]


def refusal(url: str, allowed: Networks, setting: str) -> str | None:
    """Why nothing is sent to this URL, if its host is an address that may not be reached. A name is looked up by who connects,
    and then only. `setting`: where the operator allows networks."""
    address = literal(host_of(url))
    return None if address is None or may_reach(address, allowed) else address_refused(setting)


def address_refused(setting: str) -> str:
    return f"the host is no public address; the operator can allow its network ({setting}=10.1.0.0/16)"


def name_refused(setting: str) -> str:
    """Which of the two it is would tell what stands in an inner DNS."""
    return (
        f"its host is not found, or has an address that is not public; the operator can allow a network ({setting}=10.1.0.0/16)"
    )


def may_reach(address: Address, allowed: Networks) -> bool:
    """Whether the address, and any IPv4 address inside it, is public; or the address is in one of the operator's networks."""
    if any(address in network for network in allowed):
        return True
    carried = _carried(address)
    if carried is not None:
        return may_reach(carried, allowed)
    if address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return address.is_global and not (isinstance(address, IPv6Address) and address.is_site_local)


def _carried(address: Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel would connect to instead of this one."""
    if not isinstance(address, IPv6Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in IPV4_COMPATIBLE or any(address in network for network in NAT64):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def literal(host: str) -> Address | None:
    """The address that a host denotes without a lookup, in every form that resolvers accept: 127.1, 0x7f000001, 017700000001.

    `localhost` gives 127.0.0.1; any other name gives None.
    """
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host)) if host.isascii() and host[:1].isdigit() else None
    except (OSError, ValueError):
        return None
