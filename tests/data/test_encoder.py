"""Texts to ids: pieces change nothing, and a tokenizer that changes text or gives end tokens is refused."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_data import Prepared, words
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.trainers import BpeTrainer

from elastic_pt.data import encoder
from elastic_pt.data.encoder import Encoder, pieces
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import SourceSpec
from elastic_pt.data.tokenizer import (
    WORD_BYTES_MAX,
    load_tokenizer,
    load_tokenizer_file,
    train_tokenizer,
)
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store

LETTERS = "abc xyz\n\t 0.'é中\u3000"


def encoder_of(prepared: Prepared) -> Encoder:
    """The encoder of data that was prepared with a tokenizer learned here."""
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    return Encoder(tokenizer, prepared.manifest.end_token_id, is_given=False)


@given(st.text(LETTERS, min_size=100, max_size=400), st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text_and_its_ids(prepared: Prepared, text: str, size: int) -> None:
    """Pieces are bounded and join to the text; if all cuts are at clean places, the ids are those of the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "PIECE_CHARACTERS", size)
        patch.setattr(encoder, "BATCH_CHARACTERS", 3 * size)
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= size
        (ids,) = encoder_of(prepared).encode([text])
    assert ids is not None
    clean = all(left[-1].isalnum() and right[0] == " " for left, right in itertools.pairwise(cut))
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    if clean:
        assert ids.tolist() == [*whole, prepared.manifest.end_token_id]
    assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_long_text_has_the_ids_of_the_whole_text(prepared: Prepared) -> None:
    """With the real limits, one call encodes a text of several batches between short ones."""
    texts = ["a", words(5, 250_000), "b b", words(6, 60_000), ""]
    encoded = encoder_of(prepared).encode(texts)
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids is not None
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == [*whole, prepared.manifest.end_token_id]


def test_training_does_not_cut_words_within_the_limit() -> None:
    """Words up to the limit give the same tokenizer as the library alone; the file contains no limit."""
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcd", k=WORD_BYTES_MAX - 1)) + " " + words(n) for n in range(40)]
    plain = Tokenizer(BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer=trainer)
    assert train_tokenizer(iter(texts), 400).to_str() == plain.to_str()


def _saved(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(str(path))
    return path


def _word_level(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"a": 0, "</s>": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _unigram() -> Tokenizer:
    vocabulary = [("</s>", 0.0), *((chr(n), -5.0) for n in range(32, 127))]
    return Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=False))


def _added_word() -> Tokenizer:
    tokenizer = train_tokenizer(iter([words(1)]), 260)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("make", [_word_level, lambda: _word_level("</s>"), _unigram, _added_word])
def test_tokenizer_is_refused_if_text_gives_its_end_token(
    tmp_path: Path, make: Callable[[], Tokenizer]
) -> None:
    """A document with the end token's text would be split in two."""
    path = _saved(make(), tmp_path / "t.json")
    with pytest.raises(DataError, match=r"t\.json: a document that holds the text .*expected"):
        load_tokenizer_file(path)


def test_encode_refuses_a_text_that_gives_the_end_token(prepared: Prepared) -> None:
    """The trial texts may not show it, so every encoded text is checked."""
    tokenizer = load_tokenizer(prepared.store, prepared.manifest)
    end_id = tokenizer.encode("a", add_special_tokens=False).ids[0]
    with pytest.raises(DataError, match="gives the token that ends a document"):
        Encoder(tokenizer, end_id, is_given=True).encode(["b", "a"])


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [["a", 0.0], ["</s>", 0.0]], "unk_id": None},
    ],
)
def test_tokenizer_that_fails_on_a_text_is_refused(
    tmp_path: Path, model: dict[str, object]
) -> None:
    """The library's error for a text without tokens becomes one line that names the file."""
    special = {"id": 1, "content": "</s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    content = {"version": "1.0", "added_tokens": [special | flags], "model": model}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"t\.json: cannot encode or decode a text: .*expected"):
        load_tokenizer_file(tmp_path / "t.json")


def test_panic_of_the_library_is_a_data_error(prepared: Prepared) -> None:
    """A panic in compiled code is not an `Exception` in Python, but gives the same error as other failures."""

    class Panics:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise BaseException("chunk size must be non-zero")

    with pytest.raises(DataError, match=r"^t\.json: .*chunk size must be non-zero"):
        Encoder(Panics(), 0, is_given=True, origin="t.json").encode(["a"])  # type: ignore[arg-type]


def test_too_large_vocabulary_is_refused(tmp_path: Path) -> None:
    """One token with a huge id makes the vocabulary, and so the embedding, too large."""
    content = json.loads(train_tokenizer(iter([words(1)]), 260).to_str())
    content["model"]["vocab"]["zz"] = 30_000_000
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="30,000,001 tokens; expected at most 16,777,216"):
        load_tokenizer_file(tmp_path / "t.json")


