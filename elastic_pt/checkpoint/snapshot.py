"""A worker's newest states, in three mapped files that outlive the worker. It overwrites them in place.

    worker   SnapshotBuffers.write ──► buffer file ──► describe_snapshot   agent: CRC-32 of every block
                                        │  │              └──► Snapshot, the record that peers and readers get
                                        │  └──► BufferContent.read_into  own workers and peers: verified by those CRCs
                                        └──► shard_part                  `upload`: a kept state goes to the bucket

A buffer file is one page of control words, then a shard file as in `shard_file`. All its pages exist before training
begins, so a write is one memory copy. A new file would cost a page fault for every 4 KiB, three times the copy. Space is
reserved, so a full memory file system is an error at allocation and not a SIGBUS later.

The control words are `begun` and `done`, both a step. `write` sets `begun` first and `done` last, so the content is
valid only while the two are equal. A reader checks them before and after it reads, and compares CRCs in between.

A checkpoint is a state whose buffer is kept until the agent has uploaded it. `buffer_to_write` never chooses a kept
buffer, nor the newest state that is complete on all nodes and their mirrors. `train.snapshots` decides when to write.
"""

import mmap
import os
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import numpy
import torch
from zlib_ng import zlib_ng

from elastic_pt.checkpoint.copier import Copier, HostCopier
from elastic_pt.checkpoint.layout import (
    Count,
    FileBytes,
    Rank,
    Step,
    TensorSlice,
    TrainingState,
)
from elastic_pt.checkpoint.record import Document, record
from elastic_pt.checkpoint.shard_file import (
    NO_ROOM,
    NoRoom,
    ShardLayout,
    block_bounds,
    parse_shard_header,
)
from elastic_pt.errors import CheckpointError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.port import FilePart

BUFFERS: Final = 3
PAYLOAD_OFFSET: Final = mmap.ALLOCATIONGRANULARITY
"""Offset of the shard file in a buffer file: a page, so that it can be mapped alone."""
_MAGIC: Final = b"EPTSNAP1"
_CONTROL: Final = struct.Struct("<8sQQQ")
_WORD: Final = struct.Struct("<Q")
_BEGUN_AT, _DONE_AT, _SIZE_AT = 8, 16, 24
_MADV_POPULATE_WRITE: Final = 23
_PAGE: Final = 4096
_TOUCH_BYTES: Final = 8 << 20


@record
class Snapshot(Document):
    """The record of one worker's buffer file: the state of a step, and the places and CRCs of its rows."""

    what: ClassVar[str] = "snapshot"
    schemas: ClassVar[tuple[int, ...]] = (1,)

    generation: Count
    rank: Rank
    step: Step
    size: FileBytes
    """Bytes of the shard file in the buffer."""
    state: TrainingState
    slices: tuple[TensorSlice, ...]
    """Offsets are relative to the beginning of the shard file."""


class Buffer(NamedTuple):
    """The name of one buffer file."""

    generation: int
    rank: int
    """Rank of the worker that wrote it."""
    number: int

    def path(self, directory: Path) -> Path:
        """Its path in a node's scratch directory."""
        return directory / f"snapshot-g{self.generation}-rank-{self.rank}-{self.number}"

    @classmethod
    def at(cls, path: Path) -> "Buffer":
        """The buffer of a file."""
        _, generation, _, rank, number = path.name.split("-")
        return cls(int(generation[1:]), int(rank), int(number))


def buffer_to_write(steps: Sequence[int], kept: Collection[int], complete_step: int) -> int | None:
    """The buffer that the next state overwrites; None if all are needed.

    `steps` has the step in each buffer, 0 for none. Needed are the `kept` ones, and the newest one that is complete
    everywhere (up to `complete_step`). Of the others, the oldest is overwritten.
    """
    complete = max((step for step in steps if step <= complete_step), default=0)
    free = [
        number
        for number, step in enumerate(steps)
        if step == 0 or (step != complete and step not in kept)
    ]
    return min(free, key=steps.__getitem__, default=None)


