"""From texts to token ids, in pieces, so that one long document needs neither more memory nor more time per byte.

A text of more than 256 Ki characters is cut before a single space between two letters or digits, where a
byte-level tokenizer such as the one that `prepare` learns ends a token anyway: its ids are those of the
whole text. Only where the last thousand spaces of a piece allow no such cut may a token be cut in two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from elastic_pt.errors import DataError

PIECE_CHARACTERS = 256 * 1024
BATCH_CHARACTERS = 1_000_000
"""What the tokenizers library is given at once: it takes a hundred bytes and more for each token."""
_CUT_ATTEMPTS = 1000
_EXCERPT_CHARACTERS = 30


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most `PIECE_CHARACTERS` that give it when joined."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int) -> int:
    last = start + PIECE_CHARACTERS
    end = last
    for _ in range(_CUT_ATTEMPTS):
        end = text.rfind(" ", start + 1, end)
        if end < 0:
            break
        if text[end - 1].isalnum() and text[end + 1].isalnum():
            return end
    return last


@dataclass(frozen=True)
class Encoder:
    """Makes the ids of documents. Runs in the process of `prepare`."""

    tokenizer: Tokenizer
    end_id: int
    is_given: bool
    """A tokenizer that was not learned here: whether a text comes back from its ids is not known before."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | None]:
        """The ids of each text and the end token; None for a text that does not come back from its ids.

        Raises `DataError` if a text gives the end token, which would end a document within.
        """
        encoded: list[NDArray[np.uint32] | None] = []
        ids: list[NDArray[np.uint32]] = []
        is_kept = True
        for piece, is_last, encoding in self._encodings(texts):
            ids.append(np.array(encoding.ids, dtype=np.uint32))
            if (ids[-1] == self.end_id).any():
                raise DataError(
                    f"tokenizer: the text {piece[:_EXCERPT_CHARACTERS]!r}… gives the token that ends a document; "
                    "expected a tokenizer whose end token stands for no text"
                )
            is_kept = is_kept and (not self.is_given or self._decode(encoding.ids) == piece)
            if is_last:
                ids.append(np.array([self.end_id], dtype=np.uint32))
                encoded.append(np.concatenate(ids) if is_kept else None)
                ids, is_kept = [], True
        return encoded

    def explain_loss(self, text: str) -> str:
        """How a text that does not come back is changed, in a few characters around the first difference."""
        for piece in pieces(text):
            back = self._decode(self.tokenizer.encode(piece, add_special_tokens=False).ids)
            if back != piece:
                same = next(
                    (n for n, (a, b) in enumerate(zip(piece, back, strict=False)) if a != b),
                    min(len(piece), len(back)),
                )
                part = slice(max(0, same - 10), same + _EXCERPT_CHARACTERS - 10)
                return f"{piece[part]!a} comes back as {back[part]!a}"
        return "every piece of the text comes back"

    def _encodings(self, texts: Sequence[str]) -> Iterator[tuple[str, bool, Encoding]]:
        """Each piece of each text, whether it is the last of its text, and what the library made of it."""
        batch: list[tuple[str, bool]] = []
        characters = 0
        for text in texts:
            done = 0
            for piece in pieces(text):
                done += len(piece)
                batch.append((piece, done == len(text)))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    yield from self._encode_batch(batch)
                    batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(
        self, batch: Sequence[tuple[str, bool]]
    ) -> Iterator[tuple[str, bool, Encoding]]:
        encodings = self.tokenizer.encode_batch_fast(
            [piece for piece, _ in batch], add_special_tokens=False
        )
        for (piece, is_last), encoding in zip(batch, encodings, strict=True):
            yield piece, is_last, encoding

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text
