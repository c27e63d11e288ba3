"""Ethernet frames as a packet socket with `PACKET_VNET_HDR` reads them: flip a bit that the receiver's checksum misses.

    [virtio_net_hdr, 10 bytes][Ethernet, 14][IPv4 or IPv6][TCP][payload]

The first header says whether the kernel still has to compute the TCP checksum. If not, the checksum is corrected here
(RFC 1624), so that the application gets the wrong byte.
"""

import struct
from collections.abc import Callable
from typing import Final

VNET_BYTES: Final = 10
_NEEDS_CHECKSUM: Final = 1
_ETHERNET_BYTES: Final = 14
_IP: Final = VNET_BYTES + _ETHERNET_BYTES
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_IPV6_BYTES: Final = 40
_TCP: Final = 6
_CHECKSUM_AT: Final = 16
_FRAGMENT: Final = 0x3FFF
"""More fragments follow, or the offset is not zero."""


def flip_payload_bit(frame: bytes, choose: Callable[[int], int]) -> bytes | None:
    """The frame with one bit of its TCP payload flipped; None if it carries none. `choose(n)` gives a number below n."""
    found = _tcp(frame)
    if found is None:
        return None
    tcp, end = found
    payload = tcp + (frame[tcp + 12] >> 4) * 4
    if payload >= end:
        return None
    changed = bytearray(frame)
    bit = choose(8 * (end - payload))
    place = payload + bit // 8
    changed[place] ^= 1 << bit % 8
    if not frame[0] & _NEEDS_CHECKSUM:
        word = place - (place - tcp) % 2
        at = tcp + _CHECKSUM_AT
        (before,) = struct.unpack_from("!H", frame, at)
        after = _corrected(before, _word(frame, word, end), _word(changed, word, end))
        struct.pack_into("!H", changed, at, after)
    return bytes(changed)


def _tcp(frame: bytes) -> tuple[int, int] | None:
    """Where the TCP header begins and the payload ends, or None."""
    if len(frame) < _IP + 20:
        return None
    (kind,) = struct.unpack_from("!H", frame, _IP - 2)
    if kind == _IPV4:
        length, _, fragment = struct.unpack_from("!HHH", frame, _IP + 2)
        tcp, end, protocol = _IP + (frame[_IP] & 15) * 4, _IP + length, frame[_IP + 9]
        if fragment & _FRAGMENT:
            return None
    elif kind == _IPV6:
        (length,) = struct.unpack_from("!H", frame, _IP + 4)
        tcp, protocol = _IP + _IPV6_BYTES, frame[_IP + 6]
        end = tcp + length
    else:
        return None
    return (tcp, min(end, len(frame))) if protocol == _TCP and len(frame) >= tcp + 20 else None


def _word(frame: bytes | bytearray, at: int, end: int) -> int:
    """16 bits of what the checksum covers; a last odd byte counts as if a zero followed."""
    return frame[at] << 8 | (frame[at + 1] if at + 1 < end else 0)


def _corrected(checksum: int, before: int, after: int) -> int:
    total = (~checksum & 0xFFFF) + (~before & 0xFFFF) + after
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
