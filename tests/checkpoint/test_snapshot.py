"""Buffer files: a worker writes them in place, and its agent reads them."""

import json
import mmap
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from elastic_pt.checkpoint.shard_file import NoRoom, describe_shard
from elastic_pt.checkpoint.snapshot import (
    BUFFERS,
    PAYLOAD_OFFSET,
    Buffer,
    Snapshot,
    SnapshotBuffers,
    buffer_to_write,
    describe_snapshot,
    make_buffer,
    open_buffer,
    shard_part,
)
from elastic_pt.errors import CheckpointError
from tests.checkpoint.world import full_tensors, local_rows, training_state


def buffers_of(directory: Path, tensors: dict[str, torch.Tensor], rank: int = 0) -> SnapshotBuffers:
    """The allocated buffers of one of two workers, in generation 3."""
    buffers = SnapshotBuffers(directory, 3, rank, local_rows(tensors, rank, 2))
    buffers.allocate()
    return buffers


def test_buffer_holds_the_shard_file_of_its_step(tmp_path: Path) -> None:
    """After the control page there is, byte for byte, a shard file with the live rows of that step."""
    tensors = full_tensors()
    buffers = buffers_of(tmp_path, tensors)
    path = buffers.write(training_state(7)).path(tmp_path)
    file, state, _ = describe_shard(shard_part(path, buffers.size), "shard")
    assert load(path.read_bytes()[PAYLOAD_OFFSET:]).keys() == {each.name for each in file.slices}
    found = describe_snapshot(Buffer(3, 0, 0), tmp_path)
    assert found is not None
    assert (found.state, found.slices, found.size) == (state, file.slices, file.size)
    assert (found.generation, found.rank, found.step) == (3, 0, 7)


def test_buffers_are_written_in_turn(tmp_path: Path) -> None:
    """A new state overwrites the oldest buffer. The states of the previous steps stay complete."""
    tensors = full_tensors()
    buffers = buffers_of(tmp_path, tensors)
    for step in (4, 5, 6, 7):
        for each in tensors.values():
            each.add_(1)
        buffers.write(training_state(step))
    found = [describe_snapshot(Buffer(3, 0, index), tmp_path) for index in range(BUFFERS)]
    assert [each and each.step for each in found] == [7, 5, 6]
    weights = [
        next(piece for piece in each.slices if piece.name == "model/wide") for each in found if each
    ]
    assert weights[0].block_crc32 != weights[1].block_crc32


@pytest.mark.parametrize(
    ("steps", "kept", "complete_step", "chosen"),
    [
        ([0, 0, 0], set(), 0, 0),
        ([5, 0, 0], set(), 5, 1),
        ([5, 6, 7], set(), 6, 0),
        ([5, 6, 7], {5}, 6, 2),
        ([5, 6, 7], {5}, 7, 1),
        ([5, 6, 7], {5, 7}, 6, None),
        ([8, 6, 7], {6}, 7, 0),
        ([5], {5}, 0, None),
        ([5], set(), 0, 0),
        ([], set(), 0, None),
    ],
)
def test_oldest_buffer_that_nobody_needs_is_overwritten(
    steps: list[int], kept: set[int], complete_step: int, chosen: int | None
) -> None:
    """Kept states and the newest complete one are never overwritten, even if that leaves no buffer."""
    assert buffer_to_write(steps, kept, complete_step) == chosen


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=40))
def test_three_buffers_always_have_a_free_one(
    schedule: list[tuple[bool, bool, int]],
) -> None:
    """With one kept state and one complete one, a third can always be written, and both stay."""
    steps, kept, complete = [0] * BUFFERS, set[int](), 0
    for step, (released, checkpoint, behind) in enumerate(schedule, start=1):
        complete = max(complete, step - 1 - behind)
        if released:
            kept.clear()
        number = buffer_to_write(steps, kept, complete)
        assert number is not None
        needed = kept | {max((each for each in steps if each <= complete), default=0)} - {0}
        steps[number] = step
        assert needed <= set(steps)
        if checkpoint and not kept:
            kept.add(step)


def test_buffers_that_come_later_join_the_first(tmp_path: Path) -> None:
    """A worker with room for one buffer writes checkpoints into it; later ones leave its state alone."""
    buffers = SnapshotBuffers(tmp_path, 3, 0, local_rows(full_tensors(), 0, 2))
    buffers.allocate(1)
    buffers.write(training_state(7), kept={7})
    with pytest.raises(NoRoom, match="no buffer is free"):
        buffers.write(training_state(8), kept={7})
    assert not buffers.ready
    buffers.allocate()
    assert buffers.ready
    assert buffers.write(training_state(8), kept={7}).number == 1
    found = [describe_snapshot(Buffer(3, 0, number), tmp_path) for number in range(BUFFERS)]
    assert [each and each.step for each in found] == [7, 8, None]


