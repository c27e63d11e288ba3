"""A flipped bit of a TCP payload gets past the receiver's checksum."""

import ipaddress
import struct

import pytest

from elastic_pt.fleet.frames import VNET_BYTES, flip_payload_bit

NEEDS_CHECKSUM = 1
ETHERNET = bytes(12)
SOURCES = {4: ("10.77.0.1", "10.77.0.2"), 6: ("fd77::1", "fd77::2")}
OPTIONS = bytes(12)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071), computed from scratch."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame_of(
    version: int, payload: bytes, *, flags: int = 0, protocol: int = 6, padding: int = 0
) -> bytes:
    """A frame with a right checksum."""
    head = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, (20 + len(OPTIONS)) // 4 << 4, 16, 512, 0, 0)
    segment = head + OPTIONS + payload
    right = checksum(segment + covered(version, len(segment)))
    segment = segment[:16] + struct.pack("!H", right) + segment[18:]
    addresses = b"".join(ipaddress.ip_address(each).packed for each in SOURCES[version])
    if version == 4:
        ip = (
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 7, 0x4000, 64, protocol, 0)
            + addresses
        )
    else:
        ip = struct.pack("!IHBB", 6 << 28, len(segment), protocol, 64) + addresses
    kind = struct.pack("!H", 0x0800 if version == 4 else 0x86DD)
    return bytes([flags]) + bytes(VNET_BYTES - 1) + ETHERNET + kind + ip + segment + bytes(padding)


def covered(version: int, length: int) -> bytes:
    """The pseudo header of a segment of this length."""
    addresses = b"".join(ipaddress.ip_address(each).packed for each in SOURCES[version])
    return addresses + struct.pack("!II", length, 6)


def segment_of(version: int, frame: bytes, padding: int) -> bytes:
    """The TCP segment of a frame."""
    begin = VNET_BYTES + 14 + (20 if version == 4 else 40)
    return frame[begin : len(frame) - padding]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("padding", [0, 6])
def test_each_flipped_bit_passes_the_checksum(version: int, size: int, padding: int) -> None:
    """Whichever bit flips: it is the only change of the payload, and the receiver's sum is still right."""
    payload = bytes(range(200, 200 + size)) if size < 50 else bytes(size)
    frame = frame_of(version, payload, padding=padding)
    for bit in range(8 * size):
        seen: list[int] = []
        wrong = flip_payload_bit(frame, lambda count: seen.append(count) or bit)
        assert wrong is not None
        assert seen == [8 * size]
        segment = segment_of(version, wrong, padding)
        assert checksum(segment + covered(version, len(segment))) == 0
        flipped = int.from_bytes(segment[32:], "big") ^ int.from_bytes(payload, "big")
        assert flipped.bit_count() == 1
        assert wrong[: -len(segment) - padding] == frame[: -len(segment) - padding]


def test_checksum_that_the_kernel_still_computes_is_left_alone() -> None:
    """With the kernel's mark, the field holds only the sum of the pseudo header."""
    frame = frame_of(4, b"payload", flags=NEEDS_CHECKSUM)
    wrong = flip_payload_bit(frame, lambda _: 0)
    assert wrong is not None
    differs = [place for place, byte in enumerate(wrong) if byte != frame[place]]
    assert differs == [len(frame) - len(b"payload")]


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(4, b""),
        frame_of(6, b"", padding=6),
        frame_of(4, b"payload", protocol=17),
        frame_of(4, b"payload")[:40],
        bytes(VNET_BYTES + 60),
        b"",
    ],
    ids=["empty", "empty and padded", "UDP", "cut", "no IP", "nothing"],
)
def test_frames_without_a_tcp_payload_have_nothing_to_flip(frame: bytes) -> None:
    """Headers stay right: only what an application reads is changed."""
    assert flip_payload_bit(frame, lambda _: 0) is None
