"""Which of this machine's addresses peers should use, and the network interface that carries it."""

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

_SIOCGIFADDR: Final = 0x8915
_IPV6_TABLE: Final = Path("/proc/net/if_inet6")


def local_address() -> str:
    """The address that this machine's default route would use; loopback on a machine without one."""
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a datagram socket sends nothing; it only asks the kernel which address it would use.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect((probe, 9))
            return str(probe_socket.getsockname()[0])
    return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Name of the interface that has `address`, or None if this machine has no such address.

    Raises `ValueError` if it is not an IPv4 or IPv6 address at all.
    """
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    if wanted.version == 6:
        return _ipv6_interface(wanted)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(query, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _ipv6_interface(wanted: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if not _IPV6_TABLE.exists():
        return None
    for line in _IPV6_TABLE.read_text().splitlines():
        packed, *_, name = line.split()
        if ipaddress.IPv6Address(bytes.fromhex(packed)) == wanted:
            return name
    return None
