"""Verifying a random share of a checkpoint: what is always checked, what the share adds, and how a seed repeats it."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.restore import Block
from elastic_pt.checkpoint.verify import Verified, sampled_blocks, verify, verify_share
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store
from tests.checkpoint.world import RUN_ID, flip, full_tensors, memory_store, write_checkpoint
from tests.membership.bucket import WatchedStore

Written = tuple[Store, Checkpoint]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint of two workers with blocks of several sizes. Tests that change it restore it."""
    store = memory_store()
    return store, write_checkpoint(store, tmp_path_factory.mktemp("x"), full_tensors(), 2)


def check(written: Written, share: float, seed: int) -> Verified:
    """Verify a share of the checkpoint."""
    store, checkpoint = written
    return verify_share(store, checkpoint, RUN_ID, share=share, seed=seed)


def chosen(written: Written, share: float, seed: int) -> list[tuple[str, Block]]:
    """The blocks that a seed chooses."""
    store, checkpoint = written
    manifest = read_manifest(store, checkpoint, RUN_ID)
    size = sum(file.size for file in manifest.files)
    draw = random.Random(f"{seed} {checkpoint.directory}")
    return sampled_blocks(manifest, int(share * size), draw)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.001, 1.0), seed=st.integers(0, 2**32))
def test_at_least_the_requested_share_is_read(written: Written, share: float, seed: int) -> None:
    """At least the requested share of the bytes is compared, and less than one block more; a share of 1 compares all."""
    found = check(written, share, seed)
    assert found.problems == ()
    largest = max(block.end - block.start for _, block in chosen(written, 1.0, 0))
    headers = found.bytes - sum(block.end - block.start for _, block in chosen(written, 1.0, 0))
    assert min(share * found.bytes, found.bytes - headers) - 1 <= found.compared_bytes
    assert found.compared_bytes <= share * found.bytes + largest or share == 1.0
    assert 0.0 < found.share <= 1.0
    assert (found.share == 1.0) == (share == 1.0)


def test_a_small_share_reads_few_bytes(written: Written) -> None:
    """A small share reads only the records and the chosen blocks."""
    store, checkpoint = written
    watched = WatchedStore(store)
    found = verify_share(watched, checkpoint, RUN_ID, share=0.001, seed=1)
    assert found.compared_bytes < found.bytes / 2
    # The manifest and two node records, then blocks that are no neighbours.
    assert watched.requests["read ckpt"] == 3 + len(chosen(written, 0.001, 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_byte_is_found_where_the_seed_reads(written: Written, seed: int) -> None:
    """Damage in a chosen block is reported with file and block; damage elsewhere needs another seed, or a full check."""
    store, checkpoint = written
    everything = chosen(written, 1.0, 0)
    blocks = chosen(written, 0.3, seed)
    assert 0 < len(blocks) < len(everything)
    for key, block in everything:
        before = flip(store, key, block.start, 3)
        found = check(written, 0.3, seed)
        assert bool(found.problems) == ((key, block) in blocks)
        if found.problems:
            assert f"{key}: {block.tensor} block {block.index} " in found.problems[0]
        assert check(written, 1.0, seed).problems
        store.write(key, before)
    assert verify(store, checkpoint, RUN_ID) == []


def test_a_seed_repeats_its_blocks_and_many_seeds_read_all(written: Written) -> None:
    """The same seed reads the same blocks, and many seeds together read every block."""
    assert chosen(written, 0.2, 7) == chosen(written, 0.2, 7)
    read = {item for seed in range(100) for item in chosen(written, 0.1, seed)}
    assert read == set(chosen(written, 1.0, 0))


def test_missing_and_cut_files_are_found_by_any_share(written: Written) -> None:
    """The size of every file and every record is checked with any share."""
    store, checkpoint = written
    for key in store.keys(f"{checkpoint.directory}/"):
        if "notice" in key:
            continue
        before = store.read(key)
        for damage in (
            lambda key=key: store.delete(key),
            lambda k=key, b=before: store.write(k, b[:-1]),
        ):
            damage()
            found = check(written, 0.001, 0)
            assert len(found.problems) == 1
            assert key in found.problems[0]
            assert found.compared_bytes == 0
            store.write(key, before)
    assert check(written, 1.0, 0).problems == ()


def test_only_a_full_check_reads_headers(written: Written) -> None:
    """No block covers the header of a file, so only a full check compares it."""
    store, checkpoint = written
    key = next(key for key in store.keys(f"{checkpoint.directory}/") if "shard" in key)
    before = flip(store, key, 20, 0)
    assert check(written, 0.999, 0).problems == ()
    found, expected = (hashlib.sha256(data).hexdigest() for data in (store.read(key), before))
    assert check(written, 1.0, 0).problems == (f"{key}: SHA-256 {found}, expected {expected}",)
    store.write(key, before)


def test_one_seed_chooses_other_blocks_in_another_checkpoint(tmp_path: Path) -> None:
    """One seed chooses other blocks in each checkpoint, so damage at the same place in all of them is found in some."""
    store = memory_store()
    places = set()
    for step in range(1, 9):
        checkpoint = write_checkpoint(store, tmp_path, full_tensors(), 1, step=step)
        blocks = chosen((store, checkpoint), 0.05, 0)
        places.add(tuple((block.tensor, block.index) for _, block in blocks))
    assert len(places) > 1
