"""The manifest: the record that makes a directory of token shards a data set.

    manifest.json              written last and only once; a directory without it is no data set
    tokenizer-<hash>.json      the tokenizer of `tokenizers`, as one file
    pages/<source>/train-00000-<hash>.json         a part of the list of train shards
    shards/<source>/train-00000-<hash>.bin         token ids, little-endian, nothing else
    shards/<source>/train-00000-<hash>.blocks      its block index: the SHA-256 of each block, 32 bytes each
    (the same with held-out)

The manifest has the SHA-256 of each page, a page that of each block index, an index that of each block. So a reader
can verify a few kilobytes of a corpus of any size, and the manifest stays small. A block is `block_tokens` ids of one
shard; the last block of a shard may be shorter.

File names contain the start of a SHA-256, so a second `prepare` to the same place cannot change the files of an
existing manifest.

**Schema 1** has neither pages nor blocks: the manifest lists all shards, each with its SHA-256. Such a shard is one
block, and needs no index.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from elastic_pt.errors import DataError, NotFound
from elastic_pt.store.port import Store, checked_key

MANIFEST_KEY = "manifest.json"
SCHEMA = 2
WHOLE_SHARDS_SCHEMA = 1
"""The earlier schema, whose shards have no block index."""
REMEDY = "expected the unchanged output of `prepare`: restore it or prepare the data again"

Split = Literal["train", "held_out"]
TokenType = Literal["uint16", "uint32"]
TOKEN_BYTES: dict[str, int] = {"uint16": 2, "uint32": 4}
SHARD_SUFFIX = ".bin"
BLOCKS_SUFFIX = ".blocks"
HASH_BYTES = 32
"""Bytes of each hash in a block index."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids; `tokens` counts ids, not bytes."""

    key: str
    tokens: int
    sha256: str
    """Of the block index; with schema 1 of the shard itself."""


@dataclass(frozen=True)
class Page:
    """One file that lists consecutive shards of a stream."""

    key: str
    tokens: int
    """Of all its shards."""
    sha256: str


@dataclass(frozen=True)
class Stream:
    """The tokens of one split of one source: the concatenation of the shards of its pages."""

    tokens: int
    pages: tuple[Page, ...]


@dataclass(frozen=True)
class Source:
    """One named part of the corpus; its train stream is the concatenation of its train shards."""

    name: str
    weight: float
    """Share of the mixture; the weights of a manifest sum to 1."""
    documents: int
    """Train documents."""
    train: Stream | tuple[Shard, ...]
    """All shards with schema 1."""
    held_out_documents: int
    held_out_bytes: int
    """UTF-8 bytes of the held-out documents, the divisor of bits per byte."""
    held_out: Stream | tuple[Shard, ...]

    def stream(self, split: Split) -> Stream | tuple[Shard, ...]:
        """Where the tokens of one split are."""
        return self.train if split == "train" else self.held_out

    def tokens(self, split: Split) -> int:
        """Number of token ids of one split."""
        stream = self.stream(split)
        if isinstance(stream, Stream):
            return stream.tokens
        return sum(shard.tokens for shard in stream)

    def rows(self, sequence_length: int) -> int:
        """Whole train rows. Neighbours share one id, and the rest of the stream is not read."""
        return max(0, self.tokens("train") - 1) // sequence_length


