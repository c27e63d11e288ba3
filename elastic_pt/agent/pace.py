"""Bounds how many bytes per second the mirrors of a node read. The clock is an argument."""

import threading
from typing import Final

from elastic_pt.checkpoint.peer import RANGE_BYTES_MAX

_CHUNK_S: Final = 0.25
"""Time that one request should take at the bound: shorter ones cost more, longer ones come in bursts."""
_CHUNK_BYTES_MIN: Final = 64 << 10


class Pace:
    """A token bucket that all mirrors of a node share. It may be empty: then the next request waits. Thread-safe."""

    def __init__(self, bytes_per_s: int) -> None:
        """0: no bound."""
        self._bytes_per_s = bytes_per_s
        self._free_at_s = float("-inf")
        """When the bytes that were asked for have passed at the bound."""
        self._lock = threading.Lock()

    @property
    def chunk_bytes(self) -> int:
        """Most bytes of one request."""
        if not self._bytes_per_s:
            return RANGE_BYTES_MAX
        return min(RANGE_BYTES_MAX, max(_CHUNK_BYTES_MIN, int(self._bytes_per_s * _CHUNK_S)))

    def wait_s(self, size: int, now_s: float) -> float:
        """Seconds to wait before the request for the next `size` bytes."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            start_s = max(now_s, self._free_at_s)
            self._free_at_s = start_s + size / self._bytes_per_s
        return start_s - now_s
