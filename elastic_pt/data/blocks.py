"""The shards that a process has open, and which of their blocks it has verified.

A block is verified by each process before its first use there: in the bytes from the store, in a file of the cache,
or in a local file. So nothing that another process, a crash or a disk left behind has to be trusted.

Runs in workers and in the command line's process.
"""

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from elastic_pt.data.manifest import Split
from elastic_pt.data.table import Placed
from elastic_pt.errors import DataError

_USED_EVERY_S: Final = 60.0
_OVERLAPS_MAX: Final = 4


class DamagedBlock(DataError):
    """A block that was read twice, and is not the one that the manifest names."""

    def __init__(self, text: str, source: int, split: Split, tokens: range) -> None:
        super().__init__(text)
        self.source, self.split = source, split
        self.tokens: Final = tokens
        """The block's place in its stream."""


class Place(NamedTuple):
    """Where a shard is in the data of a manifest, so that other processes know which rows its blocks hold."""

    fingerprint: str
    """Of the manifest."""
    source: int
    split: Split
    start: int
    """Its first token's place in the stream."""
    size: int
    block_bytes: int
    """Bytes of each block but the last one, which may be shorter."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.block_bytes)

    def span(self, first: int, end: int) -> range:
        """The bytes of the blocks [first, end) in the shard."""
        return range(first * self.block_bytes, min(end * self.block_bytes, self.size))


Extent = tuple[int, int]
"""Consecutive blocks [first, end) of a shard, which are one file of the cache."""

Identity = tuple[int, ...]
"""Values of one file in one state: a change of the file changes them."""

IDENTITY_SIZE: Final = 2
"""Which of them is the size."""


def identity_of(descriptor: int) -> Identity:
    """Of an open file. Empty if the file system does not answer, or the file has no name any more."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return ()
    if not found.st_nlink:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Verified:
    """The blocks of a local shard that this process has verified, in one state of its file."""

    def __init__(self, blocks: int, identity: Identity) -> None:
        self.identity: Final = identity
        """Of the local file; empty before any block is verified."""
        self.blocks: Final = bytearray(blocks)
        """1 for each verified block. Readers take no lock: a byte is set after its block was verified."""


class LocalFile:
    """An open file; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor: Final = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # Not there if the file could not be opened.
        if (descriptor := getattr(self, "descriptor", -1)) >= 0:
            os.close(descriptor)


class CachedExtent:
    """A file of the cache, and which of its blocks this process has verified, or has written."""

    def __init__(self, first: int, end: int, *, verified: bool = False) -> None:
        self.first: Final = first
        self.end: Final = end
        self._verified: Final = bytearray([verified]) * (end - first)

    def is_verified(self, number: int) -> bool:
        """Whether a block of this file, not only one with the same number, is verified."""
        return bool(self._verified[number - self.first])

    def verify(self, number: int) -> None:
        """A block of this file is verified."""
        self._verified[number - self.first] = 1


def _first(extent: CachedExtent) -> int:
    return extent.first


class OpenShard:
    """A shard that this process reads. Safe to share between threads."""

    def __init__(self, placed: Placed, place: Place, *, has_index: bool) -> None:
        self.shard: Final = placed.shard
        self.place: Final = place
        self.has_index: Final = has_index
        """Not with schema 1: the shard is one block, and its hash is known."""
        self.size, self.block_bytes = place.size, place.block_bytes
        self.start, self.end = placed.start, placed.end
        """Its tokens in the stream."""
        self.verified = Verified(place.blocks, ())
        """Replaced, never reset: who has read it before sees the state of the file then."""
        self.file: LocalFile | None = None
        """The local file, while it is open."""
        self._extents: list[CachedExtent] = []
        """Sorted. Replaced, never changed: readers take no lock."""
        self._lock: Final = threading.Lock()
        self._used_s = time.monotonic()

    def verify(self, first: int, end: int, identity: Identity) -> None:
        """The blocks [first, end) are verified, in a local file that had this identity before and after they were read."""
        with self._lock:
            if self.verified.identity != identity:
                self.verified = Verified(self.place.blocks, identity)
            self.verified.blocks[first:end] = b"\1" * (end - first)

    def cached(self, number: int) -> CachedExtent | None:
        """The file of the cache that has a block, as far as this process knows; it may be evicted by now."""
        extents = self._extents
        place = bisect_right(extents, number, key=_first) - 1
        # Two processes may have written overlapping files.
        for each in extents[max(0, place - _OVERLAPS_MAX) : place + 1][::-1]:
            if number < each.end:
                return each
        return None

    def list_extents(self, extents: Iterable[Extent]) -> None:
        """What the cache has of this shard now. What is new is not verified."""
        with self._lock:
            known = {(each.first, each.end): each for each in self._extents}
            found = (known.get(each) or CachedExtent(*each) for each in extents)
            self._extents = sorted(found, key=_first)

    def add_extent(self, extent: CachedExtent) -> None:
        """This process has written a file."""
        with self._lock:
            self._extents = sorted([*self._extents, extent], key=_first)

    def drop_extent(self, extent: CachedExtent) -> None:
        """A file is not there any more, or is damaged."""
        with self._lock:
            self._extents = [each for each in self._extents if each is not extent]

    def is_used(self) -> bool:
        """Record a use. Whether the last record is so old that the cache should have a new one."""
        now_s = time.monotonic()
        if now_s - self._used_s < _USED_EVERY_S:
            return False
        self._used_s = now_s
        return True


class Request(NamedTuple):
    """Consecutive blocks [first, end) of a shard."""

    shard: OpenShard
    first: int
    end: int

    @property
    def span(self) -> range:
        """Their bytes in the shard."""
        return self.shard.place.span(self.first, self.end)

    def part(self, data: bytes, number: int) -> memoryview:
        """The bytes of one block in the bytes of the request; fewer if these end before."""
        span, start = self.shard.place.span(number, number + 1), self.span.start
        return memoryview(data)[span.start - start : span.stop - start]
