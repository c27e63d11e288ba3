"""The manifest: the record that makes a directory of token shards a data set.

    manifest.json              written last and only once; a directory without it is no data set
    tokenizer-<hash>.json      the tokenizer of `tokenizers`, as one file
    shards/<source>/train-00000-<hash>.bin       token ids, little-endian, nothing else
    shards/<source>/held-out-00000-<hash>.bin

File names contain the start of the SHA-256, so a second `prepare` to the same place cannot change the
files of an existing manifest.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from elastic_pt.errors import DataError, NotFound
from elastic_pt.store.port import Store, checked_key

MANIFEST_KEY = "manifest.json"
SCHEMA = 1
REMEDY = "expected the unchanged output of `prepare`: restore it or prepare the data again"

Split = Literal["train", "held_out"]
TokenType = Literal["uint16", "uint32"]
TOKEN_BYTES: dict[str, int] = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class Shard:
    """One file of token ids; `tokens` counts ids, not bytes."""

    key: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One named part of the corpus; its train stream is the concatenation of its train shards."""

    name: str
    weight: float
    """Share of the mixture; the weights of a manifest sum to 1."""
    documents: int
    """Train documents."""
    train: tuple[Shard, ...]
    held_out_documents: int
    held_out_bytes: int
    """UTF-8 bytes of the held-out documents, the divisor of bits per byte."""
    held_out: tuple[Shard, ...]

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in the order of its token stream."""
        return self.train if split == "train" else self.held_out

    def tokens(self, split: Split) -> int:
        """Number of token ids of one split."""
        return sum(shard.tokens for shard in self.shards(split))


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
    schema: int = SCHEMA

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
        return json.dumps(
            dataclasses.asdict(self), sort_keys=True, indent=1, allow_nan=False
        ).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes, *, origin: str = MANIFEST_KEY) -> "Manifest":
        """Parse the output of `to_json`. Raises `DataError` for anything else; `origin` is its name there."""
        try:
            tree = json.loads(data)
        except ValueError as error:
            raise DataError(f"{origin}: not JSON; {REMEDY}") from error
        schema = tree.get("schema") if isinstance(tree, dict) else None
        if schema != SCHEMA:
            raise DataError(f"{origin}: schema = {schema!r}; this version reads {SCHEMA}: {REMEDY}")
        try:
            manifest = TypeAdapter(cls).validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{origin}: {place}: {first['msg']}; {REMEDY}") from error
        if not manifest.sources or not math.isclose(sum(manifest.weights), 1.0, rel_tol=1e-6):
            raise DataError(
                f"{origin}: weights = {list(manifest.weights)} do not sum to 1; {REMEDY}"
            )
        shards = (each for source in manifest.sources for each in (*source.train, *source.held_out))
        try:
            for key in (manifest.tokenizer_key, *(shard.key for shard in shards)):
                checked_key(key)
        except ValueError as error:
            raise DataError(f"{origin}: {error}; {REMEDY}") from error
        if manifest.to_json() != data:
            raise DataError(f"{origin}: changed by hand or by another version; {REMEDY}")
        return manifest


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
