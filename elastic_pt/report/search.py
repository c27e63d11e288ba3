"""Searches documents by text or hash, and tells which steps of a run read them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final

from elastic_pt.data import readings, stored_documents
from elastic_pt.data.manifest import Split
from elastic_pt.data.readings import Reading
from elastic_pt.data.stored import Damage, StreamPart, Tokens
from elastic_pt.data.stored_documents import Text, Wanted
from elastic_pt.errors import StoreError
from elastic_pt.report.damage import OnProgress, Problem, problem_of
from elastic_pt.report.reads import Reads

DOCUMENTS_MAX: Final = 1000
"""A search ends after so many documents."""

_Broken = StoreError | KeyboardInterrupt


@dataclass(frozen=True)
class Found:
    """A document that a search has found."""

    source: str
    split: Split
    document: int | None
    """Its place among the documents of the source's split, from 0; null after tokens that cannot be read."""
    tokens: tuple[int, int]
    """Its first token's place in the stream, and the place after its end token."""
    whole: bool
    """False if it is a part of a document: of one of very many tokens, or beside tokens that cannot be read."""
    sha256: str | None
    """Of its text; null for a part."""
    text: str
    """Its first words."""
    rows: tuple[int, int] | None
    """The first and the last row that have some of it; null if no row has."""
    read: int
    """How often these rows were read up to the present step, all together."""
    read_until: int
    """The same up to the last step that was asked for."""
    readings: tuple[Reading, ...]
    """The first one, the last ones up to the present step, and the next ones. Of these two at most `READINGS_MAX`."""


def search(
    reads: Reads, wanted: str, until: int, on_progress: OnProgress
) -> Iterator[Found | Problem]:
    """The documents that have a piece of text, or whose text has a SHA-256, and what cannot be searched.

    Reads and decodes the whole corpus. The caller may stop at any document.
    """
    _ = reads.plan  # One that cannot be is told before the search.
    streams = groupby(reads.tokens.streams(), key=attrgetter("source", "split"))
    for (source, split), parts in streams:
        token = 0
        while True:
            ended: list[Damage | _Broken] = []
            readable = _until_ended(parts, ended, on_progress)
            for text in _wanted(reads, Wanted(wanted), readable, token):
                yield _found(reads, source, split, text, until)
            if not ended:
                break
            if not isinstance(ended[0], Damage):
                raise ended[0]
            yield problem_of(reads, ended[0])
            token = ended[0].tokens.stop


def _until_ended(
    parts: Iterator[StreamPart], ended: list[Damage | _Broken], on_progress: OnProgress
) -> Iterator[Tokens]:
    """The tokens up to the next damage or outage, which goes into `ended`: what was read before it is still searched."""
    try:
        for _, _, content in parts:
            if isinstance(content, Damage):
                ended.append(content)
                return
            on_progress(content.nbytes)
            yield content
    except (StoreError, KeyboardInterrupt) as error:
        ended.append(error)


def _wanted(reads: Reads, wanted: Wanted, parts: Iterator[Tokens], start: int) -> Iterator[Text]:
    documents = stored_documents.documents(
        parts,
        reads.manifest.end_token_id,
        overlap=0 if wanted.is_hash else len(wanted.given.encode()),
        tokens_max=stored_documents.DOCUMENT_TOKENS_MAX
        if wanted.is_hash
        else stored_documents.PART_TOKENS_MAX,
        start=start,
    )
    return (
        text for text in stored_documents.texts(documents, reads.decode) if wanted.is_in(text.text)
    )


def _found(reads: Reads, source: int, split: Split, found: Text, until: int) -> Found:
    plan, document = reads.plan, found.document
    rows = reads.rows_holding(source, split, document.tokens)
    present = min(reads.step, until)

    def read_in(first: int, end: int, *, last: bool = False) -> list[Reading]:
        steps = range(first, end + 1)
        return readings.readings(
            plan, reads.config.train.micro_batch, source, rows, steps, last=last
        )

    past, coming = read_in(1, present, last=True), read_in(present + 1, until)
    # The first one of all tells which checkpoints have not learned from the document.
    first = [each for each in read_in(1, present)[:1] if each not in past]
    return Found(
        source=reads.manifest.sources[source].name,
        split=split,
        document=document.number,
        tokens=(document.tokens.start, document.tokens.stop),
        whole=document.whole,
        sha256=stored_documents.text_sha256(found.text) if document.whole else None,
        text=stored_documents.excerpt(found.text),
        rows=(rows[0], rows[-1]) if rows else None,
        read=readings.times_read(plan, source, rows, reads.step),
        read_until=readings.times_read(plan, source, rows, until),
        readings=(*first, *past, *coming),
    )