def test_tokenizer_that_marks_text_starts_encodes_long_texts_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece would get a mark, so the text is encoded whole, and its ids decode to it."""
    monkeypatch.setattr(encoder, "PIECE_CHARACTERS", 50)
    tokenizer = train_tokenizer(iter([words(n) for n in range(9)]), 300)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([ByteLevelDecoder(), decoders.Strip(" ", 1, 0)])
    text = words(1)
    (ids,) = Encoder(tokenizer, 0, is_given=True).encode([text])
    assert ids is not None
    assert ids.tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
    assert len(list(pieces(text))) > 5


def test_tokenizer_with_dropout_is_refused(tmp_path: Path) -> None:
    """With random tokens, each `prepare` would give other shards."""
    content = json.loads(train_tokenizer(iter([words(1)]), 260).to_str())
    content["model"]["dropout"] = 0.1
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.dropout = 0\.1; expected none"):
        load_tokenizer_file(tmp_path / "t.json")


def _lower_case() -> Tokenizer:
    tokenizer = train_tokenizer(iter([words(1)]), 260)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _without_some_letters() -> Tokenizer:
    """A byte-level tokenizer with ASCII tokens only: other letters are silently lost."""
    tokenizer = train_tokenizer(iter([words(1)]), 260)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = {
        token: number
        for token, number in content["model"]["vocab"].items()
        if token.isascii() or token == "Ġ"
    }
    content["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("make", [_lower_case, _without_some_letters])
def test_tokenizer_that_changes_text_is_refused_before_the_corpus_is_read(
    tmp_path: Path, make: Callable[[], Tokenizer]
) -> None:
    """The error shows how the tokenizer changes a text of this corpus."""
    lines = "".join(json.dumps({"text": f"Ä text Number {n}"}) + "\n" for n in range(100))
    (tmp_path / "x.jsonl").write_text(lines)
    spec = SourceSpec("s", (str(tmp_path / "x.jsonl"),))
    path = _saved(make(), tmp_path / "t.json")
    stages: list[str] = []
    with pytest.raises(DataError, match=r"t\.json: changes 64 of the first 64 .*comes back as"):
        prepare(
            [spec],
            open_store(str(tmp_path / "out")),
            tokenizer_file=path,
            progress=lambda progress: stages.append(progress.stage),
        )
    assert stages == []


def test_document_that_a_given_tokenizer_changes_is_left_out(tmp_path: Path) -> None:
    """A few such documents are listed as left out; all others are kept."""
    texts = [words(n, 20).replace("é", "e") for n in range(99)]
    texts[80] = "Upper case"
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    spec = SourceSpec("s", (str(tmp_path / "x.jsonl"),))
    path = _saved(_lower_case(), tmp_path / "t.json")
    store = open_store(str(tmp_path / "out"))
    manifest = prepare([spec], store, tokenizer_file=path, held_out=0.2)
    assert manifest.skipped == {"changed_by_tokenizer": 1}
    source = manifest.sources[0]
    assert source.documents + source.held_out_documents == 98
    assert b'"reason": "changed_by_tokenizer", "documents": 1' in store.read("left-out.jsonl")
