"""The tokenizer: every text decodes to itself, and a wrong file is an error."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_data import Prepared, words
from tokenizers import Tokenizer
from tokenizers.models import BPE

from elastic_pt.data.tokenizer import (
    END_TOKEN,
    load_tokenizer,
    load_tokenizer_file,
    tokenizer_bytes,
    train_tokenizer,
    vocabulary_size,
)
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store


def test_training_is_deterministic_and_gives_the_requested_size() -> None:
    """The same texts give the same file, with exactly the requested vocabulary."""
    texts = [words(i) for i in range(50)]
    first, second = (train_tokenizer(iter(texts), 500) for _ in range(2))
    assert tokenizer_bytes(first) == tokenizer_bytes(second)
    assert vocabulary_size(first) == 500


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=150, deadline=None)
def test_every_text_decodes_to_itself(prepared: Prepared, text: str) -> None:
    """At byte level no character is unknown, even in scripts that were not in the training texts."""
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_of_the_end_token_is_ordinary_text(prepared: Prepared) -> None:
    """The characters of the end token inside a text do not give its id, with the loaded tokenizer."""
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    ids = tokenizer.encode(f"a{END_TOKEN}b", add_special_tokens=False).ids
    assert prepared.manifest.end_token_id not in ids


def test_tokenizer_with_another_hash_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    """Ids have no meaning with another tokenizer, so its hash is verified."""
    store = open_store(str(tmp_path))
    with pytest.raises(DataError, match="missing"):
        load_tokenizer(store, prepared.manifest)
    store.write(prepared.manifest.tokenizer_key, tokenizer_bytes(Tokenizer(BPE())))
    with pytest.raises(DataError, match="corrupt"):
        load_tokenizer(store, prepared.manifest)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff", "not UTF-8 text"),
        (b"hello", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (tokenizer_bytes(Tokenizer(BPE())), "no end-of-document token"),
    ],
)
def test_invalid_tokenizer_file_is_refused(tmp_path: Path, data: bytes, told: str) -> None:
    """The error names the file and what is expected, in one line."""
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError, match=told) as caught:
        load_tokenizer_file(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_given_tokenizer_is_used_without_truncation_and_padding(tmp_path: Path) -> None:
    """A file made for sentences of 8 tokens still encodes whole documents."""
    tokenizer = train_tokenizer(iter([words(1)]), 260)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer_file(tmp_path / "tokenizer.json")
    assert len(loaded.encode(words(1)).ids) > 8
    assert len(loaded.encode("a").ids) == 1