class SnapshotBuffers:
    """The buffer files of one worker in one generation. Worker process; `allocate` may run in a thread."""

    def __init__(
        self,
        directory: Path,
        generation: int,
        rank: int,
        tensors: Mapping[str, tuple[torch.Tensor, Sequence[int], int]],
        copier: Copier | None = None,
    ) -> None:
        """`tensors` maps names to `(local rows, global shape, first row)` of the live memory; see `ShardLayout`."""
        self._copier = HostCopier() if copier is None else copier
        self._layout = ShardLayout(tensors)
        self._rows = [tensors[name][0] for name in self._layout.order]
        self._names = [Buffer(generation, rank, index) for index in range(BUFFERS)]
        self._paths = [each.path(directory) for each in self._names]
        self._maps: list[mmap.mmap] = []
        self._targets: list[list[torch.Tensor]] = []
        self.steps: list[int] = []
        """The step in each buffer that exists, 0 for none."""
        self.size = self._layout.header_bytes + self._layout.data_bytes
        """Bytes of the shard file in each buffer."""

    @property
    def ready(self) -> bool:
        """Whether all buffers exist."""
        return len(self.steps) == BUFFERS

    def allocate(self, count: int = BUFFERS) -> None:
        """Reserve, map and touch files until there are `count`. Raises the errors of `make_buffers`; adds none then."""
        paths = self._paths[len(self.steps) : count]
        maps = make_buffers(paths, self.size)
        try:
            for each in maps:
                self._copier.register(each)
        except CheckpointError:
            for path, each in zip(paths, maps, strict=True):
                self._copier.unregister(each)
                path.unlink(missing_ok=True)
            raise
        self._maps += maps
        self._targets += [self._views(each) for each in maps]
        # Last: another thread may write as soon as a buffer is listed here.
        self.steps += [0] * len(maps)

    def write(
        self, state: TrainingState, *, kept: Collection[int] = (), complete_step: int = 0
    ) -> Buffer:
        """Copy the live rows and the state of this step into the buffer that `buffer_to_write` chooses. Returns it.

        Raises `NoRoom` if there is none.
        """
        return self.finish(self.start(state, kept=kept, complete_step=complete_step), state.step)

    def start(
        self, state: TrainingState, *, kept: Collection[int] = (), complete_step: int = 0
    ) -> Buffer:
        """Begin to `write`. The rows must not change, and nothing else be started, before the end of `finish`."""
        number = buffer_to_write(self.steps, kept, complete_step)
        if number is None:
            raise NoRoom(
                f"step {state.step}: no buffer is free; steps {self.steps}, kept {sorted(kept)}, complete {complete_step}"
            )
        self.steps[number] = 0
        buffer = self._maps[number]
        begin_buffer(buffer, state.step)
        failpoint(Failpoint.BUFFER_BEGUN)
        header = self._layout.header(state)
        buffer[PAYLOAD_OFFSET : PAYLOAD_OFFSET + len(header)] = header
        self._copier.start(self._targets[number], self._rows)
        return self._names[number]

    def finish(self, buffer: Buffer, step: int) -> Buffer:
        """Wait until the copy is done, then mark the buffer as whole. Any thread may call it. Returns the buffer."""
        self._copier.wait()
        failpoint(Failpoint.BUFFER_COPIED)
        end_buffer(self._maps[buffer.number], step)
        failpoint(Failpoint.BUFFER_DONE)
        self.steps[buffer.number] = step
        return buffer

    def _views(self, buffer: mmap.mmap) -> list[torch.Tensor]:
        """A tensor in the mapped file for each tensor of the layout."""
        views = []
        offset = PAYLOAD_OFFSET + self._layout.header_bytes
        for rows in self._rows:
            flat = torch.frombuffer(buffer, dtype=rows.dtype, count=rows.numel(), offset=offset)
            views.append(flat.view(rows.shape))
            offset += rows.numel() * rows.element_size()
        return views


def make_buffers(paths: Sequence[Path], size: int, *, spare: int = 0) -> list[mmap.mmap]:
    """Create buffers for shard files of `size` bytes, and map them. Worker process, and mirrors.

    Raises `NoRoom` if there is no room for them and for `spare` more. Raises `CheckpointError` for any other
    failure. Leaves no file after an error.
    """
    if not paths:
        return []
    needed = (len(paths) + spare) * (PAYLOAD_OFFSET + size)
    free = shutil.disk_usage(paths[0].parent).free
    if free < needed:
        raise NoRoom(
            f"{paths[0].parent}: no room for a state of {size} bytes: {free} bytes free, expected {needed}"
        )
    made: list[mmap.mmap] = []
    try:
        for path in paths:
            made.append(make_buffer(path, size))
    except CheckpointError:
        for path in paths[: len(made)]:
            path.unlink(missing_ok=True)
        raise
    return made


def make_buffer(path: Path, size: int) -> mmap.mmap:
    """Create a buffer file for a shard file of `size` bytes, with all its pages in memory, and map it.

    Raises `NoRoom` if there is no room, and leaves no file then; `CheckpointError` for any other failure.
    """
    total = PAYLOAD_OFFSET + size
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be a snapshot buffer: {error.strerror}") from error
    try:
        os.posix_fallocate(descriptor, 0, total)
        buffer = mmap.mmap(descriptor, total)
    except OSError as error:
        path.unlink(missing_ok=True)
        kind = NoRoom if error.errno in NO_ROOM else CheckpointError
        raise kind(f"{path}: no room for a state of {size} bytes: {error.strerror}") from error
    finally:
        os.close(descriptor)
    _touch(buffer)
    _CONTROL.pack_into(buffer, 0, _MAGIC, 0, 0, size)
    return buffer


def begin_buffer(buffer: mmap.mmap, step: int) -> None:
    """Mark the buffer as invalid until `end_buffer`."""
    _WORD.pack_into(buffer, _BEGUN_AT, step)


