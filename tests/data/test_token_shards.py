"""Shards: windows cross blocks and files, and a damaged block is never read."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_data import Prepared, cache_at, copy_of, in_memory, settle, shards_of, stream_of

from elastic_pt.data.blocks import DamagedBlock
from elastic_pt.data.manifest import Manifest, Source, blocks_key, read_manifest
from elastic_pt.data.shard_writer import ShardWriter
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import ConfigError, DataError, StoreError
from elastic_pt.store.open import open_store

STORED = Path(__file__).parents[1] / "stored_run" / "0.1" / "data"
LENGTHS = [1, 7, 64, 100, 999, 1000, 2500]


def expected_window(prepared: Prepared, source: int, row: int, length: int) -> np.ndarray:
    """A window of the stream, without the code under test."""
    return stream_of(prepared, source)[row * length : (row + 1) * length + 1]


@pytest.mark.parametrize("sequence_length", LENGTHS)
@pytest.mark.parametrize("remote", [False, True])
def test_window_is_a_range_of_the_stream(
    either: Prepared, tmp_path: Path, sequence_length: int, remote: bool
) -> None:
    """Row r holds tokens r * T to r * T + T inclusive, also across the ends of blocks and shards."""
    store = in_memory(either, "windows") if remote else either.store
    reader = TokenReader(either.manifest, store, cache=cache_at(tmp_path))
    for source in (0, 1):
        stream = stream_of(either, source)
        assert len(shards_of(either, source, "train")) > 3
        rows = (len(stream) - 1) // sequence_length
        for _ in range(2):
            windows = reader.windows([(source, row) for row in range(rows)], sequence_length)
            assert windows.dtype == torch.int64
            assert windows.shape == (rows, sequence_length + 1)
            for row, window in enumerate(windows):
                start = row * sequence_length
                np.testing.assert_array_equal(window, stream[start : start + sequence_length + 1])


def test_held_out_stream_is_read(either: Prepared) -> None:
    """Any range of the held-out stream, also an empty one."""
    reader = TokenReader(either.manifest, either.store, cache=cache_at())
    stream = stream_of(either, 1, "held_out")
    for start, end in ((0, len(stream)), (5, 1001), (len(stream) - 1, len(stream)), (3, 3)):
        np.testing.assert_array_equal(reader.stream(1, "held_out", start, end), stream[start:end])


def test_data_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Data that an earlier version has written (schema 1) gives its bytes, from a directory and from a bucket."""
    store = open_store(str(STORED))
    manifest = read_manifest(store)
    assert manifest.schema == 1
    stored = Prepared(manifest, store, STORED)
    stream = stream_of(stored, 0)
    for each in (store, in_memory(stored, "stored")):
        reader = TokenReader(manifest, each, cache=cache_at(tmp_path))
        np.testing.assert_array_equal(reader.stream(0, "train", 0, len(stream)), stream)


def test_window_beyond_the_stream_raises(either: Prepared) -> None:
    """A row that does not exist raises `IndexError`."""
    reader = TokenReader(either.manifest, either.store, cache=cache_at())
    rows = either.manifest.sources[0].tokens("train") // 100
    for row in (-1, rows):
        with pytest.raises(IndexError):
            reader.windows([(0, row)], 100)
    assert reader.windows([], 100).shape == (0, 101)


def test_remote_store_is_read_through_the_cache(either: Prepared, tmp_path: Path) -> None:
    """Data in a bucket gives the same tokens; a second reader does not need the bucket's shards."""
    store = in_memory(either, "cache")
    expected = TokenReader(either.manifest, either.store, cache=cache_at()).windows(
        [(0, 0), (1, 3)], 600
    )
    first = TokenReader(either.manifest, store, cache=cache_at(tmp_path))
    assert torch.equal(first.windows([(0, 0), (1, 3)], 600), expected)
    settle(first)
    for key in store.keys("shards"):
        store.delete(key)
    again = TokenReader(either.manifest, store, cache=cache_at(tmp_path))
    assert torch.equal(again.windows([(0, 0), (1, 3)], 600), expected)


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
    """One flipped bit, a wrong length or a missing file raises before any token of the block is read."""
    shard = shards_of(copied, 0, "train")[1]
    damage(copied.root / shard.key, kind)
    store = in_memory(copied, kind) if remote else copied.store
    reader = TokenReader(copied.manifest, store, cache=cache_at(tmp_path / "cache"))
    reader.windows([(0, 0)], 500)
    # A missing shard may come back; a damaged one stays damaged.
    with pytest.raises(StoreError if kind == "missing" else DataError, match=shard.key):
        reader.windows([(0, 0), (0, 1), (0, 2)], 700)


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_block_is_named_with_its_rows(
    prepared: Prepared, tmp_path: Path, remote: bool
) -> None:
    """The error has the file, the block and the rows; other blocks of the shard are read."""
    copied = copy_of(prepared, tmp_path / "data")
    shard = shards_of(copied, 0, "train")[1]
    damage(copied.root / shard.key, "flipped")
    store = in_memory(copied, "block") if remote else copied.store
    reader = TokenReader(copied.manifest, store, cache=cache_at(tmp_path / "cache"))
    # The byte 1000 of the second shard is in its block 7: tokens 1448 to 1512 of the stream.
    good = [(0, row) for row in [*range(14), *range(16, 20)]]
    windows = reader.windows(good, 100)
    for (_, row), window in zip(good, windows, strict=True):
        np.testing.assert_array_equal(window, expected_window(prepared, 0, row, 100))
    with pytest.raises(DamagedBlock) as caught:
        reader.windows([(0, 13), (0, 15)], 100)
    error = caught.value
    assert (error.source, error.split, error.tokens) == (0, "train", range(1448, 1512))
    assert str(error).startswith(f"{store.url}/{shard.key}: corrupt")
    assert "block 7 of 16" in str(error)
    assert "rows first:14 to first:15" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_index_is_an_error_with_its_name(
    prepared: Prepared, tmp_path: Path, remote: bool
) -> None:
    """A changed block index raises before any token is read."""
    copied = copy_of(prepared, tmp_path / "data")
    key = blocks_key(shards_of(copied, 0, "train")[0].key)
    damage(copied.root / key, "flipped")
    store = in_memory(copied, "index") if remote else copied.store
    reader = TokenReader(copied.manifest, store, cache=cache_at(tmp_path / "cache"))
    with pytest.raises(DataError, match=key):
        reader.windows([(0, 0)], 10)


