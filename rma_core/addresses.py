"""What an address means, known without any client library."""

from __future__ import annotations

import ipaddress

#: Where IPv6 has the addresses that are routed in public, and what of that is tunnels, tests and examples.
_ROUTED = ipaddress.IPv6Network("2000::/3")
_NOT_ROUTED = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16")))
#: IPv4 behind a translator, as networks without IPv4 see it.
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def is_loopback(host: str) -> bool:
    """Say whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_public(address: str) -> bool:
    """Say whether an address can only mean somebody out there: nothing of this machine, its networks, or a tunnel."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or (ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in _TRANSLATED else None)
        if inner is None:
            return found in _ROUTED and not any(found in network for network in _NOT_ROUTED)
        found = inner
    # The library calls multicast global, which no server answers from.
    return found.is_global and not found.is_multicast and not found.is_reserved
