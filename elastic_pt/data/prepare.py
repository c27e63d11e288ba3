"""From text to token shards, in three passes over the sources, one batch of documents in memory.

    scan    hash every document (SHA-256 of its text): the first of equal ones counts, and the hash
            alone decides whether it trains or is held out
    learn   train the tokenizer on the documents that train (not with a given tokenizer)
    encode  tokenize, write shards, and last of all the manifest

The scan leaves one byte per document, its fate, which the later passes follow; the encoding pass
hashes the texts again and refuses a corpus that changed meanwhile. Since only the hash of a document
decides its split, documents that are added later move no other document to the other side. (One
exception: where chance leaves a very small corpus without a split, one document is moved over.)
The result depends on the texts, their order and the arguments, on nothing else.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from tokenizers import Tokenizer

from elastic_pt.data.documents import Document, Skip, SourceSpec, merge_sources, read_documents
from elastic_pt.data.manifest import MANIFEST_KEY, Manifest, Source, TokenType
from elastic_pt.data.order import PERIOD_MAX, whole_weights
from elastic_pt.data.shards import HASH_CHARACTERS, SHARD_TOKENS, ShardWriter
from elastic_pt.data.tokenizer import (
    check_vocab_size,
    end_token,
    load_tokenizer_file,
    tokenizer_bytes,
    train_tokenizer,
    vocabulary_size,
)
from elastic_pt.errors import AlreadyExists, DataError
from elastic_pt.store.port import Store

BATCH_CHARACTERS = 1_000_000
BATCH_DOCUMENTS = 1024
PROGRESS_DOCUMENTS = 256
"""Documents between two calls of the progress callback."""


class Fate(IntEnum):
    """What happens to one document of the scan."""

    DUPLICATE = 0
    TRAIN = 1
    HELD_OUT = 2


@dataclass(frozen=True)
class Progress:
    """Where `prepare` is: `documents` of `documents_total` in this stage (None: not known yet)."""

    stage: str
    """scan, learn or encode."""
    documents: int
    documents_total: int | None


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Scan:
    """What the first pass knows: one `Fate` per document and one digest of the texts, per source."""

    fates: tuple[bytearray, ...]
    digests: tuple[bytes, ...]
    skipped: dict[str, int]

    @property
    def documents(self) -> int:
        """Documents read, duplicates included."""
        return sum(len(fates) for fates in self.fates)


def prepare(
    sources: Sequence[SourceSpec],
    out: Store,
    *,
    vocab_size: int = 8192,
    held_out: float = 0.01,
    tokenizer_file: Path | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Report | None = None,
) -> Manifest:
    """Tokenize `sources` into `out` and return the manifest, which is written last and only once.

    `held_out` is the share of documents kept for evaluation, in [0, 1). `tokenizer_file` is a
    `tokenizer.json` to use instead of learning `vocab_size` tokens. Raises `DataError` for anything the
    user can mend; what is left out is counted in `Manifest.skipped`. Runs in the command's process.
    """
    report = progress or (lambda _: None)
    _check_arguments(out, vocab_size, held_out, shard_tokens)
    specs = merge_sources(sources)
    given = load_tokenizer_file(tokenizer_file) if tokenizer_file else None
    scan = _scan(specs, held_out, report)
    tokenizer = given or train_tokenizer(_train_texts(specs, scan, report), vocab_size)
    size = vocabulary_size(tokenizer)
    end, end_id = end_token(tokenizer)
    token_type: TokenType = "uint16" if size <= 2**16 else "uint32"
    target = _Target(out, tokenizer, end_id, token_type, shard_tokens)
    encoded = _encode(specs, scan, target, report)
    tokenizer_data = tokenizer_bytes(tokenizer)
    tokenizer_sha256 = hashlib.sha256(tokenizer_data).hexdigest()
    tokenizer_key = f"tokenizer-{tokenizer_sha256[:HASH_CHARACTERS]}.json"
    out.write(tokenizer_key, tokenizer_data)
    manifest = Manifest(
        vocab_size=size,
        token_type=token_type,
        end_token=end,
        end_token_id=end_id,
        tokenizer_key=tokenizer_key,
        tokenizer_sha256=tokenizer_sha256,
        held_out_share=float(held_out),
        sources=encoded,
        skipped=scan.skipped,
    )
    try:
        out.create(MANIFEST_KEY, manifest.to_json())
    except AlreadyExists as error:
        raise _occupied(out) from error
    return manifest


def _check_arguments(out: Store, vocab_size: int, held_out: float, shard_tokens: int) -> None:
    check_vocab_size(vocab_size)
    if not 0 <= held_out < 1:
        raise DataError(f"held_out = {held_out}: a share of at least 0 and below 1 would be right")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens = {shard_tokens}: a positive number would be right")
    if out.size(MANIFEST_KEY) is not None:
        raise _occupied(out)


def _occupied(out: Store) -> DataError:
    return DataError(
        f"{out.url}: already holds prepared data; another, empty directory would be right"
    )


def _scan(specs: tuple[SourceSpec, ...], held_out: float, report: Report) -> Scan:
    """Decide the fate of every document."""
    threshold = int(held_out * 2**64)
    seen: set[bytes] = set()
    skipped: dict[str, int] = {}
    smallest: list[tuple[bytes, int]] = []  # per source: hash and place of a train document
    fates: list[bytearray] = []
    digests: list[bytes] = []
    for spec in specs:
        fates.append(bytearray())
        smallest.append((b"\xff" * 33, 0))
        rolling = hashlib.sha256()
        for item in read_documents(spec):
            if isinstance(item, Skip):
                skipped[item.reason] = skipped.get(item.reason, 0) + 1
                continue
            digest = _digest(item)
            rolling.update(digest)
            if digest in seen:
                fate = Fate.DUPLICATE
                skipped["duplicate"] = skipped.get("duplicate", 0) + 1
            else:
                seen.add(digest)
                below = int.from_bytes(digest[:8], "big") < threshold
                fate = Fate.HELD_OUT if below else Fate.TRAIN
                if fate == Fate.TRAIN:
                    smallest[-1] = min(smallest[-1], (digest, len(fates[-1])))
            fates[-1].append(fate)
            if len(fates[-1]) % PROGRESS_DOCUMENTS == 0:
                report(Progress("scan", sum(map(len, fates)), None))
        digests.append(rolling.digest())
    report(Progress("scan", sum(map(len, fates)), None))
    if held_out > 0:
        _mend_small_splits(fates, smallest)
    _check_something_left(specs, fates, skipped)
    return Scan(tuple(fates), tuple(digests), dict(sorted(skipped.items())))


def _mend_small_splits(fates: list[bytearray], smallest: list[tuple[bytes, int]]) -> None:
    """Chance leaves a very small corpus without one of its splits: move one document over."""
    for of_source in fates:
        if Fate.TRAIN not in of_source and Fate.HELD_OUT in of_source:
            of_source[of_source.index(Fate.HELD_OUT)] = Fate.TRAIN
    if not any(Fate.HELD_OUT in of_source for of_source in fates):
        can_spare = [
            (*smallest[number], number)
            for number, of_source in enumerate(fates)
            if of_source.count(Fate.TRAIN) > 1
        ]
        if can_spare:
            _, place, number = min(can_spare)
            fates[number][place] = Fate.HELD_OUT


def _check_something_left(
    specs: tuple[SourceSpec, ...], fates: list[bytearray], skipped: dict[str, int]
) -> None:
    for spec, of_source in zip(specs, fates, strict=True):
        if Fate.TRAIN not in of_source:
            left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            raise DataError(
                f"source {spec.name} ({', '.join(spec.paths)}): no document left to train on "
                f"(held out: {of_source.count(Fate.HELD_OUT)}; left out of all sources: {left_out or 'none'}); "
                "more text would be right"
            )


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode("utf-8")).digest()


def _train_texts(specs: tuple[SourceSpec, ...], scan: Scan, report: Report) -> Iterator[str]:
    """What the tokenizer learns from: every document that trains, none that is held out."""
    done = 0
    for number, spec in enumerate(specs):
        for document, fate in _with_fate(spec, scan, number):
            if fate == Fate.TRAIN:
                yield document.text
            done += 1
            if done % PROGRESS_DOCUMENTS == 0:
                report(Progress("learn", done, scan.documents))
    report(Progress("learn", done, scan.documents))


def _with_fate(spec: SourceSpec, scan: Scan, number: int) -> Iterator[tuple[Document, Fate]]:
    """Read a source again beside what the scan decided; `DataError` if its texts are not the same."""
    changed = DataError(
        f"source {spec.name}: changed while it was prepared; prepare again when it rests"
    )
    fates, rolling, place = scan.fates[number], hashlib.sha256(), 0
    for item in read_documents(spec):
        if isinstance(item, Skip):
            continue
        if place == len(fates):
            raise changed
        rolling.update(_digest(item))
        yield item, Fate(fates[place])
        place += 1
    if rolling.digest() != scan.digests[number]:
        raise changed


@dataclass(frozen=True)
class _Target:
    """Where tokens go, and how they are made."""

    store: Store
    tokenizer: Tokenizer
    end_id: int
    token_type: TokenType
    shard_tokens: int

    def writer(self, source: str, split: str) -> ShardWriter:
        return ShardWriter(
            self.store, f"shards/{source}/{split}", self.token_type, self.shard_tokens
        )


def _encode(
    specs: tuple[SourceSpec, ...], scan: Scan, target: _Target, report: Report
) -> tuple[Source, ...]:
    """Write the shards of all sources; the sources as the manifest has them."""
    encoded: list[Source] = []
    done = 0
    for number, spec in enumerate(specs):
        encoder = _SourceEncoder(spec.name, target)
        for document, fate in _with_fate(spec, scan, number):
            encoder.add(document, fate)
            done += 1
            if done % PROGRESS_DOCUMENTS == 0:
                report(Progress("encode", done, scan.documents))
        encoded.append(encoder.close())
    report(Progress("encode", done, scan.documents))
    weights = _shares([spec.weight for spec in specs], [each.tokens("train") for each in encoded])
    return tuple(
        replace(source, weight=weight) for source, weight in zip(encoded, weights, strict=True)
    )


class _SourceEncoder:
    """Tokenizes one source in batches; documents keep their order within each split."""

    def __init__(self, name: str, target: _Target) -> None:
        self._name, self._target = name, target
        self._writers = {
            Fate.TRAIN: target.writer(name, "train"),
            Fate.HELD_OUT: target.writer(name, "held-out"),
        }
        self._documents = {Fate.TRAIN: 0, Fate.HELD_OUT: 0}
        self._held_out_bytes = 0
        self._batch: list[tuple[Document, Fate]] = []
        self._batch_characters = 0

    def add(self, document: Document, fate: Fate) -> None:
        """Take the next document of the source."""
        if fate == Fate.DUPLICATE:
            return
        self._documents[fate] += 1
        if fate == Fate.HELD_OUT:
            self._held_out_bytes += len(document.text.encode("utf-8"))
        self._batch.append((document, fate))
        self._batch_characters += len(document.text)
        if self._batch_characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
            self._flush()

    def close(self) -> Source:
        """Write the last shards; the source as the manifest has it, its weight still open."""
        self._flush()
        return Source(
            name=self._name,
            weight=0.0,
            documents=self._documents[Fate.TRAIN],
            train=self._writers[Fate.TRAIN].close(),
            held_out_documents=self._documents[Fate.HELD_OUT],
            held_out_bytes=self._held_out_bytes,
            held_out=self._writers[Fate.HELD_OUT].close(),
        )

    def _flush(self) -> None:
        texts = [document.text for document, _ in self._batch]
        encodings = self._target.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for (_, fate), encoding in zip(self._batch, encodings, strict=True):
            self._writers[fate].add([*encoding.ids, self._target.end_id])
        self._batch, self._batch_characters = [], 0


def _shares(wanted: list[float | None], tokens: list[int]) -> list[float]:
    """Weights that sum to 1: as wanted, and by tokens where nothing was.

    When all sources have a weight the weights are relative. When only some have, these are shares of the
    whole, and the others divide the rest by their tokens. `DataError` if there is no rest.
    """
    given = sum(weight for weight in wanted if weight is not None)
    open_tokens = sum(count for weight, count in zip(wanted, tokens, strict=True) if weight is None)
    if open_tokens and given >= 1:
        raise DataError(
            f"weights {[weight for weight in wanted if weight is not None]} leave no share for the sources "
            "without one; weights that sum to less than 1, or a weight for every source, would be right"
        )
    raw = [
        weight if weight is not None else (1 - given) * count / open_tokens
        for weight, count in zip(wanted, tokens, strict=True)
    ]
    # A source that is tiny beside the others still has to be one that a mixture can hold.
    total = sum(raw)
    whole = whole_weights(
        [
            share if weight is not None else max(share, 2 * total / PERIOD_MAX)
            for share, weight in zip(raw, wanted, strict=True)
        ]
    )
    return [rows / sum(whole) for rows in whole]