def test_snapshot_record_survives_its_own_encoding(tmp_path: Path) -> None:
    """The record decodes from its bytes. Any changed bit is refused."""
    buffers = buffers_of(tmp_path, full_tensors())
    buffers.write(training_state(7))
    found = describe_snapshot(Buffer(3, 0, 0), tmp_path)
    assert found is not None
    data = found.to_bytes()
    assert Snapshot.from_bytes(data) == found
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(CheckpointError):
            Snapshot.from_bytes(bytes(changed))


def test_buffer_that_is_being_written_holds_nothing(tmp_path: Path) -> None:
    """If a worker is killed during a copy, the two control words differ, and no reader uses the buffer."""
    buffers = buffers_of(tmp_path, full_tensors())
    path = buffers.write(training_state(7)).path(tmp_path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as buffer:
        buffer[8:16] = (9).to_bytes(8, "little")
    with open_buffer(path) as content:
        assert content.step() is None
    assert describe_snapshot(Buffer(3, 0, 0), tmp_path) is None


def test_fresh_buffer_holds_nothing(tmp_path: Path) -> None:
    """A buffer that was only allocated holds no state, not even of step 0."""
    buffers_of(tmp_path, full_tensors())
    assert describe_snapshot(Buffer(3, 0, 1), tmp_path) is None


def test_state_outlives_a_killed_writer(tmp_path: Path) -> None:
    """After a SIGKILL to the worker, its finished buffers hold their states."""
    program = (
        "import os, signal, sys; from pathlib import Path; "
        "from tests.checkpoint.test_snapshot import buffers_of; "
        "from tests.checkpoint.world import full_tensors, training_state; "
        "buffers = buffers_of(Path(sys.argv[1]), full_tensors()); buffers.write(training_state(8)); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode < 0
    found = describe_snapshot(Buffer(3, 0, 0), tmp_path)
    assert found is not None
    assert found.step == 8
    wide = next(piece for piece in found.slices if piece.name == "model/wide")
    rows = local_rows(full_tensors(), 0, 2)["model/wide"][0]
    first = rows[: wide.block_rows].contiguous().numpy().tobytes()
    assert wide.block_crc32[0] == zlib.crc32(first)


def test_full_memory_is_an_error_at_allocation_and_leaves_nothing(small_memory: Path) -> None:
    """Space is reserved before any write, so a full memory file system is not a SIGBUS in a step."""
    buffers = SnapshotBuffers(small_memory, 3, 0, local_rows(full_tensors(), 0, 2))
    with pytest.raises(NoRoom, match="no room for a state"):
        buffers.allocate()
    assert not buffers.ready
    assert list(small_memory.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(PAYLOAD_OFFSET + 8)])
def test_file_that_is_no_buffer_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file of another kind or size is an error that names the file."""
    path = Buffer(3, 0, 0).path(tmp_path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        describe_snapshot(Buffer(3, 0, 0), tmp_path)


def test_damaged_header_is_refused(tmp_path: Path) -> None:
    """A header that contradicts the buffer is an error, not a description of other rows."""
    buffers = buffers_of(tmp_path, full_tensors())
    path = buffers.write(training_state(7)).path(tmp_path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as buffer:
        at = buffer.find(json.dumps("model/wide").encode())
        buffer[at + 1 : at + 2] = b"\xff"
    with pytest.raises(CheckpointError, match=path.name):
        describe_snapshot(Buffer(3, 0, 0), tmp_path)


def test_buffer_is_never_created_twice(tmp_path: Path) -> None:
    """A second worker with the same name is refused, because it would overwrite the first one's buffer."""
    path = Buffer(3, 0, 0).path(tmp_path)
    make_buffer(path, 64).close()
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="File exists"):
        make_buffer(path, 64)
    assert path.read_bytes() == content


def test_rows_are_read_into_memory_of_the_reader(tmp_path: Path) -> None:
    """The parts get the bytes of the shard file one after another. At its end the count is smaller, and no byte is made up."""
    buffers = buffers_of(tmp_path, full_tensors())
    path = buffers.write(training_state(7)).path(tmp_path)
    shard = path.read_bytes()[PAYLOAD_OFFSET:]
    with open_buffer(path) as content:
        parts = [memoryview(bytearray(count)) for count in (5, 0, 1000, 7)]
        assert content.read_into(3, parts) == 1012
        assert b"".join(parts) == shard[3:1015]
        last = [memoryview(bytearray(4)) for _ in range(3)]
        assert content.read_into(len(shard) - 6, last) == 6
        assert b"".join(last) == shard[-6:] + bytes(6)
