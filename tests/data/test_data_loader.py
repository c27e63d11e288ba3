"""The loader: the plan's batches in order, one integer of state, and no thread after `close`."""

import os
import shutil
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_data import Prepared, blocks_in, cache_at, in_memory, settle, shards_of

from elastic_pt.data import loader as data_loader
from elastic_pt.data.lanes import Lanes
from elastic_pt.data.loader import LateCause, NextUse, SlotLoader, steps_ahead
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

SLOTS, MICRO_BATCH, LENGTH = 8, 2, 33
WAIT_S = 60.0


def loader(
    prepared: Prepared,
    slots: range,
    first_step: int = 0,
    last_step: int = 6,
    reader: TokenReader | None = None,
) -> SlotLoader:
    """A loader over some slots of a plan with 8 slots of 2 rows."""
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    reader = reader or TokenReader(prepared.manifest, prepared.store, cache=cache_at())
    return loader_of(plan, reader, slots, first_step, last_step)


def loader_of(
    plan: DataPlan,
    reader: TokenReader,
    slots: range = range(SLOTS),
    first_step: int = 0,
    last_step: int = 6,
) -> SlotLoader:
    """A loader with two batches ahead."""
    return SlotLoader(
        plan,
        reader,
        slots=slots,
        first_step=first_step,
        last_step=last_step,
        micro_batch=MICRO_BATCH,
        prefetch_steps=2,
    )


def test_batches_match_the_plan(prepared: Prepared) -> None:
    """The tensor has the slots and rows of the plan; the steps are in order and end."""
    reader = TokenReader(prepared.manifest, prepared.store, cache=cache_at())
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    with loader(prepared, range(2, 5), first_step=3) as batches:
        found = list(batches)
    assert [batch.step for batch in found] == [3, 4, 5]
    for batch in found:
        assert batch.tokens_VBT.shape == (3, MICRO_BATCH, LENGTH + 1)
        assert batch.tokens_VBT.dtype == torch.int64
        for place, slot in enumerate(range(2, 5)):
            rows = plan.slot_rows(batch.step, range(slot, slot + 1), MICRO_BATCH)
            assert torch.equal(batch.tokens_VBT[place], reader.windows(rows, LENGTH))
        sources = plan.row_sources(batch.step)
        assert batch.sources.names == sources.names == ("first", "second")
        assert batch.sources.of_row.tolist() == sources.of_row.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("strided", [False, True])
