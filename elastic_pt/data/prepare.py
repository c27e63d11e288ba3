"""Turn text into token shards: three passes over the sources, with one batch of documents in memory.

    scan    hash every document (SHA-256 of its text): only the first of equal documents is kept, and the
            hash alone decides whether it trains or is held out; what is left out is listed
    learn   train the tokenizer on the documents that train (not with a given tokenizer)
    encode  tokenize, write the shards and, last, the manifest

The scan keeps one byte per document, its fate, for the later passes. They hash the texts again and refuse a
corpus that has changed (`data.scan`). The result depends only on the texts, their order and the arguments.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.data import HELD_OUT, LEFT_OUT_MAX, VOCABULARY
from elastic_pt.data.documents import Document, read_documents
from elastic_pt.data.encoder import BATCH_CHARACTERS, Encoder, pieces
from elastic_pt.data.left_out import SourceLosses
from elastic_pt.data.manifest import Manifest, Source, Split, TokenType
from elastic_pt.data.publish import publish, require_empty, require_writable, shares, token_type
from elastic_pt.data.scan import (
    PROGRESS_DOCUMENTS,
    Fate,
    Progress,
    Report,
    Scan,
    nothing_left,
    scan_sources,
    with_fate,
)
from elastic_pt.data.shard_writer import BLOCK_TOKENS, SHARD_TOKENS, ShardWriter, check_sizes
from elastic_pt.data.sources import (
    Skip,
    SourceFiles,
    SourceSpec,
    list_files,
    location,
    merge_sources,
)
from elastic_pt.data.tokenizer import (
    check_vocab_size,
    end_token,
    load_tokenizer_file,
    train_tokenizer,
)
from elastic_pt.errors import DataError
from elastic_pt.store.port import Store

BATCH_DOCUMENTS = 1024
TRIED_DOCUMENTS = 64
TRIED_CHARACTERS = 1_000_000
"""Limits of the text per source on which a given tokenizer is tested before the corpus is read."""


def prepare(
    sources: Sequence[SourceSpec],
    out: Store,
    *,
    vocab_size: int = VOCABULARY,
    held_out: float = HELD_OUT,
    tokenizer_file: Path | None = None,
    allow_left_out: float = LEFT_OUT_MAX,
    shard_tokens: int = SHARD_TOKENS,
    block_tokens: int = BLOCK_TOKENS,
    progress: Report | None = None,
) -> Manifest:
    """Tokenize `sources` into `out` and return the manifest, which is written last and only once.

    `held_out` is the share of documents kept for evaluation, in [0, 1). `tokenizer_file` is a
    `tokenizer.json` to use instead of learning `vocab_size` tokens. `allow_left_out` is the share of a
    source's files that may be left out, in [0, 1]. What is left out is counted in `Manifest.skipped` and
    listed in `left-out.jsonl`. Raises `DataError` for any mistake that the user can correct, if
    possible before a document is read. Runs in the command's process.
    """
    report = progress or (lambda _: None)
    _check_arguments(out, vocab_size, held_out, allow_left_out)
    check_sizes(shard_tokens, block_tokens)
    specs = merge_sources(sources)
    shares([spec.weight for spec in specs], [1] * len(specs))
    given = load_tokenizer_file(tokenizer_file) if tokenizer_file else None
    _require_apart(specs, out)
    losses = [SourceLosses(list_files(spec)) for spec in specs]
    _check_losses(losses, allow_left_out)
    require_writable(out)
    if given:
        encoder = Encoder(
            given, end_token(given)[1], is_given=True, origin=f"tokenizer {tokenizer_file}"
        )
        _try_tokenizer(encoder, losses, allow_left_out)
    scan = scan_sources(losses, held_out, report)
    _check_losses(losses, allow_left_out)
    files = [each.source for each in losses]
    tokenizer = given or train_tokenizer(_train_texts(files, scan, report), vocab_size)
    if not given:
        encoder = Encoder(tokenizer, end_token(tokenizer)[1], is_given=False)
    target = _Target(out, encoder, token_type(tokenizer), shard_tokens, block_tokens)
    encoded = _encode(losses, scan, target, report)
    _check_losses(losses, allow_left_out)
    return publish(out, tokenizer, encoded, losses, held_out=held_out, block_tokens=block_tokens)


def _check_arguments(out: Store, vocab_size: int, held_out: float, allow_left_out: float) -> None:
    check_vocab_size(vocab_size)
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out {held_out}: expected a share of at least 0 and below 1")
    if not 0 <= allow_left_out <= 1:
        raise DataError(f"--allow-left-out {allow_left_out}: expected a share from 0 to 1")
    require_empty(out)


def _check_losses(losses: list[SourceLosses], share_max: float) -> None:
    for each in losses:
        each.check(share_max)


def _require_apart(specs: tuple[SourceSpec, ...], out: Store) -> None:
    """Refuse an output within a source: the next `prepare` would read what this one wrote."""
    place = _real(out.url)
    for spec in specs:
        for path in spec.paths:
            if f"{place}/".startswith(f"{_real(location(path))}/"):
                raise DataError(
                    f"{out.url}: lies within the source {path}; expected a place outside of the sources"
                )


def _real(url: str) -> str:
    """The URL with symbolic links resolved."""
    path = url.removeprefix("file://")
    return url if path == url else f"file://{os.path.realpath(path)}"


def _try_tokenizer(encoder: Encoder, losses: list[SourceLosses], share_max: float) -> None:
    """Refuse a given tokenizer that changes text, tested on the starts of the first documents of each source."""
    for each in losses:
        tried, characters = 0, 0
        lost: list[str] = []
        for item in read_documents(each.source):
            if isinstance(item, Document):
                start = next(pieces(item.text))
                tried, characters = tried + 1, characters + len(start)
                lost += [start] if encoder.encode([start])[0] is None else []
            if tried == TRIED_DOCUMENTS or characters >= TRIED_CHARACTERS:
                break
        if len(lost) > share_max * tried:
            raise DataError(
                f"{encoder.origin}: changes {len(lost)} of the first {tried} documents of source "
                f"{each.source.spec.name}: {encoder.explain_loss(lost[0])}; "
                "expected a tokenizer that decodes every text to itself"
            )


def _train_texts(sources: list[SourceFiles], scan: Scan, report: Report) -> Iterator[str]:
    """The texts that the tokenizer learns from: all train documents and no held-out one."""
    done = 0
    for number, source in enumerate(sources):
        for document, fate in with_fate(source, scan, number):
            if fate == Fate.TRAIN:
                yield from pieces(document.text)
            done += 1
            if done % PROGRESS_DOCUMENTS == 0:
                report(Progress("learn", done, scan.documents))
    report(Progress("learn", done, scan.documents))


@dataclass(frozen=True)
class _Target:
    """Where and how tokens are written."""

    store: Store
    encoder: Encoder
    token_type: TokenType
    shard_tokens: int
    block_tokens: int

    def writer(self, source: str, split: Split) -> ShardWriter:
        return ShardWriter(
            self.store,
            source,
            split,
            self.token_type,
            shard_tokens=self.shard_tokens,
            block_tokens=self.block_tokens,
        )


def _encode(
    losses: list[SourceLosses], scan: Scan, target: _Target, report: Report
) -> list[Source]:
    """Write the shards of all sources. Returns the sources as the manifest lists them, except for the weights."""
    encoded: list[Source] = []
    done = 0
    for number, lost in enumerate(losses):
        encoder = _SourceEncoder(lost, target)
        for document, fate in with_fate(lost.source, scan, number):
            encoder.add(document, fate)
            done += 1
            if done % PROGRESS_DOCUMENTS == 0:
                report(Progress("encode", done, scan.documents))
        encoded.append(encoder.close())
        if not encoded[-1].documents:
            raise nothing_left(lost, losses, encoded[-1].held_out_documents)
    report(Progress("encode", done, scan.documents))
    return encoded


class _SourceEncoder:
    """Tokenizes one source in batches; documents keep their order within each split."""

    def __init__(self, losses: SourceLosses, target: _Target) -> None:
        self._losses, self._encoder = losses, target.encoder
        name = losses.source.spec.name
        self._writers = {
            Fate.TRAIN: target.writer(name, "train"),
            Fate.HELD_OUT: target.writer(name, "held_out"),
        }
        self._documents = {Fate.TRAIN: 0, Fate.HELD_OUT: 0}
        self._held_out_bytes = 0
        self._batch: list[tuple[Document, Fate]] = []
        self._batch_characters = 0

    def add(self, document: Document, fate: Fate) -> None:
        """Add the next document of the source."""
        if fate == Fate.DUPLICATE:
            return
        self._batch.append((document, fate))
        self._batch_characters += len(document.text)
        if self._batch_characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
            self._flush()

    def close(self) -> Source:
        """Write the last shards. Returns the source as the manifest lists it, except for its weight."""
        self._flush()
        return Source(
            name=self._losses.source.spec.name,
            weight=0.0,
            documents=self._documents[Fate.TRAIN],
            train=self._writers[Fate.TRAIN].close(),
            held_out_documents=self._documents[Fate.HELD_OUT],
            held_out_bytes=self._held_out_bytes,
            held_out=self._writers[Fate.HELD_OUT].close(),
        )

    def _flush(self) -> None:
        encoded = self._encoder.encode([document.text for document, _ in self._batch])
        for (document, fate), ids in zip(self._batch, encoded, strict=True):
            if ids is None:
                self._losses.drop(Skip(document.url, "changed_by_tokenizer"))
                continue
            self._documents[fate] += 1
            if fate == Fate.HELD_OUT:
                self._held_out_bytes += len(document.text.encode("utf-8"))
            self._writers[fate].add(ids)
        self._batch, self._batch_characters = [], 0