@pytest.mark.parametrize("how", ["replaced", "written", "removed", "truncated"])
def test_local_file_that_changes_while_it_is_open_is_verified_again(
    copied: Prepared, tmp_path: Path, how: str
) -> None:
    """A reader that has verified a block never returns other bytes for it: the change is found at the next batch."""
    shard = shards_of(copied, 0, "train")[0]
    path = copied.root / shard.key
    reader = TokenReader(copied.manifest, copied.store, cache=cache_at(tmp_path / "cache"))
    first = reader.windows([(0, 2)], 10)
    good = path.read_bytes()
    bad = b"\1\0" * (len(good) // 2)
    if how == "replaced":
        (tmp_path / "new").write_bytes(bad)
        os.replace(tmp_path / "new", path)
    elif how == "written":
        with path.open("r+b") as file:
            file.write(bad)
    elif how == "truncated":
        os.truncate(path, 8)
    else:
        path.unlink()
    with pytest.raises(StoreError if how == "removed" else DataError, match=shard.key):
        reader.windows([(0, 2)], 10)
    path.write_bytes(good)
    assert torch.equal(reader.windows([(0, 2)], 10), first)


def test_unwritable_cache_is_an_error(either: Prepared, tmp_path: Path) -> None:
    """The error names the cache directory and what is expected of it."""
    (tmp_path / "file").write_bytes(b"")
    reader = TokenReader(
        either.manifest, in_memory(either, "full"), cache=cache_at(tmp_path / "file")
    )
    with pytest.raises(ConfigError, match=r"data\.cache = .*file.*expected a directory"):
        reader.windows([(0, 0)], 10)


def test_large_vocabulary_uses_uint32_tokens(tmp_path: Path) -> None:
    """Ids beyond 16 bits come back unchanged from uint32 shards."""
    store = open_store(str(tmp_path))
    writer = ShardWriter(store, "s", "train", "uint32", shard_tokens=3, block_tokens=2)
    for ids in ([70_000, 1], [], [2**31, 3, 4, 5, 6]):
        writer.add(ids)
    stream = writer.close()
    source = Source("s", 1.0, 1, stream, 0, 0, ())
    manifest = Manifest(
        2**31 + 1, "uint32", "e", 0, "t", "", 0.0, (source,), {}, schema=2, block_tokens=2
    )
    found = TokenReader(manifest, store, cache=cache_at()).stream(0, "train", 0, 7)
    assert found.tolist() == [70_000, 1, 2**31, 3, 4, 5, 6]


def test_writer_holds_no_more_than_its_shard(tmp_path: Path) -> None:
    """Many small documents need the memory of their tokens, and none for each document."""
    tracemalloc.start()
    try:
        writer = ShardWriter(open_store(str(tmp_path)), "s", "train", "uint16", shard_tokens=10**5)
        for _ in range(50_000):
            writer.add([1])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert writer.close().tokens == 50_000
    assert peak_bytes < 1e6


def test_missing_file_is_waited_for(
    copied: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a directory is not mounted, or a bucket lacks an object, a reader with a limit waits, and ends nothing."""
    away, root = tmp_path / "away", copied.root
    shard = shards_of(copied, 0, "train")[0]
    opened = os.open

    def mounted_at_the_second_try(path: str | Path, *arguments: int) -> int:
        if str(path).endswith(shard.key) and away.exists() and len(tries) < 2:
            tries.append(path)
            if len(tries) == 2:
                away.rename(root)
        return opened(path, *arguments)

    tries: list[str | Path] = []
    stream = stream_of(copied, 0)
    reader = TokenReader(
        copied.manifest, copied.store, cache=cache_at(tmp_path / "cache"), timeout_s=60.0
    )
    # Its page is read before: the directory goes away after the start.
    reader.windows([(0, 30)], 100)
    root.rename(away)
    monkeypatch.setattr(os, "open", mounted_at_the_second_try)
    np.testing.assert_array_equal(reader.windows([(0, 0)], 10)[0], stream[:11])
    assert len(tries) == 2
