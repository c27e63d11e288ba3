"""The loader: the plan's batches in order, one integer of state, and no thread after `close`."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from prepared_data import Prepared, cache_at

from elastic_pt.data.loader import SlotLoader, held_out_batches
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store

SLOTS, MICRO_BATCH, LENGTH = 8, 2, 33
IGNORED = -7


def loader(prepared: Prepared, slots: range, first_step: int = 0, last_step: int = 6) -> SlotLoader:
    """A loader over some slots of a plan with 8 slots of 2 rows."""
    plan = DataPlan(prepared.manifest, LENGTH, 1, SLOTS * MICRO_BATCH)
    return SlotLoader(
        plan,
        TokenReader(prepared.manifest, prepared.store, cache=cache_at()),
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
    batches = loader(prepared, range(SLOTS))
    for _ in range(taken):
        next(batches)
    readers = set(threading.enumerate()) - before
    assert len(readers) <= 1
    batches.close()
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


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (64, 4), (5000, 2)])
def test_every_held_out_token_is_a_target_once(prepared: Prepared, length: int, batch: int) -> None:
    """Targets without padding are the held-out stream; each input is the token before its target."""
    manifest = prepared.manifest
    reader = TokenReader(manifest, prepared.store, cache=cache_at())
    targets: dict[int, list[int]] = {0: [], 1: []}
    inputs: dict[int, list[int]] = {0: [], 1: []}
    for part in held_out_batches(manifest, reader, length, batch, ignored=IGNORED):
        assert part.inputs_BT.shape == part.targets_BT.shape
        assert part.inputs_BT.shape[0] <= batch
        assert part.inputs_BT.shape[1] == length
        real = part.targets_BT != IGNORED
        assert real.any(1).all(), "a window has only padding"
        targets[part.source] += part.targets_BT[real].tolist()
        inputs[part.source] += part.inputs_BT[real].tolist()
        assert (part.inputs_BT[~real] == manifest.end_token_id).all()
    for number, source in enumerate(manifest.sources):
        stream = reader.stream(number, "held_out", 0, source.tokens("held_out")).tolist()
        assert targets[number] == stream
        assert inputs[number] == [manifest.end_token_id, *stream[:-1]]
