"""A byte-level byte-pair tokenizer: trained here, or given as a `tokenizer.json`.

At byte level, every text has tokens and decodes to itself. One special token ends each document. The same
characters inside a document are ordinary text, so a text cannot produce the end token.

A given tokenizer may break these rules. This module refuses it if its file alone shows that (an end token
that a text can produce, dropout). Only the corpus shows whether its texts decode to themselves
(`data.encoder`).
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, FixedLength
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from elastic_pt.data.manifest import REMEDY, Manifest
from elastic_pt.errors import DataError, NotFound
from elastic_pt.store.port import Store

END_TOKEN = "<|endoftext|>"
KNOWN_END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
"""End tokens that a given tokenizer may have, in order of preference."""

_EXPECTED = "expected a tokenizer.json of the tokenizers library"

VOCAB_SIZE_MIN = 257
"""256 bytes and the end token."""
VOCAB_SIZE_MAX = 2**24
WORD_BYTES_MAX = 1024
"""Learning cuts longer words, because its time grows with word length times corpus length."""


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn exactly `vocab_size` tokens from `texts`, which are read once.

    Raises `DataError` if the texts yield fewer.
    """
    check_vocab_size(vocab_size)
    words = ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = PreTokenizers([words, FixedLength(WORD_BYTES_MAX)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.pre_tokenizer = words
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: too large for this corpus, which yields {learned} tokens; "
            f"expected {learned} or less"
        )
    return _ready(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Raise `DataError` unless `vocab_size` is within the limits."""
    if not VOCAB_SIZE_MIN <= vocab_size <= VOCAB_SIZE_MAX:
        raise DataError(
            f"--vocab-size {vocab_size}: expected a number from {VOCAB_SIZE_MIN} "
            f"(256 bytes and the end token) to {VOCAB_SIZE_MAX}"
        )


def load_tokenizer_file(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises `DataError` if it is missing, invalid, or breaks the rules of this module."""
    origin = f"tokenizer {path}"
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{origin}: a folder, pipe or device; {_EXPECTED}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{origin}: {reason}; {_EXPECTED}") from error
    tokenizer = _parse(text, origin=origin)
    size = vocabulary_size(tokenizer)
    if size > VOCAB_SIZE_MAX:
        raise DataError(f"{origin}: {size:,} tokens; expected at most {VOCAB_SIZE_MAX:,}")
    with library_errors(origin):
        _require_end_of_its_own(tokenizer, origin)
    # With dropout, the tokens of a text are random.
    dropout = json.loads(text)["model"].get("dropout")
    if dropout:
        raise DataError(f"{origin}: model.dropout = {dropout}; expected none")
    return tokenizer


@contextmanager
def library_errors(origin: str) -> Iterator[None]:
    """Raise errors of the tokenizers library, panics of its compiled code included, as a `DataError`."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic is not an Exception
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise DataError(
            f"{origin}: cannot encode or decode a text: {reason}; expected a tokenizer for any text"
        ) from error


def _require_end_of_its_own(tokenizer: Tokenizer, origin: str) -> None:
    """Refuse a tokenizer that gives its end token for a text."""
    token, token_id = end_token(tokenizer, origin=origin)
    for text in (token, f"a{token}b", f"a {token} b", f"\n{token}\n", token * 2):
        if token_id in tokenizer.encode(text, add_special_tokens=False).ids:
            raise DataError(
                f"{origin}: a document that holds the text {token!r} gives the token that ends a document; "
                "expected an end token that is special and not in the model's vocabulary"
            )


def load_tokenizer(store: Store, manifest: Manifest) -> Tokenizer:
    """The tokenizer of prepared data, its hash verified."""
    origin = f"{store.url}/{manifest.tokenizer_key}"
    try:
        data = store.read(manifest.tokenizer_key)
    except NotFound as error:
        raise DataError(f"{origin}: missing; {REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{origin}: corrupt, its SHA-256 is not that of the manifest; {REMEDY}")
    return _parse(data.decode("utf-8"), origin=origin)


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as the content of a `tokenizer.json`."""
    text: str = tokenizer.to_str()
    return text.encode("utf-8")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id plus one: the number of rows that an embedding needs, gaps included."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1


def end_token(tokenizer: Tokenizer, *, origin: str = "tokenizer") -> tuple[str, int]:
    """The token that ends a document, and its id."""
    for token in KNOWN_END_TOKENS:
        token_id: int | None = tokenizer.token_to_id(token)
        if token_id is not None:
            return token, token_id
    raise DataError(
        f"{origin}: has no end-of-document token; expected one of {' '.join(KNOWN_END_TOKENS)}"
    )


def _parse(text: str, *, origin: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{origin}: not a tokenizer ({str(error).splitlines()[0][:120]}); {_EXPECTED}"
        ) from error
    end_token(tokenizer, origin=origin)
    return _ready(tokenizer)


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    """Encode whole documents, and special tokens as ordinary text. The latter is not saved in the file."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
