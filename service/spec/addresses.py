"""Which addresses a caller's URL may lead to: the public ones, and what the operator has allowed beside them.

Without this, whoever may submit a job could make a worker talk to services that trust their own network, and to the
metadata service of a cloud.
"""

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Networks = Sequence[IPv4Network | IPv6Network]

NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
IPV4_COMPATIBLE = IPv6Network("::/96")


def may_reach(address: Address, allowed: Networks) -> bool:
    """Public, also in what it carries of IPv4; or in one of the operator's networks."""
    if any(address in network for network in allowed):
        return True
    carried = _carried(address)
    if carried is not None:
        return may_reach(carried, allowed)
    if address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return address.is_global and not (isinstance(address, IPv6Address) and address.is_site_local)


def _carried(address: Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel would talk to in place of this one."""
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
    """The address that a host is without being looked up, in every form that a resolver takes: 127.1, 0x7f000001, 017700000001.

    A name is None, but for `localhost`, which no resolver has to be asked for.
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
