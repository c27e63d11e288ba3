"""The process in the path of one node: it copies frames between two interfaces, and disturbs some of them.

    [hub: bridge ── inner ── outer] ═══ forwarder ═══ [port ── eth0 of the node]

Frames are read and written with the kernel's own header about them (`PACKET_VNET_HDR`). So segments larger than the MTU and
checksums that the kernel has not computed yet pass as they are. `Wire` starts it. Each line on standard input asks
for the counts, which it writes as one line of JSON; it ends when its input ends.
"""

import heapq
import json
import os
import random
import selectors
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from elastic_pt.fleet.frames import flip_payload_bit

_ALL_PROTOCOLS: Final = 3
_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 32 << 20
_FRAME_BYTES_MAX: Final = 70_000
_FRAMES_AT_ONCE: Final = 64
_INPUT: Final = 0


@dataclass(frozen=True)
class Disturbance:
    """What happens to the frames of a node, in both directions. A share is a probability for each frame.

    The kernel puts up to 64 KiB of a TCP stream into one frame here.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Uniformly drawn from 0 to this and added to the delay: frames overtake each other."""
    lost: float = 0.0
    duplicated: float = 0.0
    flipped: float = 0.0
    """Of the frames with a TCP payload: one bit of it is wrong, and the checksum is right."""


class Forwarder:
    """Copies and counts. One thread."""

    def __init__(self, interfaces: tuple[str, str], disturbance: Disturbance, seed: int) -> None:
        self._disturbance = disturbance
        self._draw = random.Random(seed)
        self._counts: Counter[str] = Counter(frames=0, lost=0, duplicated=0, flipped=0)
        self._number = 0
        self._waiting: list[tuple[float, int, bytes, socket.socket]] = []
        one, other = (_open(name) for name in interfaces)
        self._selector = selectors.DefaultSelector()
        self._selector.register(_INPUT, selectors.EVENT_READ)
        self._selector.register(one, selectors.EVENT_READ, other)
        self._selector.register(other, selectors.EVENT_READ, one)

    def run(self) -> None:
        """Forward until the input ends."""
        while True:
            timeout_s = self._waiting[0][0] - time.monotonic() if self._waiting else None
            for key, _ in self._selector.select(timeout_s):
                if isinstance(key.fileobj, socket.socket):
                    self._receive(key.fileobj, key.data)
                elif os.read(_INPUT, 4096):
                    print(json.dumps(self._counts), flush=True)
                else:
                    return
            self._send()

    def _receive(self, here: socket.socket, there: socket.socket) -> None:
        for _ in range(_FRAMES_AT_ONCE):
            try:
                frame = here.recv(_FRAME_BYTES_MAX)
            except OSError:  # nothing left, or the link is down
                return
            self._take(frame, there)

    def _take(self, frame: bytes, there: socket.socket) -> None:
        chosen, draw = self._disturbance, self._draw.random
        self._counts["frames"] += 1
        if draw() < chosen.lost:
            self._counts["lost"] += 1
            return
        if draw() < chosen.flipped and (wrong := flip_payload_bit(frame, self._draw.randrange)):
            self._counts["flipped"] += 1
            frame = wrong
        self._later(frame, there)
        if draw() < chosen.duplicated:
            self._counts["duplicated"] += 1
            self._later(frame, there)

    def _later(self, frame: bytes, there: socket.socket) -> None:
        chosen = self._disturbance
        due_s = time.monotonic() + chosen.delay_s + self._draw.random() * chosen.jitter_s
        self._number += 1
        heapq.heappush(self._waiting, (due_s, self._number, frame, there))

    def _send(self) -> None:
        now_s = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, frame, there = heapq.heappop(self._waiting)
            try:
                there.send(frame)
            except OSError:  # the link is down, or its queue is full: a switch drops the frame too
                self._counts["lost"] += 1


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    opened.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    opened.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
    opened.setblocking(False)
    opened.bind((interface, _ALL_PROTOCOLS))
    return opened


def main() -> None:
    """`python -m elastic_pt.fleet.forwarder INTERFACE INTERFACE SEED DISTURBANCE`, the last as JSON. Needs root."""
    one, other, seed, disturbance = sys.argv[1:]
    forwarder = Forwarder((one, other), Disturbance(**json.loads(disturbance)), int(seed))
    print("{}", flush=True)
    forwarder.run()


if __name__ == "__main__":
    main()
