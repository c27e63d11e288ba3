"""What faults do to the answers of an S3 server: pure functions of bytes."""

import re
from collections.abc import Iterable, Iterator
from typing import Final

_CONTENTS: Final = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_MODIFIED: Final = re.compile(rb"<LastModified>(.*?)</LastModified>")
_KEY_COUNT: Final = re.compile(rb"(?<=<KeyCount>)\d+(?=</KeyCount>)")


def without_newest(listing: bytes, keys: int) -> bytes:
    """A ListObjectsV2 answer without its `keys` newest keys, of equally new ones the last in order."""
    found = [(_modified(each[0]), each.span()) for each in _CONTENTS.finditer(listing)]
    hidden = sorted(found)[max(0, len(found) - keys) :]
    for start, end in sorted((span for _, span in hidden), reverse=True):
        listing = listing[:start] + listing[end:]
    return _KEY_COUNT.sub(lambda count: str(int(count[0]) - len(hidden)).encode(), listing, count=1)


def flipped(pieces: Iterable[bytes], bit: int) -> Iterator[bytes]:
    """The same bytes, but for one bit, counted from the begin."""
    place, mask = bit // 8, 1 << bit % 8
    for piece in pieces:
        if 0 <= place < len(piece):
            piece = piece[:place] + bytes([piece[place] ^ mask]) + piece[place + 1 :]
        place -= len(piece)
        yield piece


def first(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The first `size` bytes."""
    for piece in pieces:
        yield piece[:size]
        size -= len(piece)
        if size <= 0:
            return


def _modified(contents: bytes) -> bytes:
    found = _MODIFIED.search(contents)
    return found[1] if found else b""
