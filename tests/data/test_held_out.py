"""The held-out rows of an evaluation: which they are, their tokens, and the mean of their losses."""

import itertools
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from elastic_pt.data.held_out import HeldOutRow, held_out_rows, mean_loss, read_held_out
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import DataError, StoreError
from elastic_pt.model.loss import IGNORED
from elastic_pt.store.open import open_store
from tests.data.prepared_data import Prepared, cache_at


@pytest.mark.parametrize(("length", "batch"), [(1, 64), (7, 3), (64, 4), (5000, 2)])
def test_every_held_out_token_is_a_target_once(prepared: Prepared, length: int, batch: int) -> None:
    """All rows together are the held-out stream of each source; each input is the token before its target."""
    manifest = prepared.manifest
    reader = TokenReader(manifest, prepared.store, cache=cache_at())
    targets: dict[int, list[int]] = {0: [], 1: []}
    inputs: dict[int, list[int]] = {0: [], 1: []}
    rows = held_out_rows(manifest, length)
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        inputs_BT, targets_BT = read_held_out(
            manifest, reader, some, (batch, length), ignored=IGNORED
        )
        assert inputs_BT.shape == targets_BT.shape == (batch, length)
        real = targets_BT != IGNORED
        assert real.any(1).sum() == len(some)
        for row, kept, of_inputs, of_targets in zip(
            some, real, inputs_BT, targets_BT, strict=False
        ):
            targets[row.source] += of_targets[kept].tolist()
            inputs[row.source] += of_inputs[kept].tolist()
        assert (inputs_BT[~real] == manifest.end_token_id).all()
    for number, source in enumerate(manifest.sources):
        stream = reader.stream(number, "held_out", 0, source.tokens("held_out")).tolist()
        assert targets[number] == stream
        assert inputs[number] == [manifest.end_token_id, *stream[:-1]]


def test_some_rows_are_spread_over_all(prepared: Prepared) -> None:
    """A number of rows takes its share of each source, at even distances; more than there are takes all."""
    length = 16
    everything = held_out_rows(prepared.manifest, length)
    for count in (1, 2, 10, len(everything) - 1, len(everything), len(everything) + 1):
        some = held_out_rows(prepared.manifest, length, count)
        assert len(some) == min(count, len(everything))
        places = [everything.index(row) for row in some]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        for source in (0, 1):
            share = sum(row.source == source for row in everything) / len(everything)
            assert abs(sum(row.source == source for row in some) - share * len(some)) <= 1


def test_the_mean_weighs_each_token_the_same() -> None:
    """A short row counts with its tokens; the order in which losses are added does not matter; sources may share a name."""
    rows = [HeldOutRow(0, 0, 8), HeldOutRow(0, 8, 11), HeldOutRow(1, 0, 8), HeldOutRow(2, 0, 1)]
    nats = [8.0, 6.0, 24.0, 5.0]
    found = mean_loss(rows, nats, ("a", "other", "other"))
    assert found.loss == pytest.approx(43.0 / 20.0)
    assert found.by_source == {"a": (2, 14.0 / 11.0), "other": (2, pytest.approx(29.0 / 9.0))}
    shuffler = random.Random(3)
    rows = [HeldOutRow(0, 8 * i, 8 * i + 8) for i in range(500)]
    nats = [shuffler.uniform(1.0, 1e4) for _ in rows]
    in_order = mean_loss(rows, nats, ("a",))
    shuffler.shuffle(nats)
    assert mean_loss(rows, nats, ("a",)) == in_order
    assert math.isnan(mean_loss(rows, [*nats[1:], math.nan], ("a",)).loss)
    assert torch.tensor(in_order.loss).isfinite()


def test_damaged_held_out_data_is_named(prepared: Prepared, tmp_path: Path) -> None:
    """A damaged shard is a `DataError` and a missing one a `StoreError`, as for training data: one line with the file."""
    shutil.copytree(prepared.root, tmp_path / "data")
    store = open_store(str(tmp_path / "data"))
    rows = held_out_rows(prepared.manifest, 64, 4)

    def read() -> None:
        reader = TokenReader(prepared.manifest, store, cache=cache_at())
        read_held_out(prepared.manifest, reader, rows, (4, 64), ignored=IGNORED)

    read()
    paths = list((tmp_path / "data" / "shards").rglob("held-out-*.bin"))
    for path in paths:
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"^file://.*held-out-00000"):
        read()
    for path in paths:
        path.unlink()
    with pytest.raises(StoreError, match=r"^file://.*held-out-00000"):
        read()