@dataclass(frozen=True)
class Manifest:
    """All values that decide the tokens. `fingerprint` covers all of them."""

    vocab_size: int
    """Token ids are below this number."""
    token_type: TokenType
    end_token: str
    """Appended to each document."""
    end_token_id: int
    tokenizer_key: str
    tokenizer_sha256: str
    held_out_share: float
    sources: tuple[Source, ...]
    skipped: dict[str, int]
    """Documents or files that were left out, by reason."""
    schema: int = WHOLE_SHARDS_SCHEMA
    block_tokens: int = 0
    """Token ids per block; 0 with schema 1, where each shard is one block."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each source in the mixture."""
        return tuple(source.weight for source in self.sources)

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of all held-out documents."""
        return sum(source.held_out_bytes for source in self.sources)

    def tokens(self, split: Split) -> int:
        """Number of token ids of one split, over all sources."""
        return sum(source.tokens(split) for source in self.sources)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, one spelling per value."""
        tree = dataclasses.asdict(self)
        if self.schema == WHOLE_SHARDS_SCHEMA:
            del tree["block_tokens"]
        return json.dumps(tree, sort_keys=True, indent=1, allow_nan=False).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes, *, origin: str = MANIFEST_KEY) -> "Manifest":
        """Parse the output of `to_json`. Raises `DataError` for anything else; `origin` is its name there."""
        try:
            tree = from_json(data)
        except ValueError as error:
            raise DataError(f"{origin}: not JSON; {REMEDY}") from error
        schema = tree.get("schema") if isinstance(tree, dict) else None
        if schema not in (WHOLE_SHARDS_SCHEMA, SCHEMA):
            raise DataError(
                f"{origin}: schema = {schema!r}; this version reads {WHOLE_SHARDS_SCHEMA} and {SCHEMA}: {REMEDY}"
            )
        try:
            manifest = TypeAdapter(cls).validate_json(data, strict=True)
        except ValidationError as error:
            raise DataError(f"{origin}: {_first_error(error)}; {REMEDY}") from error
        if not manifest.sources or not math.isclose(sum(manifest.weights), 1.0, rel_tol=1e-6):
            raise DataError(
                f"{origin}: weights = {list(manifest.weights)} do not sum to 1; {REMEDY}"
            )
        if (manifest.schema == SCHEMA) != (manifest.block_tokens > 0):
            raise DataError(
                f"{origin}: block_tokens = {manifest.block_tokens}: not a size of blocks; {REMEDY}"
            )
        streams = [each for source in manifest.sources for each in (source.train, source.held_out)]
        if any(isinstance(each, Stream) != (manifest.schema == SCHEMA) for each in streams):
            raise DataError(f"{origin}: pages and schema {manifest.schema} do not agree; {REMEDY}")
        if mistake := next(_mistakes(manifest), None):
            raise DataError(f"{origin}: {mistake}; {REMEDY}")
        if manifest.to_json() != data:
            found = _first_difference(data, manifest.to_json())
            raise DataError(
                f"{origin}: changed by hand or by another version, or not canonical JSON: {found}; {REMEDY}"
            )
        return manifest


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    found = "" if first["type"] == "missing" else f", not {first['input']!r:.80}"
    return f"{place}: {first['msg']}{found}"


def _mistakes(manifest: Manifest) -> Iterator[str]:
    """What no preparer may write: the field, its value and what is expected."""
    if not 0 <= manifest.end_token_id < manifest.vocab_size:
        yield f"end_token_id = {manifest.end_token_id}; expected an id below vocab_size = {manifest.vocab_size}"
    if manifest.vocab_size > 2 ** (8 * TOKEN_BYTES[manifest.token_type]):
        yield f"token_type = {manifest.token_type}; expected a type for vocab_size = {manifest.vocab_size}"
    names = [source.name for source in manifest.sources]
    if len(set(names)) < len(names):
        yield f"sources: the names {names}; expected each name once"
    files: list[tuple[str, str, str]] = [
        ("tokenizer_", manifest.tokenizer_key, manifest.tokenizer_sha256)
    ]
    for number, source in enumerate(manifest.sources):
        place = f"sources.{number}"
        if not re.fullmatch("[A-Za-z0-9_-]+", source.name):
            yield f"{place}.name = {source.name!r:.80}; expected letters, digits, _ and -"
        if not source.weight > 0:
            yield f"{place}.weight = {source.weight}; expected a positive number"
        if source.tokens("held_out") and source.held_out_bytes < 1:
            yield f"{place}.held_out_bytes = {source.held_out_bytes}; expected the bytes of the held-out texts"
        for split, stream in (("train", source.train), ("held_out", source.held_out)):
            parts: Sequence[Page | Shard] = stream.pages if isinstance(stream, Stream) else stream
            path = f"{place}.{split}{'.pages' if isinstance(stream, Stream) else ''}"
            for index, part in enumerate(parts):
                files.append((f"{path}.{index}.", part.key, part.sha256))
                if part.tokens < 1:
                    yield f"{path}.{index}.tokens = {part.tokens}; expected a positive number"
            total = sum(part.tokens for part in parts)
            if isinstance(stream, Stream) and stream.tokens != total:
                yield f"{place}.{split}.tokens = {stream.tokens}; expected {total}, the sum of its pages"
    for path, key, sha256 in files:
        if mistake := _file_mistake(path, key, sha256):
            yield mistake


