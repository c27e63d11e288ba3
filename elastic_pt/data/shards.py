"""Token shards: written once by `prepare`, verified and memory-mapped by every worker.

A shard is an array of little-endian token ids and nothing else. The train stream of a source is the
concatenation of its train shards. Row r of it is the window of sequence_length + 1 ids that starts at
r * sequence_length. So neighbouring rows share one id: the last target of one is the first input of the
next. A window may cross from one shard into the next.
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_pt.data.cache import ShardCache
from elastic_pt.data.manifest import REMEDY, TOKEN_BYTES, Manifest, Shard, Split, TokenType
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.port import Store

SHARD_TOKENS = 32 * 1024 * 1024
TRANSFER_BYTES = 32 * 1024 * 1024
"""Bytes downloaded at once."""

HASH_CHARACTERS = 12
"""Characters of the SHA-256 in a file name."""

FILE_SCHEME = "file://"


class ShardWriter:
    """Collects the token ids of one split of one source, and writes each shard when it is full."""

    def __init__(self, store: Store, prefix: str, token_type: TokenType, shard_tokens: int) -> None:
        self._store, self._prefix, self._shard_tokens = store, prefix, shard_tokens
        self._type = np.dtype(token_type).newbyteorder("<")
        self._pending: list[NDArray[np.unsignedinteger]] = []
        self._pending_tokens = 0
        self._shards: list[Shard] = []

    def add(self, ids: Sequence[int] | NDArray[np.unsignedinteger]) -> None:
        """Append the ids of one document."""
        self._pending.append(np.asarray(ids, dtype=self._type))
        self._pending_tokens += len(ids)
        while self._pending_tokens >= self._shard_tokens:
            self._write(self._shard_tokens)

    def close(self) -> tuple[Shard, ...]:
        """Write what is left and return all shards in order."""
        if self._pending_tokens:
            self._write(self._pending_tokens)
        return tuple(self._shards)

    def _write(self, tokens: int) -> None:
        joined = np.concatenate(self._pending)
        self._pending, self._pending_tokens = [joined[tokens:]], len(joined) - tokens
        data = joined[:tokens].tobytes()
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"{self._prefix}-{len(self._shards):05d}-{sha256[:HASH_CHARACTERS]}.bin"
        self._store.write(key, data)
        self._shards.append(Shard(key, tokens, sha256))


@dataclass(frozen=True)
class _Mapped:
    """A shard that this process has memory-mapped."""

    tokens: NDArray[np.unsignedinteger]
    cached_bytes: int
    """Bytes of this shard in the cache; other processes cannot remove it while it is mapped. 0 if mapped in place."""


class TokenReader:
    """Reads windows of token ids; each shard is verified (size, then SHA-256) before its first use on this machine.

    Shards of a `file://` store are mapped where they are. Others are downloaded once into `cache`, where all
    workers of a machine share them. A reader unmaps the least recently used ones, so that the cache can keep
    its bound. Runs in workers; safe to share between threads.
    """

    def __init__(self, manifest: Manifest, store: Store, *, cache: ShardCache) -> None:
        self._manifest, self._store, self._cache = manifest, store, cache
        self._type = np.dtype(manifest.token_type).newbyteorder("<")
        self._lock = threading.Lock()
        self._mapped: dict[str, _Mapped] = {}
        """By key, the least recently used first."""
        self._ends: dict[tuple[int, Split], NDArray[np.int64]] = {
            (number, split): np.cumsum(
                [shard.tokens for shard in source.shards(split)], dtype=np.int64
            )
            for number, source in enumerate(manifest.sources)
            for split in ("train", "held_out")
        }

    def windows(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> torch.Tensor:
        """Token ids of `(source, row)` train windows: int64 [rows, sequence_length + 1].

        Raises `DataError` for a shard with a wrong size or hash, and `StoreError` for one that cannot be read now.
        Both name the file.
        """
        tokens = np.empty((len(rows), sequence_length + 1), dtype=np.int64)
        for window, (source, row) in zip(tokens, rows, strict=True):
            self._read_into(window, source, "train", row * sequence_length)
        return torch.from_numpy(tokens)

    def stream(self, source: int, split: Split, start: int, end: int) -> torch.Tensor:
        """Token ids `[start, end)` of a source's stream: int64 [end - start]."""
        tokens = np.empty(end - start, dtype=np.int64)
        self._read_into(tokens, source, split, start)
        return torch.from_numpy(tokens)

    def _read_into(self, target: NDArray[np.int64], source: int, split: Split, start: int) -> None:
        ends = self._ends[source, split]
        shards = self._manifest.sources[source].shards(split)
        if start < 0 or start + len(target) > (ends[-1] if len(ends) else 0):
            raise IndexError(f"tokens [{start}, {start + len(target)}) of source {source} {split}")
        number = int(np.searchsorted(ends, start, side="right"))
        done = 0
        while done < len(target):
            shard = shards[number]
            first = start + done - (int(ends[number]) - shard.tokens)
            count = min(len(target) - done, shard.tokens - first)
            target[done : done + count] = self._open(shard)[first : first + count]
            done, number = done + count, number + 1

    def _open(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        with self._lock:
            mapped = self._mapped.pop(shard.key, None) or self._map(shard)
            self._mapped[shard.key] = mapped
            return mapped.tokens

    def _map(self, shard: Shard) -> _Mapped:
        size = shard.tokens * TOKEN_BYTES[self._manifest.token_type]
        if self._store.url.startswith(FILE_SCHEME):
            path = Path(self._store.url.removeprefix(FILE_SCHEME), shard.key)
            descriptor = self._cache.open_local(
                path, shard.sha256, self._name(shard), lambda found: self._check_size(found, shard)
            )
            return _Mapped(self._tokens(descriptor), 0)
        self._let_go(size)
        descriptor = self._cache.open_downloaded(
            shard.sha256, size, self._name(shard), lambda path: self._download(shard, size, path)
        )
        return _Mapped(self._tokens(descriptor), size)

    def _tokens(self, descriptor: int) -> NDArray[np.unsignedinteger]:
        """Map a file and close the descriptor. The map keeps a copy of it, and so also the cache's lock."""
        try:
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        return np.frombuffer(mapped, dtype=self._type)

    def _let_go(self, size: int) -> None:
        """Unmap the least recently used shards, so that the cache can make room for `size` bytes."""
        held = sum(each.cached_bytes for each in self._mapped.values())
        for key in [key for key, each in self._mapped.items() if each.cached_bytes]:
            if held + size <= self._cache.mapped_bytes_max:
                return
            held -= self._mapped.pop(key).cached_bytes

    def _name(self, shard: Shard) -> str:
        return f"{self._store.url}/{shard.key}"

    def _check_size(self, found_bytes: int | None, shard: Shard) -> None:
        expected = shard.tokens * TOKEN_BYTES[self._manifest.token_type]
        if found_bytes is None:
            raise StoreError(f"{self._name(shard)}: missing; {REMEDY}")
        if found_bytes != expected:
            raise DataError(
                f"{self._name(shard)}: {found_bytes} bytes where the manifest says {expected}; {REMEDY}"
            )

    def _download(self, shard: Shard, size: int, target: Path) -> None:
        self._check_size(self._store.size(shard.key), shard)
        with target.open("wb") as file:
            for start in range(0, size, TRANSFER_BYTES):
                end = min(start + TRANSFER_BYTES, size)
                file.write(self._store.read(shard.key, start, end))
