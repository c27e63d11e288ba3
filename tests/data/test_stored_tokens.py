"""Prepared data read from their store: what is damaged is named, and nothing damaged is used."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prepared_data import Prepared, in_schema_1, shards_of, stream_of

from elastic_pt.data import stored
from elastic_pt.data.manifest import REMEDY, Shard, Split, Stream, blocks_key
from elastic_pt.data.stored import SPLITS, Damage, StoredTokens
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.open import open_store

BLOCK = 64
"""Tokens per block of the prepared data; a token has two bytes."""


def damages_of(prepared: Prepared) -> list[Damage]:
    """What `verify` finds."""
    tokens = StoredTokens(prepared.manifest, prepared.store)
    return [damage for part in tokens.verify() for damage in part.damages]


def test_stream_is_that_of_the_files(either: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens come once and in order, over the borders of spans, shards and pages."""
    monkeypatch.setattr(stored, "SPAN_BYTES", 300)
    tokens = StoredTokens(either.manifest, either.store)
    found: dict[tuple[int, Split], list[NDArray[np.unsignedinteger]]] = {}
    for source, split, content in tokens.streams():
        assert not isinstance(content, Damage)
        found.setdefault((source, split), []).append(content)
    assert list(found) == [(source, split) for source in range(2) for split in SPLITS]
    for (source, split), parts in found.items():
        assert np.array_equal(np.concatenate(parts), stream_of(either, source, split))


def test_windows_are_those_of_the_files(either: Prepared) -> None:
    """Windows come in the order of their requests, also those that cross from one shard into another."""
    expected = [stream_of(either, source) for source in range(2)]
    wanted = [(1, range(990, 1010)), (0, range(1)), (0, range(500, 3001)), (1, range(63, 65))]
    found = StoredTokens(either.manifest, either.store).windows(wanted)
    for (source, each), tokens in zip(wanted, found, strict=True):
        assert np.array_equal(tokens, expected[source][each.start : each.stop])


def test_a_window_costs_the_blocks_that_hold_it(prepared: Prepared) -> None:
    """A row of a large shard does not read the whole shard."""
    read: list[tuple[int, int | None]] = []

    class Counted:
        url = prepared.store.url

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.endswith(".bin"):
                read.append((start, end))
            return prepared.store.read(key, start, end)

    tokens = StoredTokens(prepared.manifest, Counted())  # type: ignore[arg-type]
    (found,) = tokens.windows([(0, range(3 * BLOCK + 1, 5 * BLOCK))])
    assert len(found) == 2 * BLOCK - 1
    assert read == [(2 * 3 * BLOCK, 2 * 5 * BLOCK)]


def test_index_and_blocks_are_read_once_for_all_windows(either: Prepared) -> None:
    """Many rows of one shard cost its block index and their blocks once; with schema 1 they cost the shard once."""
    read: list[tuple[str, int, int | None]] = []

    class Counted:
        url = either.store.url

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            read.append((key, start, end))
            return either.store.read(key, start, end)

    starts = (1500, 990, 3, 1510, 40, 1200)
    wanted = [(0, range(start, start + 17)) for start in starts]
    found = StoredTokens(either.manifest, Counted()).windows(wanted)  # type: ignore[arg-type]
    for (source, each), tokens in zip(wanted, found, strict=True):
        assert np.array_equal(tokens, stream_of(either, source)[each.start : each.stop])
    first, second = (shard.key for shard in shards_of(either, 0, "train")[:2])
    shards = sorted(each for each in read if each[0].endswith(".bin"))
    if either.manifest.schema == 1:
        assert shards == [(first, 0, 2000), (second, 0, 2000)]
        return
    assert sorted(key for key, _, _ in read if key.endswith(".blocks")) == sorted(
        [blocks_key(first), blocks_key(second)]
    )
    # 990 to 1006 is in both shards; blocks 7 and 8 of the second one are neighbours.
    blocks = [(first, 0, 1), (first, 15, 16), (second, 0, 1), (second, 3, 4), (second, 7, 9)]
    size = 2 * BLOCK
    assert shards == sorted((key, a * size, min(b * size, 2000)) for key, a, b in blocks)


def test_pages_and_indexes_of_many_sources_are_read_at_once(prepared: Prepared) -> None:
    """A corpus of very many small sources does not cost a round trip after the other."""
    together = threading.Barrier(4)

    class Joined:
        url = prepared.store.url

        def size(self, key: str) -> int | None:
            return prepared.store.size(key)

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith("pages/"):
                together.wait(60.0)
            return prepared.store.read(key, start, end)

    assert sum(len(each.stream(s).pages) for each in prepared.manifest.sources for s in SPLITS) == 4  # type: ignore[union-attr]
    parts = StoredTokens(prepared.manifest, Joined()).verify()  # type: ignore[arg-type]
    assert not any(part.damages for part in parts)


def test_intact_data_is_verified_to_the_last_byte(either: Prepared) -> None:
    """Every byte of every stream is compared, and nothing is wrong."""
    tokens = StoredTokens(either.manifest, either.store)
    parts = list(tokens.verify())
    assert not any(part.damages for part in parts)
    files = [shard for s in range(2) for split in SPLITS for shard in shards_of(either, s, split)]
    size = sum((either.root / shard.key).stat().st_size for shard in files)
    assert sum(part.bytes for part in parts) == tokens.size_bytes == size


