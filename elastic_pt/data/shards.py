"""Reads windows of tokens from shards; each block is verified before this process uses it.

A shard is an array of little-endian token ids and nothing else. The train stream of a source is the
concatenation of its train shards. Row r of it is the window of sequence_length + 1 ids that starts at
r * sequence_length. So neighbouring rows share one id: the last target of one is the first input of the
next. A window may cross from one block or shard into the next.

    rows ─► shards ─► rows whose blocks are here and verified: copied ─► the others: blocks fetched, then copied
"""

import os
import threading
import time
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_pt.data.blocks import DamagedBlock, LocalFile, OpenShard, Verified, identity_of
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.eviction import NextStep, Order, extent_name
from elastic_pt.data.fetching import Block, BlockReader
from elastic_pt.data.ignored import IgnoredTokens
from elastic_pt.data.manifest import TOKEN_BYTES, Manifest, Split, largest_block
from elastic_pt.data.patience import Patience
from elastic_pt.data.readings import rows_holding
from elastic_pt.data.table import ShardTable
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.port import Store

_AHEAD_SHARE: Final = 8
"""Each process may fetch this part of the cache ahead, so that processes do not evict each other's blocks."""
_ROOM: Final = 2
"""The cache has room for so many times what this process reads together: others use it, too."""
_TOGETHER_BYTES: Final = 2**19
"""Of neighbouring rows that are soon read too: fetched in one request, instead of one for each block."""
_OPEN_MAX: Final = 2**15
"""Shards in memory, of about two kilobytes each."""


class _Piece(NamedTuple):
    """Tokens of one block, and where they go."""

    shard: OpenShard
    number: int
    target: memoryview
    offset: int
    """In the block, in bytes."""


