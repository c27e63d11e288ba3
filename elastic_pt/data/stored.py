"""Reads prepared data straight from its store, every byte verified, without the cache.

    stream ─► page ─► shard ─► its block index ─► spans of blocks, many at once ─► verified bytes, in order

For commands that read a corpus once, from end to end or a few rows of it. Training reads through the cache.
A block of schema 1 is a whole shard, so a row of it costs that shard.

Runs in the command line's process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_pt.data.manifest import (
    HASH_BYTES,
    MANIFEST_KEY,
    REMEDY,
    TOKEN_BYTES,
    Manifest,
    Split,
    Stream,
    blocks_key,
    largest_block,
)
from elastic_pt.data.table import Placed, ShardTable
from elastic_pt.data.tokenizer import load_tokenizer
from elastic_pt.errors import DataError, NotFound, StoreError
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store

SPLITS: Final[tuple[Split, ...]] = ("train", "held_out")
SPAN_BYTES: Final = 4 * 2**20
"""Bytes per request; neighbouring blocks are one span up to this size."""
MEMORY_BYTES: Final = 256 * 2**20
"""Bytes of all spans that are read at once, unless one block is larger."""
_AT_ONCE_MAX: Final = 16

Tokens = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Damage:
    """A file or a block that is not the one that the manifest names, or ids that no document has."""

    file: str
    problem: str
    source: int | None = None
    """None for the tokenizer."""
    split: Split = "train"
    block: int | None = None
    """Its number in the file; None if it is the whole file."""
    tokens: range = field(default=range(0))
    """The place in the stream of the tokens that cannot be read."""
    blocks: int = 1
    """How many damaged blocks follow each other, with `block`."""

    def joined(self, after: "Damage") -> "Damage | None":
        """This one with the block after it; None if that is not the next block of the file."""
        if self.block is None or (after.file, after.block) != (self.file, self.block + self.blocks):
            return None
        tokens = range(self.tokens.start, after.tokens.stop)
        return replace(self, problem=_corrupt(tokens), tokens=tokens, blocks=self.blocks + 1)

    def __str__(self) -> str:
        block = "" if self.block is None else f" block {self.block}:"
        return f"{self.file}:{block} {self.problem}"


class Span(NamedTuple):
    """Consecutive blocks of one shard."""

    source: int
    split: Split
    placed: Placed
    first: int
    """Number of its first block in the shard."""
    hashes: tuple[bytes, ...]
    """SHA-256 of each of its blocks."""
    block_tokens: int

    @property
    def tokens(self) -> range:
        """Its place in the stream."""
        start = self.placed.start + self.first * self.block_tokens
        return range(start, min(start + len(self.hashes) * self.block_tokens, self.placed.end))


class _Listed(NamedTuple):
    """A part of a stream whose shards are in one list: a page, or the manifest of schema 1."""

    source: int
    split: Split
    tokens: range
    key: str


class StreamPart(NamedTuple):
    """Consecutive tokens of a stream, or what cannot be read of it."""

    source: int
    split: Split
    content: Tokens | Damage


class Verified(NamedTuple):
    """What was read of a span or of another part of the data."""

    bytes: int
    damages: tuple[Damage, ...]


class StoredTokens:
    """The token streams of prepared data in their store. Safe to share between threads."""

    def __init__(self, manifest: Manifest, store: Store) -> None:
        self._manifest, self._store = manifest, store
        self._table = ShardTable(manifest, store)
        self._token_bytes = TOKEN_BYTES[manifest.token_type]
        self._type = np.dtype(manifest.token_type).newbyteorder("<")

    @property
    def size_bytes(self) -> int:
        """Of all tokens."""
        return sum(self._manifest.tokens(split) for split in SPLITS) * self._token_bytes

    def verify(self) -> Iterator[Verified]:
        """Read every byte and compare it with its hash, part by part, in the order of the manifest.

        Raises `StoreError` if the store cannot be read now.
        """
        try:
            load_tokenizer(self._store, self._manifest)
        except DataError as error:
            yield Verified(0, (Damage(self._manifest.tokenizer_key, _reason(error)),))
        yield from in_order(self._parts(check_size=True), self._verify, self._threads)

    def streams(self) -> Iterator[StreamPart]:
        """All tokens in the order of the manifest, some at a time, and in its place what cannot be read."""
        for found in in_order(self._parts(), self._readable, self._threads):
            yield from found

    def windows(self, wanted: Sequence[tuple[int, range]]) -> list[Tokens]:
        """The tokens of some ranges of train streams. Raises `DataError` that names a damaged block.

        Each block and each block index is read once, however many of the ranges it holds.
        """
        found = [np.empty(len(tokens), self._type) for _, tokens in wanted]
        held: dict[tuple[int, Placed], list[int]] = {}
        for number, (source, tokens) in enumerate(wanted):
            for placed in self.shards_of(source, tokens):
                held.setdefault((source, placed), []).append(number)

        def spans(shard: tuple[tuple[int, Placed], list[int]]) -> list[tuple[Span, list[int]]]:
            (source, placed), numbers = shard
            parts = self._of_shard(source, "train", placed, [wanted[each][1] for each in numbers])
            if damages := [part for part in parts if isinstance(part, Damage)]:
                raise DataError(f"{self._store.url}/{damages[0]}; {REMEDY}")
            return [(part, numbers) for part in parts if isinstance(part, Span)]

        def fill(part: tuple[Span, list[int]]) -> None:
            span, numbers = part
            data, damages = self._verified(span)
            if damages:
                raise DataError(f"{self._store.url}/{damages[0]}; {REMEDY}")
            read, here = np.frombuffer(data, self._type), span.tokens
            for number in numbers:
                tokens = wanted[number][1]
                start, end = max(tokens.start, here.start), min(tokens.stop, here.stop)
                if start < end:
                    found[number][start - tokens.start : end - tokens.start] = read[
                        start - here.start : end - here.start
                    ]

        opened = in_order(held.items(), spans, _AT_ONCE_MAX)
        for _ in in_order(chain.from_iterable(opened), fill, self._threads):
            pass
        return found

    def shards_of(self, source: int, tokens: range) -> Iterator[Placed]:
        """The shards of a train stream that hold some tokens."""
        token = tokens.start
        while token < tokens.stop:
            placed = self._table.find(source, "train", token)
            yield placed
            token = placed.end

    def _parts(self, *, check_size: bool = False) -> Iterator[Span | Damage]:
        """The spans of all streams, and in their places what cannot be read for a damaged page or index."""
        # Many streams may be small: a round trip after the other would take most of the time.
        sources = range(len(self._manifest.sources))
        pages = (
            page for source in sources for split in SPLITS for page in self._pages(source, split)
        )

        def open_shard(found: tuple[int, Split, Placed | Damage]) -> list[Span | Damage]:
            source, split, each = found
            if isinstance(each, Damage):
                return [each]
            whole = [range(each.start, each.end)]
            return self._of_shard(source, split, each, whole, check_size=check_size)

        placed = chain.from_iterable(in_order(pages, self._placed, _AT_ONCE_MAX))
        yield from chain.from_iterable(in_order(placed, open_shard, _AT_ONCE_MAX))

    def _pages(self, source: int, split: Split) -> Iterator[_Listed]:
        """The parts of a stream whose shards are listed in one place."""
        stream = self._manifest.sources[source].stream(split)
        pages = stream.pages if isinstance(stream, Stream) else ()
        sizes = [page.tokens for page in pages] or [self._manifest.sources[source].tokens(split)]
        for number, (token, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
            key = pages[number].key if pages else MANIFEST_KEY
            yield _Listed(source, split, range(token, end), key)

    def _placed(self, page: _Listed) -> list[tuple[int, Split, Placed | Damage]]:
        """The shards of a page, or that it cannot be used."""
        source, split, tokens, key = page
        found: list[Placed] = []
        token = tokens.start
        try:
            while token < tokens.stop:
                found.append(self._table.find(source, split, token))
                token = found[-1].end
        except (DataError, StoreError) as error:
            if isinstance(error, StoreError) and not isinstance(error.__cause__, NotFound):
                raise
            return [(source, split, Damage(key, _reason(error), source, split, tokens=tokens))]
        return [(source, split, each) for each in found]

    def _of_shard(
        self,
        source: int,
        split: Split,
        placed: Placed,
        wanted: Sequence[range],
        *,
        check_size: bool = False,
    ) -> list[Span | Damage]:
        """The spans that hold the wanted tokens of one shard, or why they cannot be read."""
        shard, first, end = placed.shard, placed.start, placed.end

        def damage(file: str, problem: str) -> Damage:
            return Damage(file, problem, source, split, tokens=range(first, end))

        found: list[Span | Damage] = []
        if check_size:
            size, expected = self._store.size(shard.key), shard.tokens * self._token_bytes
            if size is None:
                return [damage(shard.key, "missing")]
            if size != expected:
                # Its blocks are compared all the same.
                found.append(damage(shard.key, f"{size} bytes; expected {expected}"))
        block_tokens = self._manifest.block_tokens
        if not block_tokens:
            whole = (bytes.fromhex(shard.sha256),)
            return [*found, Span(source, split, placed, 0, whole, shard.tokens)]
        key = blocks_key(shard.key)
        try:
            index = self._store.read(key)
        except NotFound:
            return [*found, damage(key, "missing")]
        hashes = [index[at : at + HASH_BYTES] for at in range(0, len(index), HASH_BYTES)]
        if hashlib.sha256(index).hexdigest() != shard.sha256:
            return [*found, damage(key, "corrupt, its SHA-256 is not that of its page")]
        if len(index) != -(-shard.tokens // block_tokens) * HASH_BYTES:
            return [*found, damage(key, f"{len(hashes)} hashes for {shard.tokens} tokens")]
        is_wanted = np.zeros(len(hashes), bool)
        for tokens in wanted:
            start, stop = max(tokens.start, first) - first, min(tokens.stop, end) - first
            is_wanted[start // block_tokens : -(-stop // block_tokens)] = True
        per_span = max(1, SPAN_BYTES // (block_tokens * self._token_bytes))
        borders = np.flatnonzero(np.diff(is_wanted, prepend=False, append=False)).tolist()
        for begin, stop in zip(borders[::2], borders[1::2], strict=True):
            for at in range(begin, stop, per_span):
                some = tuple(hashes[at : min(at + per_span, stop)])
                found.append(Span(source, split, placed, at, some, block_tokens))
        return found

    def _readable(self, part: Span | Damage) -> list[StreamPart]:
        data, damages = (b"", (part,)) if isinstance(part, Damage) else self._verified(part)
        found: list[Tokens | Damage] = []
        token = part.tokens.start
        for damage in (*damages, None):
            end = part.tokens.stop if damage is None else damage.tokens.start
            if token < end:
                start = (token - part.tokens.start) * self._token_bytes
                found.append(np.frombuffer(data, self._type, end - token, start))
            if damage is not None:
                found.append(damage)
                token = damage.tokens.stop
        return [StreamPart(part.source or 0, part.split, each) for each in found]

    def _verify(self, part: Span | Damage) -> Verified:
        if isinstance(part, Damage):
            return Verified(0, (part,))
        data, damages = self._verified(part)
        if not damages:
            damages = tuple(self._wrong_ids(part, np.frombuffer(data, self._type)))
        return Verified(len(data), damages)

    def _wrong_ids(self, span: Span, ids: Tokens) -> Iterator[Damage]:
        """Ids that have the right hash and yet are not those of documents of this vocabulary."""
        manifest, key = self._manifest, span.placed.shard.key
        first, end = span.tokens.start, span.tokens.stop
        if ids.max() >= manifest.vocab_size:
            at = first + int(np.argmax(ids >= manifest.vocab_size))
            problem = f"token {at} is {ids[at - first]}; expected ids below vocab_size = {manifest.vocab_size}"
            yield Damage(key, problem, span.source, span.split, None, range(at, at + 1))
        last = manifest.sources[span.source].tokens(span.split)
        if end == last and ids[-1] != manifest.end_token_id:
            problem = f"token {last - 1} is {ids[-1]}, the last one; expected the end token {manifest.end_token_id}"
            yield Damage(key, problem, span.source, span.split, None, range(last - 1, last))

    def _verified(self, span: Span) -> tuple[bytes, tuple[Damage, ...]]:
        """The bytes of a span, and those of its blocks that are damaged."""
        key, start = span.placed.shard.key, span.tokens.start
        begin = (start - span.placed.start) * self._token_bytes
        end = begin + len(span.tokens) * self._token_bytes
        try:
            data = b"".join(
                self._store.read(key, at, min(at + SPAN_BYTES, end))
                for at in range(begin, end, SPAN_BYTES)
            )
        except NotFound:
            return b"", (Damage(key, "missing", span.source, span.split, tokens=span.tokens),)
        damages = []
        block_bytes, view = span.block_tokens * self._token_bytes, memoryview(data)
        for number, sha256 in enumerate(span.hashes):
            block = view[number * block_bytes : (number + 1) * block_bytes]
            if hashlib.sha256(block).digest() != sha256:
                first = start + number * span.block_tokens
                tokens = range(first, min(first + span.block_tokens, span.tokens.stop))
                place = span.first + number
                damages.append(
                    Damage(key, _corrupt(tokens), span.source, span.split, place, tokens)
                )
        return data, tuple(damages)

    @cached_property
    def _threads(self) -> int:
        """How many spans may be in memory at once."""
        largest, _ = largest_block(self._manifest, held_out=True)
        return max(1, min(_AT_ONCE_MAX, MEMORY_BYTES // max(SPAN_BYTES, largest)))


def _corrupt(tokens: range) -> str:
    return f"corrupt, tokens {tokens[0]} to {tokens[-1]} have another SHA-256"


def _reason(error: Exception) -> str:
    """What is wrong, without the file before it and the remedy after it."""
    return str(error).partition(": ")[2].removesuffix(f"; {REMEDY}")
