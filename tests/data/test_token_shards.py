"""Shards: windows cross files, and a damaged file is never read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_data import Prepared, cache_at

from elastic_pt.data.manifest import Manifest, Source, Split
from elastic_pt.data.shards import ShardWriter, TokenReader
from elastic_pt.errors import ConfigError, DataError, StoreError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


def whole_stream(prepared: Prepared, source: int, split: Split) -> np.ndarray:
    """A source's stream, read from its files without the code under test."""
    shards = prepared.manifest.sources[source].shards(split)
    data = b"".join((prepared.root / shard.key).read_bytes() for shard in shards)
    return np.frombuffer(data, dtype="<u2").astype(np.int64)


def in_memory(prepared: Prepared, name: str) -> Store:
    """The prepared data in another kind of store."""
    store = open_store(f"memory://test-shards-{name}")
    for path in sorted(prepared.root.rglob("*.bin")):
        store.write(str(path.relative_to(prepared.root)), path)
    return store


@pytest.mark.parametrize("sequence_length", [1, 7, 100, 999, 1000, 2500])
def test_window_is_a_range_of_the_stream(prepared: Prepared, sequence_length: int) -> None:
    """Row r holds tokens r * T to r * T + T inclusive, also across the ends of shards."""
    reader = TokenReader(prepared.manifest, prepared.store, cache=cache_at())
    for source in (0, 1):
        stream = whole_stream(prepared, source, "train")
        assert len(prepared.manifest.sources[source].train) > 3
        rows = (len(stream) - 1) // sequence_length
        windows = reader.windows([(source, row) for row in range(rows)], sequence_length)
        assert windows.dtype == torch.int64
        assert windows.shape == (rows, sequence_length + 1)
        for row, window in enumerate(windows):
            start = row * sequence_length
            np.testing.assert_array_equal(window, stream[start : start + sequence_length + 1])


def test_window_beyond_the_stream_raises(prepared: Prepared) -> None:
    """A row that does not exist raises `IndexError`."""
    reader = TokenReader(prepared.manifest, prepared.store, cache=cache_at())
    rows = prepared.manifest.sources[0].tokens("train") // 100
    for row in (-1, rows):
        with pytest.raises(IndexError):
            reader.windows([(0, row)], 100)


def test_remote_store_is_read_through_the_cache(prepared: Prepared, tmp_path: Path) -> None:
    """Data in a bucket gives the same tokens; a second reader does not need the bucket."""
    store = in_memory(prepared, "cache")
    expected = TokenReader(prepared.manifest, prepared.store, cache=cache_at()).windows(
        [(0, 0), (1, 3)], 600
    )
    assert torch.equal(
        TokenReader(prepared.manifest, store, cache=cache_at(tmp_path)).windows(
            [(0, 0), (1, 3)], 600
        ),
        expected,
    )
    empty = open_store("memory://test-shards-empty")
    again = TokenReader(prepared.manifest, empty, cache=cache_at(tmp_path))
    assert torch.equal(again.windows([(0, 0), (1, 3)], 600), expected)
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".verified", ".lock"}


def test_damaged_cache_file_is_downloaded_again(prepared: Prepared, tmp_path: Path) -> None:
    """A damaged file in the cache costs one download, and no error."""
    store = in_memory(prepared, "mended")
    TokenReader(prepared.manifest, store, cache=cache_at(tmp_path)).windows([(0, 0)], 600)
    for path in tmp_path.glob("*.bin"):
        path.write_bytes(b"\0" * path.stat().st_size)
    reader = TokenReader(prepared.manifest, store, cache=cache_at(tmp_path))
    expected = TokenReader(prepared.manifest, prepared.store, cache=cache_at()).windows(
        [(0, 0)], 600
    )
    assert torch.equal(reader.windows([(0, 0)], 600), expected)


DAMAGES = ["flipped", "truncated", "longer", "missing"]


def damage(path: Path, kind: str) -> None:
    """Damage a file as disks and people do."""
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-2])
    elif kind == "longer":
        path.write_bytes(data + b"\0\0")
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("remote", [False, True])
def test_damaged_shard_is_an_error_with_its_name(
    copied: Prepared, tmp_path: Path, kind: str, remote: bool
) -> None:
    """One flipped bit, a wrong length or a missing file raises before any token of the shard is read."""
    shard = copied.manifest.sources[0].train[1]
    damage(copied.root / shard.key, kind)
    store = in_memory(copied, kind) if remote else copied.store
    reader = TokenReader(copied.manifest, store, cache=cache_at(tmp_path / "cache"))
    reader.windows([(0, 0)], 500)
    # A missing shard may come back; a damaged one stays damaged.
    with pytest.raises(StoreError if kind == "missing" else DataError, match=shard.key):
        reader.windows([(0, 0), (0, 1)], 700)


def test_unwritable_cache_is_an_error(prepared: Prepared, tmp_path: Path) -> None:
    """The error names the cache directory and what is expected of it."""
    (tmp_path / "file").write_bytes(b"")
    reader = TokenReader(
        prepared.manifest, in_memory(prepared, "full"), cache=cache_at(tmp_path / "file")
    )
    with pytest.raises(ConfigError, match=r"data\.cache = .*file.*expected a directory"):
        reader.windows([(0, 0)], 10)


def test_large_vocabulary_uses_uint32_tokens(tmp_path: Path) -> None:
    """Ids beyond 16 bits come back unchanged from uint32 shards."""
    store = open_store(str(tmp_path))
    writer = ShardWriter(store, "shards/s/train", "uint32", 3)
    for ids in ([70_000, 1], [], [2**31, 3, 4, 5, 6]):
        writer.add(ids)
    shards = writer.close()
    assert [shard.tokens for shard in shards] == [3, 3, 1]
    source = Source("s", 1.0, 1, shards, 0, 0, ())
    manifest = Manifest(2**31 + 1, "uint32", "e", 0, "t", "", 0.0, (source,), {})
    stream = TokenReader(manifest, store, cache=cache_at()).stream(0, "train", 0, 7)
    assert stream.tolist() == [70_000, 1, 2**31, 3, 4, 5, 6]
