"""Tell what addresses stand for: this machine, a caller's network, machines that a stranger shall not make us call."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where clouds tell a machine its secrets. 169.254.169.254 is link-local, as are most.
METADATA = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # stands for IPv4 addresses at places that only its network knows
IPV4_IN_LAST_BITS = (
    ipaddress.IPv6Network("::/96"),  # IPv4-compatible
    ipaddress.IPv6Network("::ffff:0:0/96"),  # IPv4-mapped
    ipaddress.IPv6Network("::ffff:0:0:0/96"),  # IPv4-translated
    ipaddress.IPv6Network("64:ff9b::/96"),  # NAT64
    LOCAL_NAT64,
)
ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the bits before the last, in any network


def without_brackets(host: str) -> str:
    """Return a host as sockets take it: an IPv6 address may be written in brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


EVERY_INTERFACE = ("0.0.0.0", "::", "")  # addresses to listen on, which nobody can call


def check_host(flag: str, host: str, port_flag: str) -> None:
    """Raise ValueError for what is neither an IP address nor a name. An empty host is good."""
    if not host or is_address(host):
        return
    if re.fullmatch(r".*:[0-9]*", host):
        raise ValueError(f"--{flag} {host}: must be an address without a port; give the port with --{port_flag}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise ValueError(f"--{flag} {host}: neither an IP address nor the name of a machine")


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host, an IPv6 address without brackets, is this machine; names other than localhost are not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_of(address: str) -> str:
    """Return the network of one caller: an IPv4 address, or the 64 bits of an IPv6 address that one customer has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_address(int(found) >> 64 << 64))


def may_call(address: Address, sender: Address) -> bool:
    """Whether a validator calls what `sender` announces; none of its own networks, for one from outside of them.

    An IPv6 address that stands for an IPv4 one reaches that, which must be anybody's to call.
    """
    if not _is_one_machine(address) or address in LOCAL_NAT64:
        return False
    for reached in embedded_ipv4(address):
        if not (reached.is_global and _is_one_machine(reached)):
            return False
    if address.is_loopback:
        return sender.is_loopback
    outside = sender.is_global or any(found.is_global for found in embedded_ipv4(sender))
    return address.is_global or not outside


def _is_one_machine(address: Address) -> bool:
    """Whether the address is one that a miner can have: no group, no neighbour of any network, no cloud's own."""
    return not (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved if address.version == 4 else address.is_site_local)
        or address in METADATA
    )


def embedded_ipv4(address: Address) -> Iterator[ipaddress.IPv4Address]:
    """Yield the IPv4 addresses that an IPv6 address stands for, where it is of a form that does."""
    if address.version == 4 or address.is_loopback or address.is_unspecified:
        return
    last = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    if any(address in network for network in IPV4_IN_LAST_BITS) or int(address) >> 32 & 0xFFFF_FFFF in ISATAP:
        yield last
    if address.sixtofour is not None:
        yield address.sixtofour
    yield from address.teredo or ()
