"""Token shards: written once by `prepare`, verified and memory-mapped by every worker.

A shard is an array of little-endian token ids and nothing else. The train stream of a source is the
concatenation of its train shards; row r of it is the window of sequence_length + 1 ids that starts at
r * sequence_length, so neighbouring rows share one id: the last target of one is the first input of
the next. A window may cross from one shard into the next.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_pt.data.manifest import REMEDY, TOKEN_BYTES, Manifest, Shard, Split, TokenType
from elastic_pt.errors import DataError
from elastic_pt.store.port import Store

SHARD_TOKENS = 32 * 1024 * 1024
TRANSFER_BYTES = 32 * 1024 * 1024
"""Bytes downloaded at once."""

HASH_CHARACTERS = 12
"""How much of the SHA-256 a file name carries."""

FILE_SCHEME = "file://"


class ShardWriter:
    """Collects the token ids of one split of one source and writes a shard whenever one is full."""

    def __init__(self, store: Store, prefix: str, token_type: TokenType, shard_tokens: int) -> None:
        self._store, self._prefix, self._shard_tokens = store, prefix, shard_tokens
        self._type = np.dtype(token_type).newbyteorder("<")
        self._pending: list[NDArray[np.unsignedinteger]] = []
        self._pending_tokens = 0
        self._shards: list[Shard] = []

    def add(self, ids: Sequence[int]) -> None:
        """Append the ids of one document."""
        self._pending.append(np.array(ids, dtype=self._type))
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


class TokenReader:
    """Reads windows of token ids; each shard is verified (size, then SHA-256) before its first use.

    Shards of a `file://` store are mapped where they are. Others are downloaded once into `cache`, under
    their SHA-256, so that all workers of a node share them (default: a directory per user below the
    system's temporary directory). Runs in workers; safe to share between threads.
    """

    def __init__(self, manifest: Manifest, store: Store, *, cache: Path | None = None) -> None:
        self._manifest, self._store = manifest, store
        self._cache = cache or Path(tempfile.gettempdir(), f"elastic_pt-data-{os.getuid()}")
        self._type = np.dtype(manifest.token_type).newbyteorder("<")
        self._lock = threading.Lock()
        self._mapped: dict[str, NDArray[np.unsignedinteger]] = {}
        self._ends: dict[tuple[int, Split], NDArray[np.int64]] = {
            (number, split): np.cumsum(
                [shard.tokens for shard in source.shards(split)], dtype=np.int64
            )
            for number, source in enumerate(manifest.sources)
            for split in ("train", "held_out")
        }

    def windows(self, rows: Sequence[tuple[int, int]], sequence_length: int) -> torch.Tensor:
        """Token ids of `(source, row)` train windows: int64 [rows, sequence_length + 1].

        Raises `DataError` naming the file when a shard is missing, truncated or corrupt.
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
            mapped = self._mapped.get(shard.key)
            if mapped is None:
                if self._store.url.startswith(FILE_SCHEME):
                    path = Path(self._store.url.removeprefix(FILE_SCHEME), shard.key)
                    self._check(path, shard)
                else:
                    path = self._cached(shard)
                mapped = self._mapped[shard.key] = np.memmap(path, dtype=self._type, mode="r")
            return mapped

    def _name(self, shard: Shard) -> str:
        return f"{self._store.url}/{shard.key}"

    def _check(self, path: Path, shard: Shard) -> None:
        """Raise `DataError` unless the local file is, byte for byte, what the manifest says."""
        try:
            with path.open("rb") as file:
                self._check_size(os.fstat(file.fileno()).st_size, shard)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            self._check_size(None, shard)
            raise
        except OSError as error:
            raise DataError(f"{self._name(shard)}: {error.strerror}; {REMEDY}") from error
        if digest != shard.sha256:
            raise DataError(
                f"{self._name(shard)}: corrupt, its SHA-256 is not that of the manifest; {REMEDY}"
            )

    def _check_size(self, found_bytes: int | None, shard: Shard) -> None:
        if found_bytes is None:
            raise DataError(f"{self._name(shard)}: missing; {REMEDY}")
        expected = self._bytes(shard)
        if found_bytes != expected:
            raise DataError(
                f"{self._name(shard)}: {found_bytes} bytes where the manifest says {expected}; {REMEDY}"
            )

    def _bytes(self, shard: Shard) -> int:
        return shard.tokens * TOKEN_BYTES[self._manifest.token_type]

    def _cached(self, shard: Shard) -> Path:
        """The shard in the cache, from an earlier download if that is intact."""
        path = self._cache / f"{shard.sha256}.bin"
        if path.is_file():
            try:
                self._check(path, shard)
            except DataError:
                path.unlink(missing_ok=True)
            else:
                return path
        self._check_size(self._store.size(shard.key), shard)
        try:
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                arriving = Path(folder, path.name)
                self._download(shard, arriving)
                self._check(arriving, shard)
                arriving.replace(path)
        except OSError as error:
            raise DataError(
                f"data cache {self._cache}: {error.strerror}; a writable directory with "
                f"{self._bytes(shard)} free bytes would be right"
            ) from error
        return path

    def _download(self, shard: Shard, target: Path) -> None:
        expected = self._bytes(shard)
        with target.open("wb") as file:
            for start in range(0, expected, TRANSFER_BYTES):
                end = min(start + TRANSFER_BYTES, expected)
                file.write(self._store.read(shard.key, start, end))
