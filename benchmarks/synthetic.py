"""Random tokens as prepared data, for benchmarks: no corpus, no tokenizer, no pyarrow.

The model learns nothing from them, but times, bits and failures are those of real data.
"""

import hashlib
from pathlib import Path

import numpy

from elastic_pt.data.manifest import MANIFEST_KEY, SCHEMA, Manifest, Source, Stream
from elastic_pt.data.shard_writer import BLOCK_TOKENS, ShardWriter
from elastic_pt.store.open import open_store

_TOKENIZER_KEY = "tokenizer-none.json"


def write_random_tokens(directory: Path, vocabulary: int, tokens: int, seed: int = 0) -> str:
    """Write a data set with one source into `directory`. Returns its URL."""
    store = open_store(f"file://{directory}")
    writer = ShardWriter(store, "random", "train", "uint32")
    writer.add(numpy.random.default_rng(seed).integers(0, vocabulary, tokens, dtype=numpy.uint32))
    tokenizer = b"{}"
    store.write(_TOKENIZER_KEY, tokenizer)
    manifest = Manifest(
        vocab_size=vocabulary,
        token_type="uint32",
        end_token="",
        end_token_id=0,
        tokenizer_key=_TOKENIZER_KEY,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        held_out_share=0.0,
        sources=(
            Source(
                name="random",
                weight=1.0,
                documents=1,
                train=writer.close(),
                held_out_documents=0,
                held_out_bytes=0,
                held_out=Stream(0, ()),
            ),
        ),
        skipped={},
        schema=SCHEMA,
        block_tokens=BLOCK_TOKENS,
    )
    store.write(MANIFEST_KEY, manifest.to_json())
    return store.url
