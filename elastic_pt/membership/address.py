"""Which of this machine's addresses peers should use, and the network interface that has it."""

import ipaddress
import socket
from contextlib import suppress

import ifaddr


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
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            # ifaddr gives an IPv6 address as (address, flow information, scope).
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            if ipaddress.ip_address(text.partition("%")[0]) == wanted:
                return adapter.name
    return None