@pytest.mark.parametrize("span_bytes", [300, stored.SPAN_BYTES])
def test_each_damaged_block_is_named(
    copied: Prepared, span_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wrong bytes in two blocks of a shard are two problems, with the tokens of the blocks; one with schema 1."""
    monkeypatch.setattr(stored, "SPAN_BYTES", span_bytes)
    shard = shards_of(copied, 0, "train")[1]
    data = bytearray((copied.root / shard.key).read_bytes())
    data[2 * BLOCK * 3] ^= 1
    data[-1] ^= 1
    (copied.root / shard.key).write_bytes(data)
    found = damages_of(copied)
    assert {each.file for each in found} == {shard.key}
    if copied.manifest.schema == 1:
        assert [(each.block, each.tokens) for each in found] == [(0, range(1000, 2000))]
    else:
        assert [(each.block, each.tokens) for each in found] == [
            (3, range(1000 + 3 * BLOCK, 1000 + 4 * BLOCK)),
            (15, range(1000 + 15 * BLOCK, 2000)),
        ]
    tokens = StoredTokens(copied.manifest, copied.store)
    with pytest.raises(DataError, match=rf"{shard.key}: block .* another SHA-256; {REMEDY}"):
        list(tokens.windows([(0, found[0].tokens)]))
    # Everything else is there, in its place.
    intact, token = stream_of(copied, 0), 0
    parts = [part for source, split, part in tokens.streams() if (source, split) == (0, "train")]
    assert [each for each in parts if isinstance(each, Damage)] == found
    for part in parts:
        if isinstance(part, Damage):
            assert part.tokens.start == token
            token = part.tokens.stop
        else:
            assert np.array_equal(part, intact[token : token + len(part)])
            token += len(part)
    assert token == len(intact)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_file_of_another_size_is_one_problem_and_its_blocks(copied: Prepared, change: str) -> None:
    """A missing file is one problem. Of a file of another size each damaged block is named, too."""
    shard = shards_of(copied, 1, "held_out")[0]
    path = copied.root / shard.key
    if change == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data + b"x" if change == "longer" else data[: -2 * BLOCK - 2])
    whole, *blocks = damages_of(copied)
    assert (whole.file, whole.block, whole.tokens) == (shard.key, None, range(shard.tokens))
    if change != "shorter":
        assert not blocks
    elif copied.manifest.schema == 2:
        assert [each.block for each in blocks] == [
            (shard.tokens - 1) // BLOCK - 1,
            (shard.tokens - 1) // BLOCK,
        ]


def test_damaged_index_page_and_tokenizer_are_named(prepared: Prepared, tmp_path: Path) -> None:
    """What lists the tokens is verified before them: its damage is a problem for the tokens that it lists."""
    shutil.copytree(prepared.root, tmp_path / "data")
    copied = Prepared(prepared.manifest, open_store(str(tmp_path / "data")), tmp_path / "data")
    stream = copied.manifest.sources[1].held_out
    assert isinstance(stream, Stream)
    index = blocks_key(shards_of(copied, 0, "train")[0].key)
    (copied.root / index).write_bytes(b"x" * (copied.root / index).stat().st_size)
    (copied.root / stream.pages[0].key).unlink()
    (copied.root / copied.manifest.tokenizer_key).write_text("{}")
    found = [(each.file, each.source, each.split, each.tokens) for each in damages_of(copied)]
    assert found == [
        (copied.manifest.tokenizer_key, None, "train", range(0)),
        (index, 0, "train", range(1000)),
        (stream.pages[0].key, 1, "held_out", range(stream.tokens)),
    ]


def test_ids_that_cannot_be_trained_on_are_named(either: Prepared) -> None:
    """A right hash does not make an id one of the vocabulary, and a stream ends with the end token."""
    highest = max(int(stream_of(either, 0).max()), int(stream_of(either, 1).max()))
    small = replace(either, manifest=replace(either.manifest, vocab_size=highest))
    found = damages_of(small)
    assert found
    for each in found:
        assert each.source is not None
        assert stream_of(either, each.source, each.split)[each.tokens.start] == highest
        assert f"is {highest}; expected ids below" in each.problem
    other = replace(either, manifest=replace(either.manifest, end_token_id=highest))
    ends = [(s, split, len(stream_of(either, s, split))) for s in range(2) for split in SPLITS]
    assert [(each.source, each.split, each.tokens.stop) for each in damages_of(other)] == ends


def test_store_that_cannot_be_read_is_no_damage(prepared: Prepared) -> None:
    """An outage says nothing about the bytes: it is an error of the store, not a problem of the data."""

    class Away:
        url = "memory://away"

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith("pages/"):
                raise StoreError("away")
            return prepared.store.read(key, start, end)

    with pytest.raises(StoreError, match="away"):
        list(StoredTokens(prepared.manifest, Away()).verify())  # type: ignore[arg-type]


def test_memory_is_bounded_also_with_large_shards(prepared: Prepared) -> None:
    """With schema 1 a block is a shard: as many are read at once as fit into the limit, and at least one."""
    manifest = in_schema_1(prepared).manifest
    for size, threads in ((2**20, 16), (50 * 2**20, 5), (2**30, 1)):
        first = replace(manifest.sources[0], train=(Shard("large.bin", size // 2, "0" * 64),))
        large = replace(manifest, sources=(first, *manifest.sources[1:]))
        assert StoredTokens(large, prepared.store)._threads == threads
