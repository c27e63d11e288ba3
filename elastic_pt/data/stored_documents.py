"""The documents of a stored stream of tokens, and their texts.

    tokens ─► documents ─► texts ─► those with a text or a hash
    row ─► its parts of documents; its tokens, each with its text

A document is what is between two end tokens.

Pure: tokens and the decoder come as arguments.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from elastic_pt.data.stored import Tokens

Decode = Callable[[list[list[int]]], list[str]]

PART_TOKENS_MAX: Final = 2**20
"""A longer document is searched for a text in parts: decoding takes about 65 bytes of memory per token."""
DOCUMENT_TOKENS_MAX: Final = 16 * 2**20
"""The same for a hash, which needs the whole text. `prepare` takes no text of more bytes than this."""
BATCH_TOKENS: Final = 2**20
"""Tokens that are decoded at once, unless one document is longer."""
EXCERPT_CHARACTERS: Final = 60
EXCERPT_TOKENS: Final = 64
"""Tokens that are decoded for an excerpt of a part of a row."""
_BROKEN: Final = "\ufffd"
"""What a decoder gives for bytes that are no character."""
_CHARACTER_BYTES: Final = 4
"""At most, in UTF-8. So no more tokens than this belong to one character."""


class Document(NamedTuple):
    """A document of a stream, or a part of a very long one."""

    number: int | None
    """Its place among the documents of the stream, from 0. None after tokens that cannot be read."""
    start: int
    """Its first token's place in the stream."""
    ids: Tokens
    """Without its end token."""
    has_start: bool
    has_end: bool

    @property
    def whole(self) -> bool:
        """Whether it is no part."""
        return self.has_start and self.has_end

    @property
    def tokens(self) -> range:
        """Its place in the stream, with its end token."""
        return range(self.start, self.start + len(self.ids) + self.has_end)


class Text(NamedTuple):
    """A document with its text."""

    document: Document
    text: str


class RowPart(NamedTuple):
    """The part of one document that a row has."""

    begins: bool
    """Whether the document begins in the row."""
    ids: Tokens


@dataclass(frozen=True)
class Wanted:
    """What is searched: a piece of text, or the SHA-256 of a whole text as `prepare` hashes it."""

    given: str

    @property
    def is_hash(self) -> bool:
        """Whether it is the hash of a text."""
        return re.fullmatch("[0-9a-fA-F]{64}", self.given) is not None

    def is_in(self, text: str) -> bool:
        """Whether a document with this text is wanted."""
        return text_sha256(text) == self.given.lower() if self.is_hash else self.given in text


def text_sha256(text: str) -> str:
    """The hash by which `prepare` knows a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def documents(
    parts: Iterable[Tokens], end_id: int, *, overlap: int, tokens_max: int, start: int = 0
) -> Iterator[Document]:
    """The documents of a stream from its token `start`, one in memory at a time.

    One of more than `tokens_max` tokens comes in parts. Each part begins with the last `overlap` tokens of the one
    before, so that a text of as many bytes is in one of them.
    """
    number, held = 0, 0
    # A stream that does not begin at its first token may begin within a document.
    counted = has_start = start == 0
    pending: list[Tokens] = []

    def document(has_end: bool) -> Document:
        ids = np.concatenate(pending)
        return Document(number if counted else None, start, ids, has_start, has_end)

    for part in parts:
        begin = 0
        for end in np.flatnonzero(part == end_id).tolist():
            pending.append(part[begin:end])
            yield document(True)
            start += held + end - begin + 1
            number, begin, held, pending, has_start = number + 1, end + 1, 0, [], True
        pending.append(part[begin:])
        held += len(part) - begin
        if held > tokens_max:
            found = document(False)
            yield found
            kept = min(overlap, held)
            start, pending = start + held - kept, [found.ids[held - kept :]]
            held, has_start = kept, False
    if held:
        yield document(False)


def texts(
    found: Iterable[Document], decode: Decode, *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Text]:
    """The documents with their texts, decoded many at a time."""
    batch: list[Document] = []
    tokens = 0
    for document in found:
        batch.append(document)
        # One more for each: a batch of empty documents must end, too.
        tokens += len(document.ids) + 1
        if tokens >= batch_tokens:
            yield from _decoded(batch, decode)
            batch, tokens = [], 0
    yield from _decoded(batch, decode)


def _decoded(batch: list[Document], decode: Decode) -> Iterator[Text]:
    return map(Text, batch, decode([document.ids.tolist() for document in batch]))


def row_parts(ids: Tokens, end_id: int, *, begins: bool) -> Iterator[RowPart]:
    """A row by document, each part with its end token if the row has it. `begins`: a document begins with the row."""
    borders = [0, *(np.flatnonzero(ids == end_id) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        if start < end:
            yield RowPart(begins or start > 0, ids[start:end])


def pieces(ids: list[int], decode: Decode) -> Iterator[tuple[list[int], str]]:
    """The text of each token, as it is after the tokens before it.

    Tokens that have parts of one character are one piece.
    """
    before: list[int] = []
    at = 0
    while at < len(ids):
        groups = [ids[at : at + count] for count in range(1, _CHARACTER_BYTES + 1)]
        context, *both = decode([before, *(before + group for group in groups)])
        texts = [each[len(context) :] for each in both]
        # No group may begin within a character: a row may, and then its first tokens are no text.
        group, text = next(
            (each for each in zip(groups, texts, strict=True) if _BROKEN not in each[1]),
            (groups[0], texts[0]),
        )
        yield group, text
        # Bytes of a broken character would join those of the next token.
        before = [] if _BROKEN in text else group
        at += len(group)


def excerpt(text: str, *, is_cut: bool = False) -> str:
    """The first words of a text, in one line. `is_cut`: more of it follows."""
    # A part of a document may begin and end within a character.
    words = " ".join(text[: 4 * EXCERPT_CHARACTERS].strip(_BROKEN).split())
    if len(words) > EXCERPT_CHARACTERS:
        words, is_cut = words[: EXCERPT_CHARACTERS - 1], True
    return f"{words}…" if is_cut else words
