"""The first pass of `prepare`: the fate of every document, and what is left out.

The scan keeps one byte per document, its fate, and one digest of all texts per source. `with_fate` reads a source
again and refuses a corpus that has changed since. The hash of a document alone decides its split, so adding documents
moves no other document to the other split. One exception: if chance leaves a very small corpus without a split, one
document is moved there.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from elastic_pt.data.documents import Document, read_documents
from elastic_pt.data.left_out import DUPLICATE, SourceLosses, count_by_reason
from elastic_pt.data.sources import Skip, SourceFiles
from elastic_pt.errors import DataError

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
    """The result of the first pass. Per source: one `Fate` per document, and one digest of all texts."""

    fates: tuple[bytearray, ...]
    digests: tuple[bytes, ...]

    @property
    def documents(self) -> int:
        """Documents read, duplicates included."""
        return sum(len(fates) for fates in self.fates)


def scan_sources(losses: list[SourceLosses], held_out: float, report: Report) -> Scan:
    """Decide the fate of every document, and count in `losses` what is left out."""
    threshold = int(held_out * 2**64)
    seen: set[bytes] = set()
    smallest: list[tuple[bytes, int]] = []  # per source: hash and place of a train document
    fates: list[bytearray] = []
    digests: list[bytes] = []
    for lost in losses:
        fates.append(bytearray())
        smallest.append((b"\xff" * 33, 0))
        rolling = hashlib.sha256()
        for item in read_documents(lost.source):
            if isinstance(item, Skip):
                lost.skip(item)
                continue
            digest = _digest(item)
            rolling.update(digest)
            lost.keep(item.url)
            if digest in seen:
                fate = Fate.DUPLICATE
                lost.skip(Skip(item.url, DUPLICATE))
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
    _check_something_left(losses, fates)
    return Scan(tuple(fates), tuple(digests))


def _mend_small_splits(fates: list[bytearray], smallest: list[tuple[bytes, int]]) -> None:
    """If chance has left a very small corpus without a split, move one document there."""
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


def _check_something_left(losses: list[SourceLosses], fates: list[bytearray]) -> None:
    for lost, of_source in zip(losses, fates, strict=True):
        if Fate.TRAIN not in of_source:
            raise nothing_left(lost, losses, of_source.count(Fate.HELD_OUT))


def nothing_left(
    source: SourceLosses, losses: list[SourceLosses], held_out_documents: int
) -> DataError:
    """The error for a source without a document to train on, with the counts of what was left out."""
    counts = count_by_reason(losses)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    spec = source.source.spec
    return DataError(
        f"source {spec.name} ({', '.join(spec.paths)}): no document left to train on "
        f"(held out: {held_out_documents}; left out of all sources: {left_out or 'none'}); "
        "expected more text"
    )


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode("utf-8")).digest()


def with_fate(source: SourceFiles, scan: Scan, number: int) -> Iterator[tuple[Document, Fate]]:
    """Read a source again, each document with its fate. Raises `DataError` if the texts have changed."""
    changed = DataError(
        f"source {source.spec.name}: changed while it was prepared; expected files that do not change"
    )
    fates, rolling, place = scan.fates[number], hashlib.sha256(), 0
    for item in read_documents(source):
        if isinstance(item, Skip):
            continue
        if place == len(fates):
            raise changed
        rolling.update(_digest(item))
        yield item, Fate(fates[place])
        place += 1
    if rolling.digest() != scan.digests[number]:
        raise changed
