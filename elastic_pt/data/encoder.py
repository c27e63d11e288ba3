"""Encode texts as token ids, in pieces: a long document needs no more memory or time per byte than a short one.

A text of more than 256 Ki characters is cut before a single space between two letters or digits. A byte-level
tokenizer, such as the one that `prepare` learns, ends a token there anyway, so the ids are those of the whole
text. If none of the last thousand spaces of a piece allows such a cut, a token may be cut in two. With a given
tokenizer, a text is encoded whole if the ids of its pieces do not decode to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from elastic_pt.data.tokenizer import library_errors
from elastic_pt.errors import DataError

PIECE_CHARACTERS = 256 * 1024
BATCH_CHARACTERS = 1_000_000
"""Characters per call of the tokenizers library, which takes 100 bytes or more for each token."""
_CUT_ATTEMPTS = 1000
_EXCERPT_CHARACTERS = 30


def pieces(text: str) -> Iterator[str]:
    """Split the text into pieces of at most `PIECE_CHARACTERS`; joined, they are the text."""
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
    """Encodes documents as token ids. Runs in the process of `prepare`."""

    tokenizer: Tokenizer
    end_id: int
    is_given: bool
    """True for a tokenizer that was not learned here: ids may not decode to the text they were made from."""
    origin: str = "tokenizer"
    """The tokenizer's name in errors."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | None]:
        """The ids of each text plus the end token; None for a text to which its ids do not decode.

        Raises `DataError` if a text gives the end token, which would split the document in two.
        """
        encoded: list[NDArray[np.uint32] | None] = []
        ids: list[NDArray[np.uint32]] = []
        for is_last, piece_ids in self._piece_ids(texts):
            ids.append(piece_ids)
            if is_last:
                encoded.append(self._checked(texts[len(encoded)], ids))
                ids = []
        return encoded

    def explain_loss(self, text: str) -> str:
        """How encoding and decoding change a text: a few characters around the first difference."""
        back = self._decode(self._whole(text))
        same = next(
            (n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
            min(len(text), len(back)),
        )
        part = slice(max(0, same - 10), same + _EXCERPT_CHARACTERS - 10)
        return f"{text[part]!a} comes back as {back[part]!a}"

    def _checked(self, text: str, pieces: list[NDArray[np.uint32]]) -> NDArray[np.uint32] | None:
        ids = np.concatenate(pieces)
        if self.is_given and self._decode(ids) != text:
            # Some tokenizers mark the start of each text, and so of each piece.
            ids = self._whole(text) if len(pieces) > 1 else ids
            if len(pieces) == 1 or self._decode(ids) != text:
                return None
        if (ids == self.end_id).any():
            raise DataError(
                f"{self.origin}: the text {text[:_EXCERPT_CHARACTERS]!a}... gives the token that ends a document; "
                "expected an end token that no text gives"
            )
        return np.append(ids, np.uint32(self.end_id))

    def _piece_ids(self, texts: Sequence[str]) -> Iterator[tuple[bool, NDArray[np.uint32]]]:
        """For each piece of each text: whether it is the last piece of the text, and its ids."""
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
    ) -> Iterator[tuple[bool, NDArray[np.uint32]]]:
        with library_errors(self.origin):
            encodings = self.tokenizer.encode_batch_fast(
                [piece for piece, _ in batch], add_special_tokens=False
            )
        for (_, is_last), encoding in zip(batch, encodings, strict=True):
            yield is_last, np.array(encoding.ids, dtype=np.uint32)

    def _whole(self, text: str) -> NDArray[np.uint32]:
        with library_errors(self.origin):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def _decode(self, ids: NDArray[np.uint32]) -> str:
        with library_errors(self.origin):
            text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text
