"""Which addresses of the internet the coordinator calls when a client names them. Pure.

Python's `is_global` is no such list: it calls 6to4 and NAT64 forms of private addresses global, and multicast. Of IPv6
only what is given out for hosts counts, so every form that hides an IPv4 address is outside; IPv4-mapped ones are
looked at as the IPv4 addresses that they are.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Address = ipaddress.IPv4Address | ipaddress.IPv6Address
    Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: IANA's registry of special addresses: none of them is a stranger's host on the internet.
SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a carrier's customers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
#: What of IPv6 is given out for hosts, and what of that is not.
GIVEN_V6 = ipaddress.IPv6Network("2000::/3")
SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)


def network(text: str) -> Network:
    """Return a network as people write it. Raises ValueError."""
    return ipaddress.ip_network(text.strip(), strict=False)


def attached(text: str, netmask: str | None) -> Network:
    """Return the network that an interface with this address is attached to; its address alone without a netmask.

    Raises ValueError.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    bits = address.max_prefixlen if netmask is None else int(ipaddress.ip_address(netmask)).bit_count()
    return ipaddress.ip_network((int(address), bits), strict=False) if bits else network(str(address))


def is_public(text: str, *, allowed: Sequence[Network] = (), own: Iterable[Network] = ()) -> bool:
    """Say whether a host of the internet has this address, or one of the ``allowed`` networks has.

    ``own`` are the networks that this machine is attached to, whose addresses may be public ones: a home's IPv6 is.
    Raises ValueError for what is no address.
    """
    address = unwrapped(text)
    if any(address in one for one in allowed):
        return True
    if any(address in one for one in own):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in one for one in SPECIAL_V4)
    return address in GIVEN_V6 and not any(address in one for one in SPECIAL_V6)


def unwrapped(text: str) -> Address:
    """Return an address; an IPv4 address in IPv6's clothes as what it is. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
