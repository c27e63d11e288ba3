"""A worker's report of a damaged block: with the damaged ones next to it, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt.data.blocks import DamagedBlock
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.prepare import prepare
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.sources import SourceSpec
from elastic_pt.data.table import ShardTable
from elastic_pt.runlog.ignored import DamagedSpan, IgnoredSpan
from elastic_pt.store.open import open_store
from elastic_pt.train.damage import damaged_span, ignored_tokens

BLOCK = 64
SHARD = 8 * BLOCK


@pytest.mark.parametrize(
    ("damaged", "met", "expected"),
    [
        ([3], 3, (3, 4)),
        ([2, 3, 4], 3, (2, 5)),
        ([1, 3], 3, (3, 4)),
        # Block 8 is in the next file.
        ([6, 7, 8], 6, (6, 8)),
        ([0, 1], 0, (0, 2)),
    ],
)
def test_neighbours_in_the_same_file_are_one_span(
    tmp_path: Path, damaged: list[int], met: int, expected: tuple[int, int]
) -> None:
    """Each damaged block would cost a generation. The span ends at an intact block, and at the ends of the file."""
    (tmp_path / "text.txt").write_text("some words and more of them " * 400)
    store = open_store(f"file://{tmp_path / 'data'}")
    specs = [SourceSpec("web", (str(tmp_path / "text.txt"),), weight=1.0)]
    manifest = prepare(
        specs, store, vocab_size=270, held_out=0.0, shard_tokens=SHARD, block_tokens=BLOCK
    )
    table = ShardTable(manifest, store)
    for block in damaged:
        placed = table.find(0, "train", block * BLOCK)
        path = tmp_path / "data" / placed.shard.key
        data = bytearray(path.read_bytes())
        data[2 * (block * BLOCK - placed.start)] ^= 1
        path.write_bytes(data)
    reader = TokenReader(manifest, store, cache=ShardCache(tmp_path / "cache", 2**30))
    with pytest.raises(DamagedBlock) as caught:
        reader.windows([(0, met)], BLOCK)
    span = damaged_span(caught.value, reader, manifest, store)
    start, end = expected
    key = table.find(0, "train", met * BLOCK).shard.key
    assert span == DamagedSpan("web", (start * BLOCK, end * BLOCK), key)
    # Without time for a search: the block alone.
    late = clock(0.0, 60.0, 60.0)
    alone = damaged_span(caught.value, reader, manifest, store, late)
    assert alone.tokens == (met * BLOCK, (met + 1) * BLOCK)
    ignored = ignored_tokens(manifest, (IgnoredSpan(span, 8),))
    assert ignored == ((0, range(*span.tokens)),)


def clock(*times_s: float) -> Callable[[], float]:
    """A clock that tells these times in turn."""
    return iter(times_s).__next__
