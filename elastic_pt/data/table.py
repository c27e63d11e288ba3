"""Finds the shard that holds a token: by the manifest's list, or by pages that are fetched when they are needed.

    manifest ─► page (a list of shards, verified) ─► shard, and where it starts in its stream

Runs in workers and in the command line's process.
"""

import threading
from collections import OrderedDict
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_pt.data.manifest import Manifest, Page, Shard, Split, Stream, page_shards
from elastic_pt.data.patience import Patience
from elastic_pt.errors import DataError
from elastic_pt.store.port import Store

PAGES_KEPT: Final = 64
"""Pages in memory, about a megabyte each; the least recently used ones are forgotten."""


class Placed(NamedTuple):
    """A shard and its first token's place in the stream."""

    shard: Shard
    start: int

    @property
    def end(self) -> int:
        """The place after its last token."""
        return self.start + self.shard.tokens


class ShardTable:
    """The shards of a manifest by the tokens that they hold. Safe to share between threads."""

    def __init__(self, manifest: Manifest, store: Store, patience: Patience | None = None) -> None:
        self._manifest, self._store = manifest, store
        self._patience = patience or Patience(0.0)
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[int, Split, int], _Part] = OrderedDict()
        """Lists of shards by source, split and number of the page."""
        self._page_ends: dict[tuple[int, Split], NDArray[np.int64]] = {}

    def find(self, source: int, split: Split, token: int) -> Placed:
        """The shard that holds token `token` of a stream, counted from 0.

        Fetches the page if it is not in memory. Raises `IndexError` for a token outside of the stream, `DataError` for
        a damaged page, and `StoreError` for one that cannot be read now.
        """
        stream = self._manifest.sources[source].stream(split)
        if not 0 <= token < self._manifest.sources[source].tokens(split):
            raise IndexError(f"token {token} of source {source} {split}")
        number, start = 0, 0
        if isinstance(stream, Stream):
            ends = self._ends(source, split, stream)
            number = int(np.searchsorted(ends, token, side="right"))
            start = int(ends[number]) - stream.pages[number].tokens
        part = self._part((source, split, number), start)
        index = int(np.searchsorted(part.ends, token, side="right"))
        shard = part.shards[index]
        return Placed(shard, int(part.ends[index]) - shard.tokens)

    def _ends(self, source: int, split: Split, stream: Stream) -> NDArray[np.int64]:
        if (source, split) not in self._page_ends:
            self._page_ends[source, split] = np.cumsum([page.tokens for page in stream.pages])
        return self._page_ends[source, split]

    def _part(self, place: tuple[int, Split, int], start: int) -> "_Part":
        with self._lock:
            if place in self._parts:
                self._parts.move_to_end(place)
                return self._parts[place]
        source, split, number = place
        stream = self._manifest.sources[source].stream(split)
        shards = self._read(stream.pages[number]) if isinstance(stream, Stream) else stream
        part = _Part(
            shards, np.array([*accumulate((each.tokens for each in shards), initial=start)][1:])
        )
        with self._lock:
            self._parts[place] = part
            while len(self._parts) > PAGES_KEPT:
                self._parts.popitem(last=False)
        return part

    def _read(self, page: Page) -> tuple[Shard, ...]:
        """A page, verified; a damaged one is read twice."""
        origin = f"{self._store.url}/{page.key}"
        try:
            return page_shards(self._bytes(page, origin), page, origin=origin)
        except DataError:
            return page_shards(self._bytes(page, origin), page, origin=origin)

    def _bytes(self, page: Page, origin: str) -> bytes:
        return self._patience.read(origin, lambda: self._store.read(page.key))


class _Part(NamedTuple):
    """Consecutive shards of a stream."""

    shards: tuple[Shard, ...]
    ends: NDArray[np.int64]
    """The place in the stream after the last token of each."""
