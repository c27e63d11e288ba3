"""Reads the token files of other trainers: documents of token ids, in their order, in pieces of bounded size.

    PREFIX.idx + PREFIX.bin       Megatron's indexed data set: the index has the documents' ends
    FOLDER/train.bin, val.bin     nanoGPT: uint16 ids and nothing else; an end token ends a document

The formats are those of `megatron.core.datasets.indexed_dataset` (version 1 of the index, the only one) and of the
`prepare.py` files of nanoGPT. An end token ends a document in both. Files are local: a bucket's client would read each
one as a whole. Runs in the process of `convert`.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_pt.errors import DataError

PIECE_TOKENS: Final = 2**20
_INDEX_ENTRIES: Final = 2**16
"""Documents, and sequences, whose part of an index is in memory."""
_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEADER: Final = struct.Struct("<9sQBQQ")
"""Magic, version, code of the id's type, number of sequences, number of documents + 1."""
_ID_TYPES: Final = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""By code. Codes 6 and 7 are floating-point types."""
_LLM_C_MAGIC: Final = 20240520
_HIGH_HALVES_SHARE: Final = 0.99
"""More of the odd ids are 0 or 1: they are the high halves of int32 ids."""

Ids = NDArray[np.integer]


class Piece(NamedTuple):
    """Consecutive ids of one document, with an end token at most as its last one.

    All but the last piece of a document have `PIECE_TOKENS` ids; that one has fewer than twice as many.
    """

    ids: Ids
    is_last: bool


@dataclass(frozen=True)
class NanoGpt:
    """A file of uint16 ids."""

    path: Path
    end_token_id: int
    vocab_size: int

    def check(self) -> None:
        """Raise `DataError` for a file that is not one of nanoGPT, before anything is written."""
        size = _size(self.path)
        if self.vocab_size > 2**16:
            raise self._bad(
                f"ids of 2 bytes, but the tokenizer has {self.vocab_size} tokens",
                "at most 65536 tokens, or PREFIX.bin beside its PREFIX.idx",
            )
        if size == 0 or size % 2:
            raise self._bad(f"{size} bytes", "uint16 ids, 2 bytes each")
        chunks = self._chunks()
        ids, _ = next(chunks)
        if ids[:2].tobytes() == _LLM_C_MAGIC.to_bytes(4, "little"):
            raise self._bad("has the header of llm.c", "ids only, as nanoGPT writes them")
        if size % 4 == 0 and np.mean(ids[1::2] <= 1) > _HIGH_HALVES_SHARE:
            raise self._bad("every second id is 0 or 1, as in a file of int32 ids", "uint16 ids")
        if self.end_token_id not in ids and not any(
            self.end_token_id in more for more, _ in chunks
        ):
            raise self._bad(
                f"no end token (id {self.end_token_id})", "ids of this tokenizer, with end tokens"
            )

    def pieces(self) -> Iterator[Piece]:
        """All documents, each with its end token (the last one may have none)."""
        return _cut(self._chunks(), self.end_token_id)

    def _chunks(self) -> Iterator[tuple[Ids, bool]]:
        left = _size(self.path) // 2
        with self.path.open("rb") as file:
            while left:
                count = min(left, PIECE_TOKENS)
                left -= count
                yield _read(file, "<u2", count, self.path), not left

    def _bad(self, found: str, expected: str) -> DataError:
        return DataError(f"{self.path}: {found}; expected {expected}")


@dataclass(frozen=True)
class Megatron:
    """An indexed data set: `PREFIX.bin` and `PREFIX.idx`."""

    prefix: Path
    end_token_id: int

    @property
    def path(self) -> Path:
        """The file of ids."""
        return self.prefix.with_name(f"{self.prefix.name}.bin")

    @property
    def index_path(self) -> Path:
        """The index."""
        return self.prefix.with_name(f"{self.prefix.name}.idx")

    def check(self) -> tuple[str, int, int]:
        """The type of the ids, the numbers of sequences and documents. Raises `DataError` for a bad head or size."""
        with self.index_path.open("rb") as index:
            id_type, sequences, documents = self._header(index)
            self._check_sizes(index, np.dtype(id_type).itemsize, sequences, documents)
        return id_type, sequences, documents

    def pieces(self) -> Iterator[Piece]:
        """All documents, with or without an end token. Raises `DataError` for a bad file.

        The sequences of a document (its sentences, say) follow each other without anything between them.
        """
        return _cut(self._chunks(), self.end_token_id)

    def _chunks(self) -> Iterator[tuple[Ids, bool]]:
        id_type, sequences, documents = self.check()
        with self.index_path.open("rb") as index, self.path.open("rb") as file:
            id_bytes = np.dtype(id_type).itemsize
            for lengths in self._document_lengths(index, id_bytes, sequences, documents):
                for length in lengths.tolist():
                    left = length
                    while left > PIECE_TOKENS:
                        yield _read(file, id_type, PIECE_TOKENS, self.path), False
                        left -= PIECE_TOKENS
                    yield _read(file, id_type, left, self.path), True

    def _header(self, index: BinaryIO) -> tuple[str, int, int]:
        data = index.read(_HEADER.size)
        if not data.startswith(_MAGIC) or len(data) < _HEADER.size:
            raise self._bad("no index of Megatron", f"a file that begins with {_MAGIC!r}")
        _, version, code, sequences, ends = _HEADER.unpack(data)
        if version != 1:
            raise self._bad(f"version {version}", "version 1")
        if code not in _ID_TYPES:
            codes = ", ".join(map(str, _ID_TYPES))
            raise self._bad(f"dtype code {code}", f"an integer type, one of the codes {codes}")
        if ends < 1:
            raise self._bad("no list of documents", "the ends of all documents, after a 0")
        return _ID_TYPES[code], sequences, ends - 1

    def _check_sizes(self, index: BinaryIO, id_bytes: int, sequences: int, documents: int) -> None:
        size, wanted = _size(self.index_path), _HEADER.size + 12 * sequences + 8 * (documents + 1)
        if size == wanted + sequences > wanted:
            raise self._bad("an index with modes, of a multimodal data set", "text only")
        if size != wanted:
            raise self._bad(
                f"{size} bytes", f"{wanted} for {sequences} sequences, {documents} documents"
            )
        tokens_bytes = 0
        if sequences:
            length = self._numbers(index, "<i4", _HEADER.size, sequences - 1, sequences)[0]
            pointer = self._numbers(
                index, "<i8", _HEADER.size + 4 * sequences, sequences - 1, sequences
            )[0]
            tokens_bytes = int(pointer) + int(length) * id_bytes
        if _size(self.path) != tokens_bytes:
            raise DataError(
                f"{self.path}: {_size(self.path)} bytes; expected {tokens_bytes}, as {self.index_path} has it: "
                "the file is truncated or belongs to another index"
            )

    def _document_lengths(
        self, index: BinaryIO, id_bytes: int, sequences: int, documents: int
    ) -> Iterator[Ids]:
        """The tokens of each document, for many documents at a time. Checks each number of the index."""
        tokens_seen = sequences_seen = 0
        for first in range(0, documents + 1, _INDEX_ENTRIES):
            last = min(first + _INDEX_ENTRIES, documents)
            ends = self._numbers(index, "<i8", _HEADER.size + 12 * sequences, first, last + 1)
            if ends[0] != sequences_seen or (np.diff(ends) < 0).any() or ends[-1] > sequences:
                raise self._bad(
                    f"ends of documents {first} to {last} do not rise from {sequences_seen}",
                    f"numbers up to {sequences}, the number of sequences",
                )
            tokens = np.full(len(ends), tokens_seen)
            for at in range(sequences_seen, int(ends[-1]), _INDEX_ENTRIES):
                end = min(at + _INDEX_ENTRIES, int(ends[-1]))
                totals = self._totals(index, sequences, range(at, end), tokens_seen, id_bytes)
                here = slice(*np.searchsorted(ends, [at, end], side="right"))
                tokens[here] = totals[ends[here] - at]
                tokens_seen = int(totals[-1])
            sequences_seen = int(ends[-1])
            yield np.diff(tokens)
        if sequences_seen != sequences:
            raise self._bad(
                f"its documents have {sequences_seen} sequences", f"all {sequences} in a document"
            )

    def _totals(
        self, index: BinaryIO, sequences: int, part: range, tokens_seen: int, id_bytes: int
    ) -> Ids:
        """The tokens of the file before each sequence of a part, and behind its last one."""
        at, end = part.start, part.stop
        lengths = self._numbers(index, "<i4", _HEADER.size, at, end).astype("i8")
        starts = self._numbers(index, "<i8", _HEADER.size + 4 * sequences, at, end)
        totals: Ids = tokens_seen + np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or (starts != totals[:-1] * id_bytes).any():
            raise self._bad(
                f"sequences {at} to {end} have gaps between them",
                "sequences that follow each other in the .bin file",
            )
        return totals

    def _numbers(self, index: BinaryIO, kind: str, offset: int, start: int, end: int) -> Ids:
        """Numbers `[start, end)` of the array at `offset`."""
        index.seek(offset + start * np.dtype(kind).itemsize)
        return _read(index, kind, end - start, self.index_path)

    def _bad(self, found: str, expected: str) -> DataError:
        return DataError(f"{self.index_path}: {found}; expected {expected}")


def _cut(chunks: Iterable[tuple[Ids, bool]], end_token_id: int) -> Iterator[Piece]:
    """The documents of chunks, each of at most `PIECE_TOKENS` ids and with whether a document ends behind it."""
    ids: Ids | None = None
    for chunk, is_last in chunks:
        ids = chunk if ids is None else np.concatenate([ids, chunk])
        start = 0
        for end in np.flatnonzero(ids == end_token_id) + 1:
            yield Piece(ids[start:end], True)
            start = int(end)
        while len(ids) - start > PIECE_TOKENS:
            yield Piece(ids[start : start + PIECE_TOKENS], False)
            start += PIECE_TOKENS
        if is_last and (start < len(ids) or not start):
            yield Piece(ids[start:], True)
        ids = None if is_last else ids[start:]


def _size(path: Path) -> int:
    return path.stat().st_size


def _read(file: BinaryIO, kind: str, count: int, path: Path) -> Ids:
    data = file.read(count * np.dtype(kind).itemsize)
    ids: Ids = np.frombuffer(data, kind, count=len(data) // np.dtype(kind).itemsize)
    if len(ids) < count:
        raise DataError(f"{path}: became shorter while it was read; expected an unchanged file")
    return ids
