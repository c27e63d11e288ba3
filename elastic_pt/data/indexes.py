"""The block indexes of shards: the SHA-256 of each block, 32 bytes each.

    memory ─► cache ─► store ─► verified: its own SHA-256 is in the page or manifest

Runs in workers and in the command line's process. Safe to share between threads.
"""

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from elastic_pt.data.blocks import OpenShard
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.eviction import INDEX
from elastic_pt.data.local_files import LocalFiles
from elastic_pt.data.manifest import HASH_BYTES, REMEDY, blocks_key
from elastic_pt.data.patience import Patience
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.port import Store

_KEPT: Final = 256
"""In memory, of up to 32 KiB each."""


class BlockIndexes:
    """Reads block indexes, each once at a time, and keeps the last used ones in memory."""

    def __init__(
        self,
        store: Store,
        cache: ShardCache,
        local: LocalFiles | None,
        patience: Patience,
        threads: int,
    ) -> None:
        self._store, self._cache, self._local, self._patience = store, cache, local, patience
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Future[bytes]] = OrderedDict()
        """By the SHA-256 of the shard, the last used one at the end."""
        # Requests for blocks wait for an index, so its own request never waits behind theirs.
        self._threads = ThreadPoolExecutor(threads, "elastic-pt-block-indexes")

    def of(self, shard: OpenShard) -> "Future[bytes]":
        """The block index of a shard, verified. Its errors: those of `Patience.read`, and `DataError` for a damaged one."""
        sha256 = shard.shard.sha256
        with self._lock:
            found = self._found.get(sha256)
            if found is None or (found.done() and (found.cancelled() or found.exception())):
                found = self._begin(shard)
            self._found[sha256] = found
            self._found.move_to_end(sha256)
            if len(self._found) > _KEPT:
                self._found.popitem(last=False)
            return found

    def close(self) -> None:
        """Start no more requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, shard: OpenShard) -> "Future[bytes]":
        if not shard.has_index:
            whole: Future[bytes] = Future()
            whole.set_result(bytes.fromhex(shard.shard.sha256))
            return whole
        try:
            return self._threads.submit(self._read, shard)
        except RuntimeError as error:
            raise StoreError(f"{self._store.url}: the reader was closed") from error

    def _read(self, shard: OpenShard) -> bytes:
        sha256, key = shard.shard.sha256, blocks_key(shard.shard.key)
        size = HASH_BYTES * shard.place.blocks
        if self._local is None and (index := self._cache.content(sha256, INDEX)) is not None:
            if hashlib.sha256(index).hexdigest() == sha256:
                return index
            self._cache.remove(sha256, INDEX, size)
        name = f"{self._store.url}/{key}"
        for _ in range(2):
            index = self._patience.read(name, lambda: self._read_file(key))
            if len(index) == size and hashlib.sha256(index).hexdigest() == sha256:
                if self._local is None:
                    self._cache.keep(sha256, shard.place, INDEX, index)
                return index
        raise DataError(f"{name}: corrupt, its SHA-256 is not that of the manifest; {REMEDY}")

    def _read_file(self, key: str) -> bytes:
        try:
            return self._store.read(key)
        except StoreError:
            # Perhaps this process has too many files open.
            if self._local is None or not self._local.close_half():
                raise
            return self._store.read(key)
