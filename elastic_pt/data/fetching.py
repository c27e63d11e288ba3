"""Reads blocks of shards and verifies them: local files where they are, other shards from the cache or the store.

    blocks ─► in flight already? ─► cache ─► claim ─► request, and the block index if it is unknown
           ─► verified ─► bytes for the batch, then into the cache

The SHA-256 of a block is in the block index, whose SHA-256 is in the page or manifest. Whatever the cache does, the
verified bytes reach the batch.

Runs in workers and in the command line's process. Safe to share between threads.
"""

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple, cast

from elastic_pt.data.blocks import (
    IDENTITY_SIZE,
    CachedExtent,
    DamagedBlock,
    OpenShard,
    Place,
    Request,
    identity_of,
)
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.eviction import extent_name
from elastic_pt.data.indexes import BlockIndexes
from elastic_pt.data.local_files import LocalFiles
from elastic_pt.data.manifest import (
    HASH_BYTES,
    REMEDY,
    TOKEN_BYTES,
    Manifest,
    Split,
    largest_block,
)
from elastic_pt.data.patience import Patience
from elastic_pt.data.table import Placed
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.port import Store

FILE_SCHEME: Final = "file://"
REQUEST_BYTES: Final = 4 * 2**20
"""Neighbouring blocks are one request up to this size."""
AT_ONCE_MAX: Final = 16
"""Requests at once."""
_IN_FLIGHT_BYTES_MAX: Final = 256 * 2**20
"""Of all requests at once, unless one block is larger."""
_EXTENT_BYTES: Final = 2**20
_EXTENT_SHARE: Final = 64
"""Blocks that were fetched together are one file up to this size, and this part of the cache."""
_TRANSFER_BYTES: Final = 16 * 2**20
"""Bytes read at once. Only a whole shard of schema 1 has more."""
_CLAIM_TIMEOUT_S: Final = 10.0
"""How long a fetch of another process is waited for. After that, this process fetches the same blocks."""
_MARGIN_S: Final = 10.0
"""More than the limit of a request, which ends it with a better error."""

Block = tuple[OpenShard, int]
"""A shard, and the number of one of its blocks."""


class Fetched(NamedTuple):
    """Verified bytes of some blocks."""

    request: Request
    data: bytes


class _Flight(NamedTuple):
    """A request that runs, or waits for its turn."""

    request: Request
    done: "Future[bytes]"