class _Stream:
    """The open shards of one split of one source. Readers take no lock."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        """Sorted."""
        self.by_start: dict[int, OpenShard] = {}


class TokenReader:
    """Reads windows of token ids.

    Shards of a `file://` store are read where they are. Blocks of others are fetched into `cache`, where all
    workers of a machine share them. A file that is missing now is waited for up to `timeout_s`.
    The tokens of `ignored`, each a source and its train tokens, are not read: `windows` has `~end_token_id` there.
    Runs in workers and in the command line's process; safe to share between threads.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        *,
        cache: ShardCache,
        timeout_s: float = 0.0,
        ignored: Sequence[tuple[int, range]] = (),
    ) -> None:
        self._manifest, self._cache = manifest, cache
        self._ignored = IgnoredTokens(ignored)
        self._patience = Patience(timeout_s)
        self._table = ShardTable(manifest, store, self._patience)
        self._blocks = BlockReader(manifest, store, cache, self._patience)
        self._type = np.dtype(manifest.token_type).newbyteorder("<")
        self._token_bytes = TOKEN_BYTES[manifest.token_type]
        self._largest_block_bytes, _ = largest_block(manifest, held_out=False)
        # One thread: the blocks of earlier steps are requested first, and wait for nothing but pages.
        self._announcements = ThreadPoolExecutor(1, "elastic-pt-announce")
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, Split], _Stream] = {
            (number, split): _Stream()
            for number in range(len(manifest.sources))
            for split in ("train", "held_out")
        }
        self._opened = 0
        self._announced: set[tuple[int, int]] = set()
        """First rows of what was fetched ahead, since a block was missing for the last time."""
        self._chunk_rows: Sequence[int] = ()
        self.late = 0
        """How often train rows were read whose blocks were not here."""
        self.store_wait_s = 0.0
        """Seconds so far that `windows` waited for the store."""

    def windows(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> torch.Tensor:
        """Token ids of `(source, row)` train windows: int64 [rows, sequence_length + 1].

        Raises `DataError` for damaged data, which names the file and the rows of a damaged block, and `StoreError` for
        a file that cannot be read now.
        """
        try:
            if self._ignored:
                return self._windows_around(rows, sequence_length)
            return self._windows(rows, sequence_length)
        except DamagedBlock as error:
            raise self._with_rows(error, sequence_length) from error

    def _windows(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> torch.Tensor:
        raw = np.empty((len(rows), sequence_length + 1), dtype=self._type)
        self._read_into(raw, [(source, row * sequence_length) for source, row in rows], "train")
        return torch.from_numpy(raw.astype(np.int64))

    def _windows_around(
        self, rows: Sequence[tuple[int, int]], sequence_length: int
    ) -> torch.Tensor:
        """As `_windows`, without the ignored tokens."""
        shape = (len(rows), sequence_length + 1)
        windows = torch.full(shape, ~self._manifest.end_token_id, dtype=torch.int64)
        tokens = [
            (source, range(row * sequence_length, (row + 1) * sequence_length + 1))
            for source, row in rows
        ]
        whole = [place for place, each in enumerate(tokens) if not self._ignored.touch(*each)]
        windows[whole] = self._windows([rows[place] for place in whole], sequence_length)
        for place in set(range(len(rows))) - set(whole):
            source, wanted = tokens[place]
            for part in self._ignored.intact(source, wanted):
                into = slice(part.start - wanted.start, part.stop - wanted.start)
                windows[place, into] = self.stream(source, "train", part.start, part.stop)
        return windows

    def stream(self, source: int, split: Split, start: int, end: int) -> torch.Tensor:
        """Token ids `[start, end)` of a source's stream: int64 [end - start]."""
        raw = np.empty((1, end - start), dtype=self._type)
        self._read_into(raw, [(source, start)], split)
        return torch.from_numpy(raw[0].astype(np.int64))

    @property
    def latency_s(self) -> float:
        """Of recent requests to the store; 0 before the first one, and for local files."""
        return self._blocks.latency_s

    @property
    def rows_ahead_max(self) -> int:
        """Rows whose blocks may be fetched ahead, so that they do not evict each other. 0 for local files."""
        if self._blocks.local:
            return 0
        # Not what is fetched with them: the cache has room for that (`follow`).
        return self._cache.bytes_max // (_AHEAD_SHARE * self._largest_block_bytes)

    def expect(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> None:
        """Fetch the blocks of train rows, which are read soon, into the cache. Returns at once."""
        # After `close` nothing is read ahead.
        with suppress(RuntimeError):
            self._announcements.submit(self._announce, rows, sequence_length)

    def follow(
        self, next_step: NextStep, chunk_rows: Sequence[int] = (), open_tokens: int = 0
    ) -> None:
        """Evict by the order of a run: the blocks that it needs last go first.

        `chunk_rows`: for each source, how many consecutive rows this process reads soon after one another; in all, it has
        begun to read `open_tokens`. If the cache holds them, some of these rows are fetched with each one.
        """
        fits = _ROOM * open_tokens * self._token_bytes <= self._cache.bytes_max
        self._chunk_rows = chunk_rows if fits and max(chunk_rows, default=1) > 1 else ()
        self._cache.order = Order(self._manifest.fingerprint, self._token_bytes, next_step)

    def close(self) -> None:
        """Start no more requests, and end what waits for one."""
        self._patience.close()
        self._announcements.shutdown(wait=False, cancel_futures=True)
        self._blocks.close()

    def _announce(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> None:
        if not self._cache.writes:
            # What is fetched now would be fetched again.
            return
        # Errors are left to the read that needs the blocks.
        with suppress(StoreError, DataError, IndexError):
            wanted: set[Block] = set()
            for source, row in rows:
                first, count = self._neighbours(source, row, sequence_length)
                if (source, first) not in self._announced:
                    if len(self._announced) >= _OPEN_MAX:
                        self._announced.clear()
                    self._announced.add((source, first))
                    wanted.update(self._blocks_of(source, first, count, sequence_length))
            self._blocks.read_ahead(block for block in wanted if not self._is_here(block))

    def _blocks_of(
        self, source: int, row: int, count: int, sequence_length: int
    ) -> Iterator[Block]:
        """The blocks of some consecutive train rows, without ignored ones."""
        token, end = row * sequence_length, (row + count) * sequence_length + 1
        while token < end:
            shard = self._find(source, "train", token)
            tokens = shard.block_bytes // self._token_bytes
            number = (token - shard.start) // tokens
            first = shard.start + number * tokens
            token = min(first + tokens, shard.end)
            if not self._ignored.touch(source, range(first, token)):
                yield shard, number

    def _neighbours(self, source: int, row: int, sequence_length: int) -> tuple[int, int]:
        """The first one and the number of consecutive rows of a chunk that are fetched with a row."""
        if not self._chunk_rows:
            return row, 1
        in_chunk = self._chunk_rows[source]
        count = min(in_chunk, max(1, _TOGETHER_BYTES // (sequence_length * self._token_bytes)))
        chunk, place = divmod(row, in_chunk)
        first = chunk * in_chunk + place // count * count
        rows = self._manifest.sources[source].rows(sequence_length)
        return first, min(count, (chunk + 1) * in_chunk - first, rows - first)

    def _is_here(self, block: Block) -> bool:
        """Whether a block is in the cache and verified, as far as this process knows."""
        shard, number = block
        extent = shard.cached(number)
        return extent is not None and extent.is_verified(number)

    def _read_into(
        self, raw: NDArray[np.unsignedinteger], spans: Sequence[tuple[int, int]], split: Split
    ) -> None:
        """Fill each row of `raw` with the tokens of a stream from `(source, start)` on."""
        if not raw.size:
            return
        view, size = raw.view(np.uint8).reshape(-1).data, raw.strides[0]
        places: Iterable[int] = range(len(spans))
        if self._blocks.local:
            places = self._copy_local(view, size, spans, split)
        needed: dict[Block, list[_Piece]] = {}
        for place in places:
            for piece in self._pieces(
                *spans[place], view[place * size : (place + 1) * size], split
            ):
                if self._blocks.local or not self._copy_cached(piece):
                    needed.setdefault((piece.shard, piece.number), []).append(piece)
        if needed:
            self._fetch(needed, late=split == "train")

    def _copy_local(
        self, view: memoryview, size: int, spans: Sequence[tuple[int, int]], split: Split
    ) -> list[int]:
        """Copy the spans whose blocks are verified. Returns the places of the others."""
        token_bytes, find, preadv = self._token_bytes, self._find, os.preadv
        seen: dict[OpenShard, tuple[bytearray, int, Verified, LocalFile | None]] = {}
        done, left = [], []
        at = 0
        for place, (source, start) in enumerate(spans):
            # A loop of two microseconds per row: half of the loader's time.
            shard = find(source, split, start)
            state = seen.get(shard)
            if state is None:
                verified, file = shard.verified, shard.file
                state = (verified.blocks, file.descriptor if file else -1, verified, file)
                seen[shard] = state
            blocks, descriptor, _, _ = state
            first = (start - shard.start) * token_bytes
            end = first + size
            block_bytes = shard.block_bytes
            is_done = (
                descriptor >= 0
                and end <= shard.size
                and blocks.find(0, first // block_bytes, (end - 1) // block_bytes + 1) < 0
            )
            if is_done:
                try:
                    is_done = preadv(descriptor, (view[at : at + size],), first) == size
                except OSError:
                    is_done = False
            if is_done:
                done.append((shard, place))
            else:
                left.append(place)
            at += size
        # After the bytes were copied: what they were copied from has been verified.
        changed = {
            shard
            for shard, (_, descriptor, verified, _) in seen.items()
            if descriptor >= 0 and identity_of(descriptor) != verified.identity
        }
        if changed:
            left += [place for shard, place in done if shard in changed]
        return left

    def _copy_cached(self, piece: _Piece) -> bool:
        """Copy tokens of a block that is in the cache, if this process has verified it."""
        shard, number, target, offset = piece
        extent = shard.cached(number)
        if extent is None or not extent.is_verified(number):
            return False
        path = f"{self._cache.directory_of(shard.shard.sha256)}/{extent_name(extent.first, extent.end)}"
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            shard.drop_extent(extent)
            return False
        try:
            is_done = _read_at(file, target, offset + (number - extent.first) * shard.block_bytes)
        finally:
            os.close(file)
        if shard.is_used():
            self._cache.used(shard.shard.sha256)
        return is_done

    def _fetch(self, needed: dict[Block, list[_Piece]], *, late: bool) -> None:
        """Fetch blocks, and copy their pieces."""
        began_s = time.monotonic()
        try:
            for request, data in self._blocks.read_all(needed):
                for number in range(request.first, request.end):
                    part = request.part(data, number)
                    for piece in needed.pop((request.shard, number), ()):
                        piece.target[:] = part[piece.offset : piece.offset + len(piece.target)]
            assert not needed, "a block did not come, and nothing said why"
        finally:
            if late:
                self.late += 1
                self._announced.clear()
                if not self._blocks.local:
                    self.store_wait_s += time.monotonic() - began_s

    def _pieces(
        self, source: int, start: int, target: memoryview, split: Split
    ) -> Iterator[_Piece]:
        """The parts by block of the tokens of a stream from `start` on, which go into `target`."""
        token, done = start, 0
        while done < len(target):
            shard = self._find(source, split, token)
            number, offset = divmod((token - shard.start) * self._token_bytes, shard.block_bytes)
            size = min(shard.block_bytes, shard.size - number * shard.block_bytes)
            count = min(len(target) - done, size - offset)
            yield _Piece(shard, number, target[done : done + count], offset)
            token, done = token + count // self._token_bytes, done + count

    def _find(self, source: int, split: Split, token: int) -> OpenShard:
        """The shard that holds a token."""
        stream = self._streams[source, split]
        # Once: another thread may forget all shards.
        starts = stream.starts
        place = bisect_right(starts, token) - 1
        if place >= 0:
            shard = stream.by_start.get(starts[place])
            if shard is not None and token < shard.end:
                return shard
        shard = self._blocks.open(self._table.find(source, split, token), source, split)
        with self._lock:
            known = stream.by_start.get(shard.start)
            if known is not None:
                return known
            if self._opened >= _OPEN_MAX:
                self._forget_all()
            self._opened += 1
            # In this order: who finds a start finds its shard.
            stream.by_start[shard.start] = shard
            insort(stream.starts, shard.start)
        return shard

    def _forget_all(self) -> None:
        """Forget all shards; those in use are opened again, and their blocks verified again."""
        for each in self._streams.values():
            each.starts, each.by_start = [], {}
        self._opened = 0

    def _with_rows(self, error: DamagedBlock, sequence_length: int) -> DamagedBlock:
        """The error with the rows that have tokens of the block."""
        source = self._manifest.sources[error.source]
        rows = rows_holding(error.tokens, sequence_length, source.rows(sequence_length))
        text = f"{error}; in rows {source.name}:{rows.start} to {source.name}:{rows.stop - 1}"
        return DamagedBlock(text, error.source, error.split, error.tokens)


def _read_at(descriptor: int, target: memoryview, start: int) -> bool:
    """Whether the target was filled with the bytes of the file from `start` on."""
    try:
        return os.preadv(descriptor, (target,), start) == len(target)
    except OSError:
        return False
