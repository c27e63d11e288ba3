"""Turn the token files of Megatron and nanoGPT into prepared data, with one shard in memory.

    data.foreign ─► pieces of documents ─► checks, split, end token ─► ShardWriter ─► manifest

The ids stay as they are. A document without an end token gets one; a document without any other token is left out.
A folder's `val.bin` is held out. Where there is none, the SHA-256 of a document's ids, without its end token, decides
whether it is held out, so equal documents are on the same side. Runs in the command's process.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from elastic_pt.data import HELD_OUT
from elastic_pt.data.foreign import PIECE_TOKENS, Ids, Megatron, NanoGpt, Piece
from elastic_pt.data.left_out import SourceLosses
from elastic_pt.data.manifest import Manifest, Source, Split
from elastic_pt.data.publish import publish, require_empty, require_writable, shares, token_type
from elastic_pt.data.scan import PROGRESS_DOCUMENTS, Progress, Report
from elastic_pt.data.shard_writer import BLOCK_TOKENS, SHARD_TOKENS, ShardWriter
from elastic_pt.data.sources import Skip, SourceFiles, SourceSpec, merge_sources
from elastic_pt.data.tokenizer import (
    end_token,
    library_errors,
    load_tokenizer_file,
    vocabulary_size,
)
from elastic_pt.errors import DataError
from elastic_pt.store.port import Store

_EXPECTED = (
    "expected PREFIX of Megatron's PREFIX.bin and PREFIX.idx, a folder with train.bin as nanoGPT writes it, "
    "or such a file"
)
_NANO_GPT_NAMES = ("train.bin", "val.bin")


@dataclass(frozen=True)
class _File:
    """One input, and the split of all its documents; None: the hash of each document decides."""

    content: Megatron | NanoGpt
    split: Split | None


@dataclass(frozen=True)
class Converted:
    """The prepared data, and how many documents came without an end token."""

    manifest: Manifest
    end_tokens_added: int


def convert(
    sources: Sequence[SourceSpec],
    out: Store,
    *,
    tokenizer_file: Path,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    block_tokens: int = BLOCK_TOKENS,
    progress: Report | None = None,
) -> Converted:
    """Write the documents of `sources` to `out`. The manifest is written last and only once.

    `tokenizer_file` is the `tokenizer.json` that made the ids. `held_out` is the share of documents kept for
    evaluation, in [0, 1), where no `val.bin` has them. Raises `DataError` for any mistake that the user can correct.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out {held_out}: expected a share of at least 0 and below 1")
    require_empty(out)
    specs = merge_sources(sources)
    shares([spec.weight for spec in specs], [1] * len(specs))
    tokenizer = load_tokenizer_file(tokenizer_file)
    files = [[file for path in spec.paths for file in _find(path, tokenizer)] for spec in specs]
    require_writable(out)
    losses = [SourceLosses(SourceFiles(spec, (), (), frozenset())) for spec in specs]
    written: list[Source] = []
    done = added = 0
    for of_source, lost in zip(files, losses, strict=True):
        writers = _Writers(out, lost, tokenizer, held_out, (shard_tokens, block_tokens))
        for file in of_source:
            for piece in file.content.pieces():
                writers.add(piece, file)
                done += piece.is_last
                if progress and piece.is_last and done % PROGRESS_DOCUMENTS == 0:
                    progress(Progress("convert", done, None))
        written.append(writers.close())
        added += writers.end_tokens_added
    manifest = publish(
        out, tokenizer, written, losses, held_out=held_out, block_tokens=block_tokens
    )
    return Converted(manifest, added)


def _find(path: str, tokenizer: Tokenizer) -> list[_File]:
    """The files of one path of a source, with checked sizes and heads. Raises `DataError` if there are none."""
    if "://" in path and not path.startswith("file://"):
        raise DataError(f"source {path}: a URL; expected local files")
    try:
        files = _files(path, end_token(tokenizer)[1], vocabulary_size(tokenizer))
        for each in files:
            each.content.check()
    except OSError as error:
        raise DataError(f"source {path}: {error.strerror}; {_EXPECTED}") from error
    return files


