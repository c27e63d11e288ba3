"""A small prepared corpus, and manifests that need no files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prepared_data import Prepared, copy_of, in_schema_1, words

from elastic_pt.data.manifest import Manifest, Shard, Source
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import SourceSpec
from elastic_pt.store.open import open_store


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two sources in shards of 1000 tokens, with blocks of 64; tests must not change it."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (texts / ("a" if number % 3 else "b")).mkdir(exist_ok=True)
        (texts / ("a" if number % 3 else "b") / f"{number}.txt").write_text(words(number))
    root = tmp_path_factory.mktemp("prepared")
    store = open_store(str(root))
    manifest = prepare(
        [
            SourceSpec("first", (str(texts / "a"),), weight=0.75),
            SourceSpec("second", (str(texts / "b"),), weight=0.25),
        ],
        store,
        vocab_size=300,
        held_out=0.2,
        shard_tokens=1000,
        block_tokens=64,
    )
    return Prepared(manifest, store, root)


@pytest.fixture(scope="session", params=[1, 2])
def either(request: pytest.FixtureRequest, prepared: Prepared) -> Prepared:
    """The same data, in each schema of the manifest."""
    return in_schema_1(prepared) if request.param == 1 else prepared


@pytest.fixture(scope="session")
def manifest_of() -> Callable[..., Manifest]:
    """Makes a manifest of sources with the given numbers of train tokens. It has no files."""

    def make(tokens: list[int], weights: list[float] | None = None) -> Manifest:
        shares = weights or [1 / len(tokens)] * len(tokens)
        sources = tuple(
            Source(f"s{i}", share, 1, (Shard(f"s{i}", count, "0" * 64),), 0, 0, ())
            for i, (count, share) in enumerate(zip(tokens, shares, strict=True))
        )
        return Manifest(300, "uint16", "<|endoftext|>", 0, "t", "0" * 64, 0.0, sources, {})

    return make


@pytest.fixture
def copied(either: Prepared, tmp_path: Path) -> Prepared:
    """A copy that a test may damage, in each schema of the manifest."""
    return copy_of(either, tmp_path / "data")
