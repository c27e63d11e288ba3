"""Reads rows of tensors, bit for bit (workers and the command line).

    index ── plan_reads ── load_rows ── tensors       the rows that a worker wants
               └────────── read_tensors ── bytes      whole tensors, for a digest

A reader asks for row ranges. The number of workers that wrote the files does not matter. The ranges are extended to
whole blocks, because a CRC-32 covers a block. Adjacent blocks of a file become one request of at most 32 MiB.

`load_rows` reads a block straight into the tensor's memory, if all its rows are wanted there, and compares it with its
CRC in place: another copy would take as long as the comparison saves. The bytes of a request that fails are wiped, so
no byte that was not verified stays in a tensor.

`index` describes the errors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from zlib_ng import zlib_ng

from elastic_pt.checkpoint.index import (
    READS,
    Index,
    Memory,
    Readable,
    read_bytes,
    warn_of_wrong_bytes,
)
from elastic_pt.checkpoint.layout import RowRange, TensorEntry, TensorSlice
from elastic_pt.checkpoint.shard_file import TORCH_DTYPES, block_bounds
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.parallel import in_order

READ_BYTES_MAX = 32 << 20
_MEMORY_READ_BYTES_MAX = 8 << 20
"""Memory answers at once, so small requests share the work among the threads more evenly."""
_LOAD_THREADS = 8
_READ_THREADS = 4


@dataclass(frozen=True)
class Block:
    """Rows `[first_row, end_row)` of a tensor at bytes `[start, end)` of a file. A CRC-32 covers one block."""

    tensor: str
    index: int
    first_row: int
    end_row: int
    start: int
    end: int
    crc32: int


@dataclass(frozen=True)
class ReadRange:
    """One request: bytes `[start, end)` of a file, which are exactly `blocks`, one after another."""

    key: str
    start: int
    end: int
    blocks: tuple[Block, ...]


def plan_reads(
    index: Index, wanted: Mapping[str, RowRange], read_bytes_max: int = READ_BYTES_MAX
) -> list[ReadRange]:
    """The requests that fetch rows `[first, end)` of each wanted tensor, in file order.

    Each request holds whole blocks and at most `read_bytes_max` bytes, unless a single block is larger.
    Raises `CheckpointError` for a tensor or rows that the checkpoint does not have.
    """
    found: list[tuple[str, Block]] = []
    for name, (first, end) in wanted.items():
        entry = _entry(index, name)
        # A worker without rows of a tensor may give any empty range.
        if first != end and not 0 <= first < end <= entry.global_shape[0]:
            raise CheckpointError(
                f"{name}: rows {first} to {end} of a tensor of shape {entry.global_shape}; "
                "expected rows of the tensor"
            )
        held = 0
        for key, piece in entry.pieces:
            found += [(key, block) for block in _blocks(piece, first, end)]
            held += max(0, min(end, piece.end_row) - max(first, piece.first_row))
        # Refuse rows that no piece has: they would keep their old values in the tensor.
        if held != end - first:
            raise CheckpointError(
                f"{name}: {held} of rows {first} to {end} are in the index; expected all"
            )
    found.sort(key=lambda item: (item[0], item[1].start))
    return coalesce(found, read_bytes_max)


def coalesce(
    blocks: Iterable[tuple[str, Block]], read_bytes_max: int = READ_BYTES_MAX
) -> list[ReadRange]:
    """Join each `(file key, block)` with the next one into one request, if it follows directly in the file."""
    reads: list[ReadRange] = []
    run: list[Block] = []
    run_key = ""
    for key, block in blocks:
        joins = run and key == run_key and block.start == run[-1].end
        if not joins or block.end - run[0].start > read_bytes_max:
            if run:
                reads.append(ReadRange(run_key, run[0].start, run[-1].end, tuple(run)))
            run, run_key = [], key
        run.append(block)
    if run:
        reads.append(ReadRange(run_key, run[0].start, run[-1].end, tuple(run)))
    return reads


def load_rows(
    source: Readable | Memory,
    index: Index,
    wanted: Mapping[str, RowRange],
    into: Mapping[str, torch.Tensor],
    other_copy: Callable[[str, Exception], bool] = lambda _key, _error: False,
) -> None:
    """Fill `into[name]` with rows `[first, end)` of every wanted tensor, bit for bit.

    `into[name]` has shape `(end - first, *global_shape[1:])` and the stored dtype, on any device. An
    autograd leaf is written in place. Holds at most 8 requests of 32 MiB in memory. Raises
    `CheckpointError` with file, tensor and block of the first bytes that are missing or wrong. The tensors
    are then partly filled and must not be used. After an error with a file, asks `other_copy(key, error)` whether the
    store has another copy of it, and reads again if so.
    """
    for name, (first, end) in wanted.items():
        entry, target = _entry(index, name), into[name]
        shape = (end - first, *entry.global_shape[1:])
        if tuple(target.shape) != shape or target.dtype != TORCH_DTYPES[entry.dtype]:
            raise CheckpointError(
                f"{name}: {entry.dtype} rows of shape {shape} do not fit {target.dtype} {tuple(target.shape)}"
            )
    memory = {name: _memory_of(into[name]) for name in wanted}

    def fetch(read: ReadRange) -> None:
        rows = [wanted[block.tensor] for block in read.blocks]
        parts = [
            _place(block, each, memory[block.tensor])
            for block, each in zip(read.blocks, rows, strict=True)
        ]
        while True:
            try:
                _read_verified(source, read, [part for part, _ in parts])
                break
            except BaseException as error:
                for part, _ in parts:
                    part[:] = bytes(len(part))
                if not isinstance(error, CheckpointError | StoreError):
                    raise
                if not other_copy(read.key, error):
                    raise
        for block, each, (part, in_place) in zip(read.blocks, rows, parts, strict=True):
            if not in_place:
                _copy_rows(block, part, each, into[block.tensor])
        failpoint(Failpoint.RESTORE_ROWS)

    failpoint(Failpoint.RESTORE_INDEXED)
    limit = _MEMORY_READ_BYTES_MAX if isinstance(source, Memory) else READ_BYTES_MAX
    for _ in in_order(plan_reads(index, wanted, limit), fetch, _LOAD_THREADS):
        pass
    failpoint(Failpoint.RESTORE_LOADED)


def read_tensors(
    store: Readable, index: Index, names: Sequence[str]
) -> Iterator[tuple[str, memoryview]]:
    """Yield every byte of the named tensors as `(name, verified bytes)`, in the order of the names and of the rows.

    Reads at most 4 requests of 32 MiB ahead. Raises `CheckpointError` as `load_rows` does.
    """
    blocks = [
        (key, block)
        for name in names
        for key, piece in _entry(index, name).pieces
        for block in blocks_of(piece)
    ]
    for fetched in in_order(
        coalesce(blocks), lambda read: list(read_blocks(store, read)), _READ_THREADS
    ):
        for block, data in fetched:
            yield block.tensor, data


def read_blocks(store: Readable, read: ReadRange) -> Iterator[tuple[Block, memoryview]]:
    """Fetch one request and yield its blocks. Compares each block with its CRC-32 first."""
    data = memoryview(bytearray(read.end - read.start))
    parts = [data[block.start - read.start : block.end - read.start] for block in read.blocks]
    _read_verified(store, read, parts)
    yield from zip(read.blocks, parts, strict=True)


def _read_verified(source: Readable | Memory, read: ReadRange, parts: Sequence[memoryview]) -> None:
    """Fill the memory of each block of a request, and compare it with its CRC-32. Raises `CheckpointError`."""
    # What comes from a store may have changed on the way. Memory is asked for another copy instead.
    wrong = before = ""
    for _ in range(1 if isinstance(source, Memory) else READS):
        _read_into(source, read, parts)
        before, wrong = wrong, _first_wrong(read, parts)
        if not wrong:
            if before:
                warn_of_wrong_bytes(f"{before}: wrong CRC-32")
            return
    raise CheckpointError(f"{wrong}: wrong CRC-32; expected that of its record")


def _first_wrong(read: ReadRange, parts: Sequence[memoryview]) -> str:
    """Where the first block is that has another CRC-32 than its record; empty if all have that of theirs."""
    for block, part in zip(read.blocks, parts, strict=True):
        if zlib_ng.crc32(part) != block.crc32:
            return _where(read.key, block)
    return ""


def _read_into(source: Readable | Memory, read: ReadRange, parts: Sequence[memoryview]) -> None:
    """Fill the memory of each block of a request. Raises `CheckpointError` if the file is too short."""
    if isinstance(source, Memory):
        count = source.read_into(read.key, read.start, parts)
    else:
        data = memoryview(read_bytes(source, read.key, read.start, read.end))
        count = len(data)
    for block, part in zip(read.blocks, parts, strict=True):
        _require_end(read, block, count)
        if not isinstance(source, Memory):
            part[:] = data[block.start - read.start : block.end - read.start]


def _require_end(read: ReadRange, block: Block, count: int) -> None:
    if block.end - read.start > count:
        raise CheckpointError(
            f"{_where(read.key, block)}: the file ends before it; expected at least {block.end} bytes"
        )


def _where(key: str, block: Block) -> str:
    return f"{key}: {block.tensor} block {block.index} (rows {block.first_row} to {block.end_row})"


def _entry(index: Index, name: str) -> TensorEntry:
    entry = index.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"{name}: not in the checkpoint; expected one of its tensors")
    return entry


def blocks_of(piece: TensorSlice) -> list[Block]:
    """All blocks of a slice, in order."""
    return _blocks(piece, piece.first_row, piece.end_row)


def _blocks(piece: TensorSlice, first: int, end: int) -> list[Block]:
    """The blocks of the slice that hold a row of `[first, end)`."""
    low, high = max(first, piece.first_row), min(end, piece.end_row)
    if low >= high:
        return []
    bounds = block_bounds(piece)
    first_index = (low - piece.first_row) // piece.block_rows
    end_index = -(-(high - piece.first_row) // piece.block_rows)
    blocks = []
    for index in range(first_index, end_index):
        row = piece.first_row + index * piece.block_rows
        end_row = min(row + piece.block_rows, piece.end_row)
        blocks.append(
            Block(piece.name, index, row, end_row, *bounds[index], piece.block_crc32[index])
        )
    return blocks


def _memory_of(tensor: torch.Tensor) -> memoryview | None:
    """The bytes of a tensor; None if they are not in this process's memory, one row after another."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _place(block: Block, rows: RowRange, memory: memoryview | None) -> tuple[memoryview, bool]:
    """Where to read a block, and whether that is in the tensor. Its memory holds `rows`."""
    size = block.end - block.start
    if memory is None or not rows[0] <= block.first_row <= block.end_row <= rows[1]:
        return memoryview(bytearray(size)), False
    start = (block.first_row - rows[0]) * (size // (block.end_row - block.first_row))
    return memory[start : start + size], True


def _copy_rows(block: Block, data: memoryview, rows: RowRange, target: torch.Tensor) -> None:
    low, high = max(block.first_row, rows[0]), min(block.end_row, rows[1])
    source = torch.frombuffer(data, dtype=target.dtype).view(-1, *target.shape[1:])
    with torch.no_grad():  # per thread, so it must be here and not around the pool
        target[low - rows[0] : high - rows[0]].copy_(
            source[low - block.first_row : high - block.first_row]
        )
