"""This machine's address for its peers, and how to avoid DNS look-ups between a failure and the next step.

Agents use addresses only. But two parts of torch look names up, and each look-up takes seconds if the DNS server is
silent:

    torch elastic    `socket.getfqdn` for the host's name in its events       `avoid_getfqdn`, once a process
    c10d's sockets   the name of each peer, for log messages (getnameinfo)    `without_dns`, around each connect

Any process.
"""

import ctypes
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import ifaddr

_RETRIES: Final = 1
"""Index of `retry` in glibc's `struct __res_state`, which begins with two ints: `retrans` and `retry`."""


def local_address() -> str:
    """The address that this machine's default route would use; loopback on a machine without one."""
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a datagram socket sends nothing. It only asks the kernel which address it would use.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect((probe, 9))
            return str(probe_socket.getsockname()[0])
    return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Name of the interface that has `address`, or None if this machine has no such address.

    Raises `ValueError` if it is not an IPv4 or IPv6 address.
    """
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    return next((name for name, each in _addresses() if each == wanted), None)


def own_addresses() -> frozenset[str]:
    """All addresses of this machine, in this network namespace."""
    return frozenset(str(each) for _, each in _addresses())


def _addresses() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The name of an interface, and an address of it."""
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            # ifaddr gives an IPv6 address as (address, flow information, scope).
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            yield adapter.name, ipaddress.ip_address(text.partition("%")[0])


def avoid_getfqdn() -> None:
    """Make `socket.getfqdn` of this process return its argument, or the host's unqualified name, without a look-up."""
    socket.getfqdn = lambda name="": name or socket.gethostname()


@contextmanager
def without_dns() -> Iterator[None]:
    """Make this thread's name look-ups fail at once instead of asking a DNS server; /etc/hosts still works.

    glibc keeps the resolver's state per thread, so other threads are not affected. Another C library has no such
    state, so nothing changes with it.
    """
    try:
        library = ctypes.CDLL(None)
        library.__res_init()
        library.__res_state.restype = ctypes.POINTER(ctypes.c_int)
        state = library.__res_state()
    except (OSError, AttributeError):
        yield
        return
    attempts, state[_RETRIES] = state[_RETRIES], 0
    try:
        yield
    finally:
        state[_RETRIES] = attempts