def test_every_world_reads_the_same_tokens(
    prepared: Prepared, world_size: int, strided: bool
) -> None:
    """The slots of all workers together are the batch that one worker alone reads."""
    with loader(prepared, range(SLOTS), last_step=2) as alone:
        expected = [batch.tokens_VBT for batch in alone]
    together = [torch.empty_like(batch) for batch in expected]
    for rank in range(world_size):
        if strided:
            slots = range(rank, SLOTS, world_size)
        else:
            slots = range(rank * SLOTS // world_size, (rank + 1) * SLOTS // world_size)
        with loader(prepared, slots, last_step=2) as batches:
            for batch in batches:
                together[batch.step][list(slots)] = batch.tokens_VBT
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


def test_loader_resumes_from_one_integer(prepared: Prepared) -> None:
    """A new loader that starts at `next_step` reads the batches that the old one would have read."""
    with loader(prepared, range(4)) as batches:
        for _ in range(4):
            next(batches)
        assert batches.next_step == 4
        rest = [batch.tokens_VBT for batch in batches]
    with loader(prepared, range(4), first_step=4) as resumed:
        assert all(torch.equal(a.tokens_VBT, b) for a, b in zip(resumed, rest, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_close_ends_the_thread(prepared: Prepared, taken: int) -> None:
    """After `close` no thread is left, whether no, some or all batches were read."""
    before = set(threading.enumerate())
    reader = TokenReader(prepared.manifest, prepared.store, cache=cache_at())
    batches = loader(prepared, range(SLOTS), reader=reader)
    for _ in range(taken):
        next(batches)
    readers = set(threading.enumerate()) - before
    batches.close()
    reader.close()
    for thread in readers:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in readers)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_worker_without_slots_reads_empty_batches(prepared: Prepared) -> None:
    """A worker without slots gets one empty batch per step."""
    with loader(prepared, range(0), last_step=2) as batches:
        assert [tuple(batch.tokens_VBT.shape) for batch in batches] == [(0, 2, 34), (0, 2, 34)]


def test_data_error_of_the_reading_thread_is_raised_unchanged(
    prepared: Prepared, tmp_path: Path
) -> None:
    """The one-line error of the reading thread reaches the caller unchanged, and the loader closes."""
    shutil.copytree(prepared.root, tmp_path / "data")
    for path in (tmp_path / "data" / "shards").rglob("train-00000*.bin"):
        path.write_bytes(path.read_bytes()[:-2])
    damaged = Prepared(prepared.manifest, open_store(str(tmp_path / "data")), tmp_path)
    with (
        pytest.raises(DataError, match=r"^file://.*train-00000.*1998 bytes where") as caught,
        loader(damaged, range(SLOTS), last_step=100) as batches,
    ):
        list(batches)
    assert "\n" not in str(caught.value)
    with pytest.raises(StopIteration):
        next(batches)


class Slow:
    """A store whose reads of tokens wait until a test opens the gate."""

    def __init__(self, store: Store) -> None:
        self.store, self.gate, self.asked = store, threading.Event(), threading.Event()
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """As the store, later."""
        if key.endswith(".bin"):
            self.reads += 1
            self.asked.set()
            assert self.gate.wait(WAIT_S)
        return self.store.read(key, start, end)


def test_close_does_not_wait_for_a_read_that_hangs(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` has a limit while the store hangs; the thread ends after the read that it is in, and reads nothing more."""
    monkeypatch.setattr(data_loader, "CLOSE_TIMEOUT_S", 0.1)
    slow = Slow(in_memory(prepared, "hangs"))
    reader = TokenReader(prepared.manifest, slow, cache=cache_at(tmp_path))
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    windows, read = reader.windows, []

    def counted(rows: list[tuple[int, int]], sequence_length: int) -> torch.Tensor:
        read.append(rows)
        return windows(rows, sequence_length)

    monkeypatch.setattr(reader, "windows", counted)
    before = set(threading.enumerate())
    batches = loader_of(plan, reader)
    (thread,) = (
        each for each in set(threading.enumerate()) - before if each.name == "elastic-pt-loader"
    )
    assert slow.asked.wait(WAIT_S)
    start_s = time.monotonic()
    batches.close()
    assert time.monotonic() - start_s < WAIT_S / 2
    with pytest.raises(StopIteration):
        next(batches)
    slow.gate.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert len(read) == 1
    reader.close()


def test_late_batch_tells_whether_the_store_or_this_machine_was_slow(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose blocks the store sends late has the cause `store`; one that is read slowly here `local`; one in time none."""
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    slow = Slow(in_memory(prepared, "late"))
    reader = TokenReader(prepared.manifest, slow, cache=cache_at(tmp_path))
    with closing(reader), loader_of(plan, reader) as batches:
        threading.Timer(0.2, slow.gate.set).start()
        assert next(batches).late is LateCause.STORE
    reader = TokenReader(prepared.manifest, prepared.store, cache=cache_at(tmp_path / "local"))
    pread, asked, gate = os.pread, threading.Event(), threading.Event()

    def slow_disk(descriptor: int, size: int, offset: int) -> bytes:
        asked.set()
        assert gate.wait(WAIT_S)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", slow_disk)
    with closing(reader), loader_of(plan, reader) as batches:
        assert asked.wait(WAIT_S)
        threading.Timer(0.2, gate.set).start()
        assert next(batches).late is LateCause.LOCAL
        deadline_s = time.monotonic() + WAIT_S
        while batches._done.empty():
            assert time.monotonic() < deadline_s
        assert next(batches).late is None


@pytest.mark.parametrize(
    ("latency_s", "step_s", "before", "late", "expected"),
    [
        (0.0, 1.0, 2, False, 2),
        (0.03, 1.0, 2, False, 3),
        (0.03, 0.01, 2, False, 14),
        (5.0, 0.001, 2, False, 64),
        (0.0, 1.0, 20, False, 19),
        (0.0, 1.0, 5, True, 10),
        (0.0, 1.0, 40, True, 64),
        (0.3, 0.05, 2, True, 26),
        (0.03, 0.0, 2, False, 64),
    ],
)
def test_depth_follows_latency_and_step_time(
    latency_s: float, step_s: float, before: int, late: bool, expected: int
) -> None:
    """A few requests one after the other fit into the steps ahead; a late step doubles them, within bounds."""
    assert steps_ahead(latency_s, step_s, before, late=late) == expected


def here(prepared: Prepared, cache: Path, rows: list[tuple[int, int]]) -> bool:
    """Whether all blocks of some rows are in a cache, by its files."""
    block_tokens = prepared.manifest.block_tokens
    for source, row in rows:
        start = 0
        for shard in shards_of(prepared, source, "train"):
            first = max(0, row * LENGTH - start)
            end = min(shard.tokens, (row + 1) * LENGTH + 1 - start)
            start += shard.tokens
            if first >= end:
                continue
            size = block_tokens or shard.tokens
            wanted = range(first // size, (end - 1) // size + 1)
            if not set(wanted) <= set(blocks_in(cache, shard.sha256)):
                return False
    return True


def test_blocks_of_coming_steps_are_fetched_while_a_step_computes(
    either: Prepared, tmp_path: Path
) -> None:
    """When a step ends, the blocks of the next ones are on this machine, and no batch waits for a request."""
    reader = TokenReader(either.manifest, in_memory(either, "ahead"), cache=cache_at(tmp_path))
    plan = DataPlan(either.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    first, second = (plan.slot_rows(step, range(SLOTS), MICRO_BATCH) for step in range(2))
    with closing(reader):
        reader.windows(first, LENGTH)
        assert reader.late == 1
        assert not here(either, tmp_path, second)
        reader.expect(second, LENGTH)
        deadline_s = time.monotonic() + WAIT_S
        while not here(either, tmp_path, second):
            assert time.monotonic() < deadline_s
        settle(reader)
        reader.windows(second, LENGTH)
        assert reader.late == 1


@pytest.mark.parametrize("bound", [2**30, 3000])
def test_loader_of_a_bucket_gives_the_batches_of_local_files(
    prepared: Prepared, tmp_path: Path, bound: int
) -> None:
    """With blocks fetched ahead, in a large and in a tiny cache, in both orders, each batch is that of local files."""
    for lanes in (None, Lanes(MICRO_BATCH, 500)):
        plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH, lanes)
        remote, local = (
            TokenReader(prepared.manifest, store, cache=cache_at(tmp_path / name, size))
            for store, name, size in (
                (in_memory(prepared, "batches"), f"remote-{lanes is None}", bound),
                (prepared.store, "local", 2**30),
            )
        )
        with (
            closing(remote),
            SlotLoader(
                plan,
                remote,
                slots=range(1, SLOTS, 2),
                first_step=3,
                last_step=60,
                micro_batch=MICRO_BATCH,
                prefetch_steps=2,
            ) as batches,
        ):
            for batch in batches:
                rows = plan.slot_rows(batch.step, range(1, SLOTS, 2), MICRO_BATCH)
                assert torch.equal(
                    batch.tokens_VBT.view(-1, LENGTH + 1), local.windows(rows, LENGTH)
                )
            assert batch.step == 59


@pytest.mark.parametrize("lanes", [None, Lanes(MICRO_BATCH, 500)])
@pytest.mark.parametrize("present", [0, 7, 150])
def test_next_use_of_a_block_is_the_next_step_that_reads_it(
    prepared: Prepared, lanes: Lanes | None, present: int
) -> None:
    """Eviction asks when a span of tokens is needed again: the answer is that of reading all steps, over epochs too."""
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH, lanes)
    next_use = NextUse(plan)
    next_use.step = present
    for source, rows in enumerate(plan.rows_per_source):
        starts = np.arange(0, rows * LENGTH, 64)
        ends = starts + 64
        found = next_use(source, starts, ends)
        expected = np.full(len(starts), np.iinfo(np.int64).max)
        for step in reversed(range(present, present + 2 * (sum(plan.rows_per_source) // 16 + 2))):
            for each, row in plan.slot_rows(step, range(SLOTS), MICRO_BATCH):
                if each == source:
                    read = (starts <= (row + 1) * LENGTH) & (ends > row * LENGTH)
                    expected[read] = step
        sure = expected < np.iinfo(np.int64).max
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(found[sure], expected[sure])