class BlockReader:
    """Reads blocks: those of a batch, and ahead into the cache.

    A file that is missing, or cannot be read now, is waited for as long as `patience` lasts; then `StoreError` names it.
    """

    def __init__(
        self, manifest: Manifest, store: Store, cache: ShardCache, patience: Patience
    ) -> None:
        self._manifest, self._store, self._cache, self._patience = manifest, store, cache, patience
        self._token_bytes = TOKEN_BYTES[manifest.token_type]
        root = store.url.removeprefix(FILE_SCHEME)
        self._files = LocalFiles(Path(root)) if store.url.startswith(FILE_SCHEME) else None
        self.local: Final = self._files is not None
        self.latency_s = 0.0
        """A moving average over requests to the store."""
        self._lock = threading.Lock()
        self._flights: dict[Block, _Flight] = {}
        largest, _ = largest_block(manifest, held_out=True)
        self._at_once = max(1, min(AT_ONCE_MAX, _IN_FLIGHT_BYTES_MAX // largest))
        # Two: requests of a batch do not queue behind those for later steps.
        self._now, self._ahead = (
            ThreadPoolExecutor(self._at_once, f"elastic-pt-{name}")
            for name in ("blocks", "blocks-ahead")
        )
        self._indexes = BlockIndexes(store, cache, self._files, patience, self._at_once)

    def open(self, placed: Placed, source: int, split: Split) -> OpenShard:
        """A shard to read from. Its files are not touched."""
        size = placed.shard.tokens * self._token_bytes
        block_bytes = min(self._manifest.block_tokens * self._token_bytes or size, size)
        fingerprint = self._manifest.fingerprint
        place = Place(fingerprint, source, split, placed.start, size, block_bytes)
        return OpenShard(placed, place, has_index=bool(self._manifest.block_tokens))

    def read_all(self, blocks: Iterable[Block]) -> Iterator[Fetched]:
        """The verified bytes of blocks that are needed now, in any order, and of some of their neighbours.

        Many at a time, but no more than the caller can take: a batch may need more blocks than fit into memory.
        Raises `StoreError` if nothing arrives within the limit, or when the reader is closed.
        """
        requests = requests_of(blocks)
        if self.local:
            yield from (Fetched(each, self._read_local(each)) for each in requests)
            return
        left = iter(requests)
        running: dict[Future[bytes], Request] = {}
        closed = self._patience.closed
        limit_s = self._patience.timeout_s + _MARGIN_S if self._patience.timeout_s else None
        while True:
            while len(running) < self._at_once and (request := next(left, None)):
                running |= {flight.done: flight.request for flight in self._start(request)}
            if not running:
                return
            arrived = wait(
                cast(list[Future[bytes]], [*running, closed]), limit_s, FIRST_COMPLETED
            ).done
            if closed.done():
                raise StoreError(f"{self._store.url}: the reader was closed")
            if not arrived:
                key = next(iter(running.values())).shard.shard.key
                raise StoreError(f"{self._name(key)}: did not arrive within {limit_s:g} s")
            for done in arrived:
                yield Fetched(running.pop(done), done.result())

    def read_ahead(self, blocks: Iterable[Block]) -> None:
        """Fetch blocks that are needed soon. Returns at once; errors are left to the read that needs the blocks."""
        with self._lock:
            new = [block for block in blocks if block not in self._flights]
        for request in requests_of(new):
            self._submit(request, self._ahead)

    def close(self) -> None:
        """Start no more requests. Running ones end with their present attempt."""
        for pool in (self._now, self._ahead):
            pool.shutdown(wait=False, cancel_futures=True)
        self._indexes.close()

    def _start(self, request: Request) -> list[_Flight]:
        """The requests that bring some blocks: those that were started, and new ones for other blocks."""
        shard, first, end = request
        flights: dict[Future[bytes], _Flight] = {}
        missing = []
        with self._lock:
            for number in range(first, end):
                flight = self._flights.get((shard, number))
                # Also one that is queued: requests for later steps are behind it.
                if flight is not None:
                    flights[flight.done] = flight
                else:
                    missing.append((shard, number))
        new = [self._submit(each, self._now) for each in requests_of(missing)]
        return [*flights.values(), *new]

    def _submit(self, request: Request, pool: ThreadPoolExecutor) -> _Flight:
        flight = _Flight(request, Future())
        with self._lock:
            for number in range(request.first, request.end):
                self._flights[request.shard, number] = flight
        try:
            pool.submit(self._fly, flight)
        except RuntimeError:
            flight.done.set_exception(StoreError(f"{self._store.url}: the reader was closed"))
            self._land(flight)
        return flight

    def _fly(self, flight: _Flight) -> None:
        request, done = flight
        done.set_running_or_notify_cancel()
        try:
            with ExitStack() as claims:
                data, fetched = self._read_remote(request, claims)
                done.set_result(data)
                # The batch has its bytes: this may wait for room. Who waits for the claims finds the blocks.
                self._keep(request, data, fetched)
        except BaseException as error:
            # What happens to the cache after the result ends nothing.
            if not done.done():
                done.set_exception(error)
        finally:
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        request = flight.request
        with self._lock:
            for number in range(request.first, request.end):
                if self._flights.get((request.shard, number)) is flight:
                    del self._flights[request.shard, number]

    def _read_remote(self, request: Request, claims: ExitStack) -> tuple[bytes, list[Request]]:
        """The verified bytes of blocks, and the parts that were not in the cache, which stay claimed."""
        shard = request.shard
        until_s = time.monotonic() + _CLAIM_TIMEOUT_S
        found = self._cached(request)
        fetched: list[Request] = []
        for part in requests_of((shard, number) for number in found if found[number] is None):
            numbers = range(part.first, part.end)
            claim = self._cache.claimed(shard.shard.sha256, part.first, part.end, until_s=until_s)
            if claims.enter_context(claim):
                found |= self._cached(part)
                if all(found[number] is not None for number in numbers):
                    continue
            data = self._verified(part)
            found |= {number: part.part(data, number) for number in numbers}
            fetched.append(part)
        return b"".join(each for each in found.values() if each is not None), fetched

    def _cached(self, request: Request) -> dict[int, bytes | memoryview | None]:
        """The verified bytes of each block that is in the cache."""
        shard, first, end = request
        if any(shard.cached(number) is None for number in range(first, end)):
            shard.list_extents(self._cache.extents(shard.shard.sha256))
        return {number: self._cached_block(shard, number) for number in range(first, end)}

    def _cached_block(self, shard: OpenShard, number: int) -> bytes | None:
        extent = shard.cached(number)
        if extent is None:
            return None
        one = Request(shard, number, number + 1)
        of_extent = shard.place.span(extent.first, extent.end)
        start = one.span.start - of_extent.start
        sha256, name = shard.shard.sha256, extent_name(extent.first, extent.end)
        data = self._cache.content(sha256, name, start, start + len(one.span))
        if data is None:
            shard.drop_extent(extent)
            return None
        # Also if this process has verified it before: it may be another file now, or a shorter one.
        if not _holds(one, data, self._indexes.of(shard).result(), number):
            # A crash or a disk has damaged it.
            shard.drop_extent(extent)
            self._cache.remove(sha256, name, len(of_extent))
            return None
        extent.verify(number)
        return data

    def _keep(self, request: Request, data: bytes, fetched: list[Request]) -> None:
        shard, of_all = request.shard, request.span.start
        most = max(
            1, min(_EXTENT_BYTES, self._cache.bytes_max // _EXTENT_SHARE) // shard.block_bytes
        )
        for part in fetched:
            for first in range(part.first, part.end, most):
                end = min(first + most, part.end)
                span = shard.place.span(first, end)
                content = memoryview(data)[span.start - of_all : span.stop - of_all]
                sha256, name = shard.shard.sha256, extent_name(first, end)
                if self._cache.has(sha256, name):
                    # By another process, or a damaged one that could not be removed: it is verified when it is read.
                    continue
                if self._cache.keep(sha256, shard.place, name, content):
                    shard.add_extent(CachedExtent(first, end, verified=True))

    def _read_local(self, request: Request) -> bytes:
        """The verified bytes of blocks of a local file."""
        shard, first, end = request
        files = self._files
        assert files is not None
        name = self._name(shard.shard.key)
        before = self._patience.read(name, lambda: files.identity(shard))
        found, size = before[IDENTITY_SIZE], shard.place.size
        if found > size:
            raise DataError(f"{name}: {_wrong_size(found, size)}; {REMEDY}")
        data = self._verified(request)
        # Otherwise it changes: these bytes are right, the next ones are verified again.
        if shard.file is not None and identity_of(shard.file.descriptor) == before:
            shard.verify(first, end, before)
        return data

    def _verified(self, request: Request) -> bytes:
        """The bytes of some blocks from the store, each verified. A damaged one is read twice."""
        shard, first, end = request
        # At the same time as the data: one round trip.
        known = self._indexes.of(shard)
        data = self._bytes(shard, request.span)
        index = known.result()
        damaged = [each for each in range(first, end) if not _holds(request, data, index, each)]
        if damaged:
            repaired = bytearray(data.ljust(len(request.span), b"\0"))
            for number in damaged:
                one = Request(shard, number, number + 1)
                again = self._bytes(shard, one.span)
                if not _holds(one, again, index, number):
                    raise self._damaged(one, len(again))
                start = one.span.start - request.span.start
                repaired[start : start + len(again)] = again
            data = bytes(repaired)
        return data

    def _bytes(self, shard: OpenShard, span: range) -> bytes:
        """Bytes of a shard in the store; fewer if the file ends before."""
        parts = [
            self._part(shard, start, min(start + _TRANSFER_BYTES, span.stop))
            for start in range(span.start, span.stop, _TRANSFER_BYTES)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, shard: OpenShard, start: int, end: int) -> bytes:
        key, size = shard.shard.key, shard.place.size
        files = self._files
        if files is not None:
            return self._patience.read(self._name(key), lambda: files.read(shard, start, end))
        began_s = time.monotonic()
        # One byte more at the end of the shard shows a file that is too large.
        data = self._patience.read(
            self._name(key), lambda: self._store.read(key, start, end + (end == size))
        )
        taken_s = time.monotonic() - began_s
        self.latency_s += (taken_s - self.latency_s) / (4 if self.latency_s else 1)
        if len(data) > end - start:
            raise DataError(
                f"{self._name(key)}: more than {size} bytes where the manifest says {size}; {REMEDY}"
            )
        return data

    def _damaged(self, request: Request, found_bytes: int) -> DamagedBlock:
        shard, span = request.shard, request.span
        place = shard.place
        tokens = range(
            shard.start + span.start // self._token_bytes,
            shard.start + span.stop // self._token_bytes,
        )
        if found_bytes < len(span):
            trouble = _wrong_size(span.start + found_bytes, place.size)
        else:
            trouble = "corrupt, its SHA-256 is not that of the manifest"
        source = self._manifest.sources[place.source].name
        return DamagedBlock(
            f"{self._name(shard.shard.key)}: {trouble} (block {request.first} of {place.blocks}, "
            f"tokens {tokens.start} to {tokens.stop} of source {source}, {place.split}); {REMEDY}",
            place.source,
            place.split,
            tokens,
        )

    def _name(self, key: str) -> str:
        return f"{self._store.url}/{key}"


def requests_of(blocks: Iterable[Block]) -> list[Request]:
    """Requests for some blocks; neighbours are one request."""
    requests: list[Request] = []
    for shard, block in sorted(blocks, key=lambda each: (id(each[0]), each[1])):
        last = requests[-1] if requests else None
        if (
            last is not None
            and last.shard is shard
            and last.end == block
            and len(last.span) + shard.place.block_bytes <= REQUEST_BYTES
        ):
            requests[-1] = last._replace(end=block + 1)
        else:
            requests.append(Request(shard, block, block + 1))
    return requests


def _wrong_size(found: int, expected: int) -> str:
    return f"{found} bytes where the manifest says {expected}"


def _holds(request: Request, data: bytes, index: bytes, number: int) -> bool:
    """Whether the bytes of a request have the right block `number`."""
    block = request.part(data, number)
    size = len(request.shard.place.span(number, number + 1))
    expected = index[number * HASH_BYTES : (number + 1) * HASH_BYTES]
    return len(block) == size and hashlib.sha256(block).digest() == expected