def end_buffer(buffer: mmap.mmap, step: int) -> None:
    """Mark the buffer as holding the whole state of this step."""
    _WORD.pack_into(buffer, _DONE_AT, step)


def _touch(buffer: mmap.mmap) -> None:
    """Map every page now, so that no write waits for a page fault.

    In parts: `madvise` holds the interpreter's lock, and other threads answer peers and the watchdog.
    """
    try:
        for offset in range(0, len(buffer), _TOUCH_BYTES):
            buffer.madvise(_MADV_POPULATE_WRITE, offset, min(_TOUCH_BYTES, len(buffer) - offset))
    except OSError:  # Linux before 5.14
        for offset in range(0, len(buffer), _PAGE):
            buffer[offset] = 0


def describe_snapshot(buffer: Buffer, directory: Path) -> Snapshot | None:
    """Check a buffer file and compute the CRCs of its blocks. Agent process.

    Returns None if it holds no whole state, or if it was overwritten during the check. Raises `CheckpointError` if it is
    not a buffer file.
    """
    path = buffer.path(directory)
    with open_buffer(path) as content:
        step = content.step()
        if step is None:
            return None
        shard = memoryview(content.mapped)[PAYLOAD_OFFSET : PAYLOAD_OFFSET + content.size]
        try:
            state, described = parse_shard_header(shard, str(path))
            slices = tuple(_with_crcs(piece, shard) for piece in described)
        except CheckpointError:
            if content.step() != step:
                return None
            raise
        finally:
            shard.release()
        if content.step() != step:
            return None
    if state.step != step:
        raise CheckpointError(f"{path}: the state of step {state.step}, expected step {step}")
    return Snapshot(buffer.generation, buffer.rank, step, content.size, state, slices)


def _with_crcs(piece: TensorSlice, shard: memoryview) -> TensorSlice:
    crcs = tuple(zlib_ng.crc32(shard[start:end]) for start, end in block_bounds(piece))
    return TensorSlice(**(piece.to_json() | {"block_crc32": crcs}))


def require_crcs(snapshot: Snapshot, shard: memoryview) -> None:
    """Raise `CheckpointError` with the first block of a shard file whose CRC-32 differs from the record."""
    for piece in snapshot.slices:
        for index, (start, end) in enumerate(block_bounds(piece)):
            if zlib_ng.crc32(shard[start:end]) != piece.block_crc32[index]:
                raise CheckpointError(
                    f"snapshot of step {snapshot.step}, rank {snapshot.rank}: {piece.name} block {index}: "
                    "wrong CRC-32; expected that of the record"
                )


class BufferContent:
    """An open buffer file, read-only. Agent and worker process."""

    def __init__(self, mapped: mmap.mmap, size: int) -> None:
        self.mapped = mapped
        self.size = size
        """Bytes of the shard file in the buffer."""

    def __enter__(self) -> "BufferContent":
        return self

    def __exit__(self, *_: object) -> None:
        self.mapped.close()

    def step(self) -> int | None:
        """The step of the whole state in the buffer; None if it is being written, or never was."""
        (begun,) = _WORD.unpack_from(self.mapped, _BEGUN_AT)
        (done,) = _WORD.unpack_from(self.mapped, _DONE_AT)
        return int(done) if begun == done > 0 else None

    def require_step(self, step: int, what: str) -> None:
        """Raise `CheckpointError` unless the buffer holds the whole state of this step."""
        if self.step() != step:
            raise CheckpointError(
                f"{what}: overwritten while it was needed; expected the state of step {step}"
            )

    def read_into(self, start: int, parts: Sequence[memoryview]) -> int:
        """Fill the parts, one after another, with the bytes of the shard file from `start` on. The caller compares CRCs.

        Returns the number of bytes. It is smaller than the parts if the file ends before.
        """
        shard = numpy.frombuffer(self.mapped, numpy.uint8, self.size, PAYLOAD_OFFSET)
        position = start
        for part in parts:
            count = max(0, min(len(part), self.size - position))
            # Not a slice assignment: it would hold the interpreter's lock, and other threads compare CRCs.
            numpy.copyto(
                numpy.frombuffer(part, numpy.uint8)[:count], shard[position : position + count]
            )
            position += count
        return position - start


def open_buffer(path: Path) -> BufferContent:
    """Map a buffer file for reading. Raises `CheckpointError` if it is missing or not a buffer file."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; expected a snapshot") from error
    magic, _, _, size = (
        _CONTROL.unpack_from(mapped, 0) if len(mapped) >= PAYLOAD_OFFSET else 4 * (0,)
    )
    if magic != _MAGIC or len(mapped) != PAYLOAD_OFFSET + size:
        found = len(mapped)
        mapped.close()
        raise CheckpointError(f"{path}: {found} bytes, expected a snapshot buffer")
    return BufferContent(mapped, size)


def shard_part(path: Path, size: int) -> FilePart:
    """The shard file in a buffer file, of `size` bytes: what goes to the bucket."""
    return FilePart(path, PAYLOAD_OFFSET, size)
