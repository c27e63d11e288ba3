"""Writes the token stream of one split of one source: shards, their block indexes, and the pages that list them.

    add(ids) ─► shard ─► its block index ─► page ─► Stream (for the manifest)

All files are written before the manifest names them. Runs in the command line's process.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elastic_pt.data.manifest import (
    SHARD_SUFFIX,
    TOKEN_BYTES,
    Page,
    Shard,
    Split,
    Stream,
    TokenType,
    blocks_key,
    page_bytes,
)
from elastic_pt.errors import DataError
from elastic_pt.store.port import Store

SHARD_TOKENS: Final = 32 * 1024 * 1024
BLOCK_TOKENS: Final = 32 * 1024
"""Tokens per block, the smallest part of a shard that can be verified. Sixteen rows of 2,048 tokens."""
PAGE_SHARDS: Final = 1024
"""Shards per page: less than 200 kB, and 17 pages for 10^12 bytes."""

HASH_CHARACTERS: Final = 12
"""Characters of the SHA-256 in a file name."""


def check_sizes(shard_tokens: int, block_tokens: int) -> None:
    """Raise `DataError` for sizes below 1, with which no shard would ever be complete."""
    for name, value in (("shard_tokens", shard_tokens), ("block_tokens", block_tokens)):
        if value < 1:
            raise DataError(f"{name} = {value}: expected a positive number")


class ShardWriter:
    """Collects token ids, and writes each shard when it is full. The last shard may be shorter."""

    def __init__(
        self,
        store: Store,
        source: str,
        split: Split,
        token_type: TokenType,
        *,
        shard_tokens: int = SHARD_TOKENS,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        check_sizes(shard_tokens, block_tokens)
        self._store, self._shard_tokens = store, shard_tokens
        self._name = f"{source}/{split.replace('_', '-')}"
        self._type = np.dtype(token_type).newbyteorder("<")
        self._block_bytes = block_tokens * TOKEN_BYTES[token_type]
        self._pending: NDArray[np.unsignedinteger] = np.empty(shard_tokens, self._type)
        self._pending_tokens = 0
        self._shards: list[Shard] = []
        self._shards_written = 0
        self._pages: list[Page] = []

    def add(self, ids: Sequence[int] | NDArray[np.unsignedinteger]) -> None:
        """Append the ids of one document, or of a part of one."""
        left = np.asarray(ids, dtype=self._type)
        while len(left):
            start = self._pending_tokens
            part = left[: self._shard_tokens - start]
            left = left[len(part) :]
            self._pending_tokens += len(part)
            self._pending[start : self._pending_tokens] = part
            if self._pending_tokens == self._shard_tokens:
                self._write_shard()

    def close(self) -> Stream:
        """Write what is left. Returns the whole stream as the manifest names it."""
        if self._pending_tokens:
            self._write_shard()
        if self._shards:
            self._write_page()
        return Stream(sum(page.tokens for page in self._pages), tuple(self._pages))

    def _write_shard(self) -> None:
        tokens, self._pending_tokens = self._pending_tokens, 0
        data = self._pending[:tokens].tobytes()
        view = memoryview(data)
        index = b"".join(
            hashlib.sha256(view[start : start + self._block_bytes]).digest()
            for start in range(0, len(data), self._block_bytes)
        )
        sha256 = hashlib.sha256(index).hexdigest()
        key = f"shards/{self._name}-{self._shards_written:05d}-{sha256[:HASH_CHARACTERS]}{SHARD_SUFFIX}"
        self._store.write(key, data)
        self._store.write(blocks_key(key), index)
        self._shards.append(Shard(key, tokens, sha256))
        self._shards_written += 1
        if len(self._shards) == PAGE_SHARDS:
            self._write_page()

    def _write_page(self) -> None:
        data = page_bytes(self._shards)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"pages/{self._name}-{len(self._pages):05d}-{sha256[:HASH_CHARACTERS]}.json"
        self._store.write(key, data)
        self._pages.append(Page(key, sum(shard.tokens for shard in self._shards), sha256))
        self._shards = []
