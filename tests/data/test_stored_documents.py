"""The documents of a stream and their texts, also in parts, and by row."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.data import stored_documents

END = 0


def letters(ids: list[list[int]]) -> list[str]:
    """A tokenizer of one letter per token."""
    return ["".join(chr(96 + each) for each in some) for some in ids]


def parts_of(ids: list[int], sizes: list[int]) -> list[np.ndarray]:
    """A stream in parts of these sizes, again and again."""
    parts, at, turn = [], 0, 0
    while at < len(ids):
        parts.append(np.array(ids[at : at + sizes[turn % len(sizes)]], dtype=np.uint16))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return parts


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 20),
)
def test_documents_are_what_is_between_end_tokens(
    ids: list[int], sizes: list[int], batch_tokens: int
) -> None:
    """However a stream is cut into parts and batches, its documents and their places are the same."""
    documents = stored_documents.documents(parts_of(ids, sizes), END, overlap=0, tokens_max=99)
    found = list(stored_documents.texts(documents, letters, batch_tokens=batch_tokens))
    expected = letters([ids])[0].split("`")
    if not expected[-1]:
        del expected[-1]
    assert [each.text for each in found] == expected
    assert [each.document.number for each in found] == list(range(len(expected)))
    at = 0
    for document, text in found:
        assert document.tokens.start == at
        assert document.whole == (at + len(text) < len(ids))
        at = document.tokens.stop
    assert at == len(ids)


@given(st.integers(30, 80), st.integers(1, 12), st.integers(1, 5), st.integers(0, 70))
def test_text_in_a_very_long_document_is_in_one_part(
    length: int, size: int, wanted: int, at: int
) -> None:
    """A stream without end tokens is searched in bounded memory, and no text is lost at the borders of the parts."""
    ids = [2] * length
    at = min(at, length - wanted)
    ids[at : at + wanted] = [1] * wanted
    documents = list(
        stored_documents.documents(parts_of(ids, [size]), END, overlap=wanted, tokens_max=15)
    )
    assert all(len(each.ids) <= 15 + size for each in documents)
    assert any("a" * wanted in letters([each.ids.tolist()])[0] for each in documents)
    assert all(each.number == 0 and not each.whole for each in documents)
    for each in documents:
        assert each.ids.tolist() == ids[each.tokens.start : each.tokens.stop]


def test_a_piece_of_a_document_is_never_called_whole() -> None:
    """A hash of a piece is no hash of a document: not of its last part, and not of what follows a gap."""
    row = [np.array([2] * 9, dtype=np.uint16), np.array([2, END, 3, END], dtype=np.uint16)]
    parts = list(stored_documents.documents(row, END, overlap=1, tokens_max=5))
    assert [(each.number, each.whole) for each in parts] == [(0, False), (0, False), (1, True)]
    after = list(stored_documents.documents(row, END, overlap=1, tokens_max=50, start=7))
    assert [(each.number, each.whole) for each in after] == [(None, False), (None, True)]
    assert [each.tokens for each in after] == [range(7, 18), range(18, 20)]


def test_wanted_is_a_text_or_the_hash_that_prepare_makes() -> None:
    """64 hexadecimal digits are the hash of a whole text; anything else is a piece of one."""
    sha256 = hashlib.sha256("ünd so".encode()).hexdigest()
    assert stored_documents.text_sha256("ünd so") == sha256
    assert stored_documents.Wanted(sha256).is_in("ünd so")
    assert stored_documents.Wanted(sha256.upper()).is_in("ünd so")
    assert not stored_documents.Wanted(sha256).is_in(f"{sha256} and more")
    assert stored_documents.Wanted("nd s").is_in("ünd so")
    assert not stored_documents.Wanted("Nd s").is_in("ünd so")


def test_parts_of_a_row_tell_where_documents_begin() -> None:
    """Only the first part of a row may have begun before it."""
    row = np.array([5, 6, END, 7, END, END, 8], dtype=np.uint16)
    for begins in (False, True):
        parts = list(stored_documents.row_parts(row, END, begins=begins))
        assert [part.ids.tolist() for part in parts] == [[5, 6, END], [7, END], [END], [8]]
        assert [part.begins for part in parts] == [begins, True, True, True]


def test_pieces_of_a_text_join_tokens_of_one_character() -> None:
    """Tokens that are bytes of one character are one piece; bytes that are no character do not swallow the rest."""
    raw = {1: b"a", 2: b"\xe2", 3: b"\x82", 4: b"\xac", 5: b"\xff"}

    def decode(ids: list[list[int]]) -> list[str]:
        return [b"".join(raw[each] for each in some).decode(errors="replace") for some in ids]

    assert list(stored_documents.pieces([1, 2, 3, 4, 1], decode)) == [
        ([1], "a"),
        ([2, 3, 4], "€"),
        ([1], "a"),
    ]
    # A row may begin and end within a character.
    found = list(stored_documents.pieces([4, 2, 3, 4, 5, 5, 5, 1, 2, 3], decode))
    assert [ids for ids, _ in found] == [[4], [2, 3, 4], [5], [5], [5], [1], [2], [3]]
    assert [text for _, text in found] == ["\ufffd", "€", *"\ufffd" * 3, "a", *"\ufffd" * 2]


def test_excerpt_is_one_short_line() -> None:
    """First words of a document fit into a line, whatever its text, and tell whether there is more of it."""
    assert stored_documents.excerpt(" a\n\tb  c ") == "a b c"
    assert len(stored_documents.excerpt("word " * 1000)) == stored_documents.EXCERPT_CHARACTERS
    assert stored_documents.excerpt("\ufffda b\ufffd", is_cut=True) == "a b…"