def _file_mistake(path: str, key: str, sha256: str) -> str:
    """What is wrong with a file's key or hash, both of which name files on this machine; else ""."""
    try:
        checked_key(key)
    except ValueError as error:
        return f"{path}key: {error}"
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return f"{path}sha256 = {sha256!r:.80}; expected 64 lower-case hexadecimal digits"
    return ""


def _first_difference(found: bytes, canonical: bytes) -> str:
    pairs = zip_longest(found.split(b"\n"), canonical.split(b"\n"))
    number, (line, wanted) = next(
        (number, pair) for number, pair in enumerate(pairs, start=1) if pair[0] != pair[1]
    )
    return f"line {number} is {_shown(line)}, expected {_shown(wanted)}"


def _shown(line: bytes | None) -> str:
    return "absent" if line is None else ascii(line.decode("utf-8", "replace"))[:80]


def page_bytes(shards: Sequence[Shard]) -> bytes:
    """The content of a page."""
    return json.dumps(
        [dataclasses.asdict(each) for each in shards], sort_keys=True, indent=1
    ).encode("ascii")


def page_shards(data: bytes, page: Page, *, origin: str) -> tuple[Shard, ...]:
    """The shards of a page. Raises `DataError` if it is not the page that the manifest names."""
    if hashlib.sha256(data).hexdigest() != page.sha256:
        raise DataError(f"{origin}: corrupt, its SHA-256 is not that of the manifest; {REMEDY}")
    try:
        shards = TypeAdapter(tuple[Shard, ...]).validate_json(data, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{origin}: not a list of shards: {_first_error(error)}; {REMEDY}"
        ) from error
    for number, each in enumerate(shards):
        if mistake := _file_mistake(f"{number}.", each.key, each.sha256):
            raise DataError(f"{origin}: not a list of shards: {mistake}; {REMEDY}")
    if (
        not shards
        or any(each.tokens < 1 for each in shards)
        or sum(each.tokens for each in shards) != page.tokens
    ):
        raise DataError(f"{origin}: its shards do not have {page.tokens} tokens; {REMEDY}")
    return shards


def largest_block(manifest: Manifest, *, held_out: bool) -> tuple[int, str]:
    """Bytes and name of the largest part that is read at once; `held_out`: also of the held-out splits."""
    token_bytes = TOKEN_BYTES[manifest.token_type]
    if manifest.block_tokens:
        return manifest.block_tokens * token_bytes, f"a block of {manifest.block_tokens} tokens"
    streams = [source.train for source in manifest.sources]
    streams += [source.held_out for source in manifest.sources] * held_out
    shards = [each for stream in streams if not isinstance(stream, Stream) for each in stream]
    largest = max(shards, key=lambda each: each.tokens, default=Shard("no shard", 1, ""))
    return largest.tokens * token_bytes, largest.key


def blocks_key(shard_key: str) -> str:
    """The key of a shard's block index."""
    return f"{shard_key.removesuffix(SHARD_SUFFIX)}{BLOCKS_SUFFIX}"


def read_manifest(store: Store) -> Manifest:
    """The manifest of a prepared directory; `DataError` if there is none or it cannot be used."""
    origin = f"{store.url}/{MANIFEST_KEY}"
    try:
        data = store.read(MANIFEST_KEY)
    except NotFound as error:
        raise DataError(
            f"{origin}: no such file; expected a directory that `elastic-pt prepare` has finished"
        ) from error
    return Manifest.from_json(data, origin=origin)