def _files(path: str, end_id: int, vocab_size: int) -> list[_File]:
    place = Path(path.removeprefix("file://"))
    if place.is_dir():
        train, held_out = (NanoGpt(place / name, end_id, vocab_size) for name in _NANO_GPT_NAMES)
        if not train.path.is_file():
            raise DataError(f"source {path}: a folder without train.bin; {_EXPECTED}")
        if held_out.path.is_file():
            return [_File(train, "train"), _File(held_out, "held_out")]
        return [_File(train, None)]
    prefix = place.with_suffix("") if place.suffix in (".bin", ".idx") else place
    indexed = Megatron(prefix, end_id)
    if indexed.index_path.is_file():
        if not indexed.path.is_file():
            raise DataError(f"source {path}: {indexed.path} does not exist; {_EXPECTED}")
        return [_File(indexed, None)]
    if place.is_file():
        return [_File(NanoGpt(place, end_id, vocab_size), None)]
    raise DataError(f"source {path}: no {indexed.index_path}; {_EXPECTED}")


class _Writers:
    """Writes the documents of one source to both splits."""

    def __init__(
        self,
        store: Store,
        losses: SourceLosses,
        tokenizer: Tokenizer,
        held_out: float,
        sizes: tuple[int, int],
    ) -> None:
        self._losses, self._tokenizer = losses, tokenizer
        self._threshold = int(held_out * 2**64)
        self._vocab_size, self._end_id = vocabulary_size(tokenizer), end_token(tokenizer)[1]
        shard_tokens, block_tokens = sizes
        self._writers: dict[Split, ShardWriter] = {
            split: ShardWriter(
                store,
                losses.source.spec.name,
                split,
                token_type(tokenizer),
                shard_tokens=shard_tokens,
                block_tokens=block_tokens,
            )
            for split in ("train", "held_out")
        }
        self._documents: dict[Split, int] = {"train": 0, "held_out": 0}
        self._held_out_bytes = 0
        self.end_tokens_added = 0
        self._split: Split | None = None
        """Of the document that has begun; None: the next piece begins one, unless this one is left out."""
        self._is_left_out = False
        """Whether the document that has begun is left out."""
        self._file: _File | None = None
        self._file_tokens = 0
        """Read of this file, for errors."""

    def add(self, piece: Piece, file: _File) -> None:
        """Add the next piece of a file."""
        self._check(piece.ids, file)
        if self._split is None and not self._is_left_out:
            self._begin(piece.ids, file)
        if self._split is None:
            self._is_left_out = not piece.is_last
            return
        self._writers[self._split].add(piece.ids.astype(np.uint32))
        if self._split == "held_out":
            self._held_out_bytes += self._text_bytes(piece.ids)
        if piece.is_last:
            if piece.ids[-1] != self._end_id:
                self._writers[self._split].add([self._end_id])
                self.end_tokens_added += 1
            self._split = None

    def _begin(self, ids: Ids, file: _File) -> None:
        """Decide the split of the document that begins with these ids; none if it is left out."""
        if len(ids) and (len(ids) > 1 or ids[0] != self._end_id):
            split = file.split or self._split_of(ids)
            # Bits per byte need bytes: special tokens alone have no text.
            if split == "train" or self._text_bytes(ids):
                self._split = split
                self._documents[split] += 1
                return
        self._losses.skip(Skip(file.content.path.absolute().as_uri(), "empty"))

    def close(self) -> Source:
        """Write the last shards. Returns the source as the manifest lists it, except for its weight."""
        spec = self._losses.source.spec
        if not self._documents["train"]:
            raise DataError(
                f"source {spec.name} ({', '.join(spec.paths)}): no document left to train on "
                f"(held out: {self._documents['held_out']}); expected more documents"
            )
        return Source(
            name=spec.name,
            weight=0.0,
            documents=self._documents["train"],
            train=self._writers["train"].close(),
            held_out_documents=self._documents["held_out"],
            held_out_bytes=self._held_out_bytes,
            held_out=self._writers["held_out"].close(),
        )

    def _check(self, ids: Ids, file: _File) -> None:
        if file is not self._file:
            self._file, self._file_tokens = file, 0
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            place = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
            raise DataError(
                f"{file.content.path}: token {self._file_tokens + place} has id {ids[place]}; expected ids from 0 to "
                f"{self._vocab_size - 1}, those of the tokenizer"
            )
        self._file_tokens += len(ids)

    def _split_of(self, ids: Ids) -> Split:
        text = ids[:-1] if ids[-1] == self._end_id else ids
        digest = hashlib.sha256(text[:PIECE_TOKENS].astype("<u4").tobytes()).digest()
        return "held_out" if int.from_bytes(digest[:8], "big") < self._threshold else "train"

    def _text_bytes(self, ids: Ids) -> int:
        """Bytes of the text; a few more or less where a document of more than `PIECE_TOKENS` is cut."""
        with library_errors("--tokenizer"):
            return len(self._tokenizer.decode(ids.tolist()).encode("utf-8"))
