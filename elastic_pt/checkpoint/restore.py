"""Reading a checkpoint: which one, is it whole, and these rows of it please.

    checkpoint (from the log) ── read_root ── read_index ── plan_reads ── load_rows ── tensors    (workers)
                                    ├─────── quick_check (every size, before a run goes on)
                                    └─────── read_manifest ── verify (every byte, for people)

`read_root` reads the one object that the log vouches for. `read_index` reads, many at once, the records of those
nodes whose rows are wanted, `read_manifest` those of all; each is compared with size, SHA-256 and rows in the root.

A reader asks for row ranges and does not care how many workers wrote the files. What it asks for is
widened to whole blocks, because a block is what a CRC-32 covers; neighbouring blocks of a file become one
request of at most 32 MiB. A block is compared with its CRC before a byte of it reaches a tensor.

Errors: `CheckpointError` means that this checkpoint cannot be used and another one may; any other
`StoreError` (no access, deadline passed) says nothing about the checkpoint and goes through.
Runs in workers (tensors) and in agents or the command line (choice and verification).
"""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch

from elastic_pt.checkpoint.layout import (
    FullManifest,
    Part,
    RowRange,
    ShardFile,
    TensorEntry,
    TensorSlice,
    TrainingState,
    manifest_key,
    parse_directory,
    part_key,
)
from elastic_pt.checkpoint.nodes import NodeRecord, NodeShare, RootManifest
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, decode
from elastic_pt.checkpoint.shard_file import TORCH_DTYPES, block_bounds, hash_blocks
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store

READ_BYTES_MAX = 32 << 20
_VERIFY_THREADS = 4
_REQUEST_THREADS = 64
"""Small requests that a reader has under way at once: sizes and node records."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """Rows `[first_row, end_row)` of a tensor at bytes `[start, end)` of a file, the unit of a CRC-32."""

    tensor: str
    index: int
    first_row: int
    end_row: int
    start: int
    end: int
    crc32: int


@dataclass(frozen=True)
class ReadRange:
    """One request: bytes `[start, end)` of a file, which are exactly its blocks, one after another."""

    key: str
    start: int
    end: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class UsableCheckpoint:
    """The newest checkpoint that passed the check, and why each newer one did not."""

    checkpoint: Checkpoint
    manifest: FullManifest
    passed_over: tuple[tuple[Checkpoint, str], ...]


class Index(Protocol):
    """What `load_rows` needs to know of a checkpoint: where the rows of each tensor are."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensors by name, with all the pieces that the caller may want rows of."""


@dataclass(frozen=True)
class PartialIndex:
    """The state of a checkpoint, and where the rows are that one reader wants."""

    state: TrainingState
    tensors: Mapping[str, TensorEntry]


def read_root(store: Store, checkpoint: Checkpoint, run_id: str) -> RootManifest | FullManifest:
    """Read the object `manifest.json` that the checkpoint is about, of either schema.

    Size and SHA-256 are those of the checkpoint before anything is parsed; then run, step, generation and
    directory must agree, so a swapped, replayed or foreign manifest is a `CheckpointError`.
    """
    name = parse_directory(checkpoint.directory)
    if (name.step, name.generation) != (checkpoint.step, checkpoint.generation):
        raise CheckpointError(
            f"{checkpoint.directory}: committed as step {checkpoint.step} of generation {checkpoint.generation}"
        )
    if not 0 < checkpoint.manifest_size <= DOCUMENT_BYTES_MAX:
        raise CheckpointError(
            f"{checkpoint.directory}: a manifest of {checkpoint.manifest_size} bytes, "
            f"expected 1 to {DOCUMENT_BYTES_MAX}"
        )
    key = manifest_key(checkpoint.directory)
    data = _read_exactly(store, key, checkpoint.manifest_size, checkpoint.manifest_sha256)
    manifest = decode(data, RootManifest, FullManifest)
    if manifest.run_id != run_id:
        raise CheckpointError(f"{key}: belongs to run {manifest.run_id!r}, not to {run_id!r}")
    if manifest.directory != checkpoint.directory:
        raise CheckpointError(f"{key}: was written for {manifest.directory}")
    return manifest


def read_manifest(store: Store, checkpoint: Checkpoint, run_id: str) -> FullManifest:
    """Every slice of the checkpoint that the checkpoint is about; reads all its node records.

    Raises `CheckpointError` as `read_root` does, and for a node record that is not what the manifest says.
    """
    return _whole_manifest(store, read_root(store, checkpoint, run_id))


def _whole_manifest(store: Store, root: RootManifest | FullManifest) -> FullManifest:
    if isinstance(root, FullManifest):
        return root
    files = tuple(file for record in _read_nodes(store, root, root.nodes) for file in record.files)
    return FullManifest(root.run_id, root.directory, files, root.state)


def read_index(
    store: Store, checkpoint: Checkpoint, run_id: str, wanted: Mapping[str, RowRange]
) -> PartialIndex:
    """Where rows `[first, end)` of each wanted tensor are; reads the records of those nodes alone that have some.

    Raises `CheckpointError` as `read_manifest` does.
    """
    root = read_root(store, checkpoint, run_id)
    if isinstance(root, FullManifest):
        return PartialIndex(root.state, root.tensors)
    ranges = [wanted.get(tensor.name, (0, 0)) for tensor in root.tensors]
    nodes = [
        node
        for node in root.nodes
        if any(
            first < low_high[1] and low_high[0] < end
            for low_high, (first, end) in zip(node.spans(), ranges, strict=True)
        )
    ]
    # Not `joined`: between nodes that were read for different tensors rows may be missing. `plan_reads` notices.
    pieces: dict[str, list[tuple[str, TensorSlice]]] = {tensor.name: [] for tensor in root.tensors}
    for record in _read_nodes(store, root, nodes):
        for file in record.files:
            for piece in file.slices:
                pieces[piece.name].append((file.key, piece))
    return PartialIndex(
        root.state,
        {
            tensor.name: TensorEntry(
                tensor.name, tensor.dtype, tensor.global_shape, tuple(pieces[tensor.name])
            )
            for tensor in root.tensors
        },
    )


def quick_check(store: Store, checkpoint: Checkpoint, run_id: str) -> None:
    """Look at the size of every file: nothing is missing or cut short.

    Costs one request per file. Raises `CheckpointError` naming the first file that is not as it should be.
    """
    _check_sizes(store, read_root(store, checkpoint, run_id).sizes)


def _check_sizes(store: Store, expected: Sequence[tuple[str, int]]) -> None:
    with ThreadPoolExecutor(_REQUEST_THREADS) as pool:
        sizes = pool.map(lambda file: store.size(file[0]), expected)
        for (key, size), found in zip(expected, sizes, strict=True):
            _check_size(key, size, found)


def plan_reads(
    manifest: Index, wanted: Mapping[str, RowRange], read_bytes_max: int = READ_BYTES_MAX
) -> list[ReadRange]:
    """The requests that fetch rows `[first, end)` of each wanted tensor, in file order.

    Each request holds whole blocks and at most `read_bytes_max` bytes, unless one block alone is larger.
    Raises `CheckpointError` for a tensor or rows that the checkpoint does not have.
    """
    found: list[tuple[str, Block]] = []
    for name, (first, end) in wanted.items():
        entry = _entry(manifest, name)
        # A worker without rows of a tensor may say so with any empty range.
        if first != end and not 0 <= first < end <= entry.global_shape[0]:
            raise CheckpointError(
                f"{name}: rows {first} to {end} of a tensor of shape {entry.global_shape}"
            )
        held = 0
        for key, piece in entry.pieces:
            found += [(key, block) for block in _blocks(piece, first, end)]
            held += max(0, min(end, piece.end_row) - max(first, piece.first_row))
        # Rows that no piece has would stay in the tensor as they were before.
        if held != end - first:
            raise CheckpointError(f"{name}: {held} of rows {first} to {end} are in the index")
    found.sort(key=lambda item: (item[0], item[1].start))
    return coalesce(found, read_bytes_max)


def coalesce(
    blocks: Iterable[tuple[str, Block]], read_bytes_max: int = READ_BYTES_MAX
) -> list[ReadRange]:
    """Join `(file key, block)` that follow each other in the given order and in the file into requests."""
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
    store: Store,
    manifest: Index,
    wanted: Mapping[str, RowRange],
    into: Mapping[str, torch.Tensor],
    threads: int = 8,
) -> None:
    """Fill `into[name]` with rows `[first, end)` of every wanted tensor, bit for bit.

    `into[name]` has shape `(end - first, *global_shape[1:])` and the stored dtype, on any device; an
    autograd leaf is written in place. Holds at most `threads` requests of 32 MiB in memory. Raises
    `CheckpointError` naming file, tensor and block of the first bytes that are missing or wrong; the tensors
    are then partly filled and must not be used.
    """
    for name, (first, end) in wanted.items():
        entry, target = _entry(manifest, name), into[name]
        shape = (end - first, *entry.global_shape[1:])
        if tuple(target.shape) != shape or target.dtype != TORCH_DTYPES[entry.dtype]:
            raise CheckpointError(
                f"{name}: {entry.dtype} rows of shape {shape} do not fit {target.dtype} {tuple(target.shape)}"
            )

    def fetch(read: ReadRange) -> None:
        for block, data in read_blocks(store, read):
            _copy_rows(block, data, wanted[block.tensor], into[block.tensor])

    for _ in _in_order(plan_reads(manifest, wanted), fetch, threads):
        pass


def read_tensors(
    store: Store, manifest: Index, names: Sequence[str], threads: int = 4
) -> Iterator[tuple[str, memoryview]]:
    """Every byte of the named tensors, as `(name, verified bytes)`, in the order of the names and of their rows.

    Reads ahead by at most `threads` requests of 32 MiB. Raises `CheckpointError` as `load_rows` does.
    """
    blocks = [
        (key, block)
        for name in names
        for key, piece in _entry(manifest, name).pieces
        for block in _blocks(piece, piece.first_row, piece.end_row)
    ]
    for fetched in _in_order(
        coalesce(blocks), lambda read: list(read_blocks(store, read)), threads
    ):
        for block, data in fetched:
            yield block.tensor, data


def read_blocks(store: Store, read: ReadRange) -> Iterator[tuple[Block, memoryview]]:
    """Fetch one request and yield its blocks, each compared with its CRC-32 first."""
    data = memoryview(_read(store, read.key, read.start, read.end))
    for block in read.blocks:
        part = data[block.start - read.start : block.end - read.start]
        where = f"{read.key}: {block.tensor} block {block.index} (rows {block.first_row} to {block.end_row})"
        if len(part) != block.end - block.start:
            raise CheckpointError(f"{where}: the file ends before it")
        if zlib.crc32(part) != block.crc32:
            raise CheckpointError(f"{where}: its CRC-32 is not the one in the manifest")
        yield block, part


def verify(store: Store, checkpoint: Checkpoint, run_id: str) -> list[str]:
    """Read every byte of a checkpoint and say what is wrong with it; an empty list means nothing is.

    Checks the manifest against the checkpoint, node records against the manifest, the tiling of every tensor, size
    and SHA-256 of every file, the CRC-32 of every block, and in schema 1 the part records that are still there.
    """
    try:
        root = read_root(store, checkpoint, run_id)
        manifest = _whole_manifest(store, root)
    except CheckpointError as error:
        return [str(error)]
    problems = _file_problems(store, manifest)
    return problems + _part_problems(store, root) if isinstance(root, FullManifest) else problems


def newest_usable(
    store: Store,
    checkpoints: Iterable[Checkpoint],
    run_id: str,
    check: Literal["quick", "full"] = "quick",
) -> UsableCheckpoint:
    """The first of `checkpoints` (committed ones, newest first) that passes the check.

    `quick` looks at the manifest, the node records and all sizes; `full` reads every byte. Raises `CheckpointError` with
    all reasons when none passes.
    """
    passed_over: list[tuple[Checkpoint, str]] = []
    for checkpoint in checkpoints:
        try:
            root = read_root(store, checkpoint, run_id)
            _check_sizes(store, root.sizes)
            manifest = _whole_manifest(store, root)
        except CheckpointError as error:
            passed_over.append((checkpoint, str(error)))
            continue
        problems = _file_problems(store, manifest) if check == "full" else []
        if not problems:
            return UsableCheckpoint(checkpoint, manifest, tuple(passed_over))
        passed_over.append((checkpoint, "; ".join(problems)))
    reasons = "; ".join(f"step {checkpoint.step}: {reason}" for checkpoint, reason in passed_over)
    raise CheckpointError(f"no usable checkpoint: {reasons or 'none was committed'}")


def _read_nodes(store: Store, root: RootManifest, nodes: Sequence[NodeShare]) -> list[NodeRecord]:
    """The records of these nodes, each just as the manifest describes it."""

    def read(node: NodeShare) -> NodeRecord:
        data = _read_exactly(store, node.key, node.size, node.sha256)
        try:
            record = NodeRecord.from_bytes(data)
            rows = record.rows_of(root.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{node.key}: {error}") from error
        sizes = tuple(file.size for file in record.files)
        facts = (record.run_id, record.directory, sizes, rows)
        if facts != (root.run_id, root.directory, node.shard_sizes, node.rows):
            raise CheckpointError(f"{node.key}: does not say what the manifest says")
        return record

    return list(_in_order(nodes, read, _REQUEST_THREADS))


def _entry(manifest: Index, name: str) -> TensorEntry:
    entry = manifest.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"{name}: not in the checkpoint")
    return entry


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


def _copy_rows(block: Block, data: memoryview, rows: RowRange, target: torch.Tensor) -> None:
    low, high = max(block.first_row, rows[0]), min(block.end_row, rows[1])
    row_bytes = len(data) // (block.end_row - block.first_row)
    # torch wants memory it may write to, so the used rows are copied once more.
    used = bytearray(
        data[(low - block.first_row) * row_bytes : (high - block.first_row) * row_bytes]
    )
    source = torch.frombuffer(used, dtype=target.dtype).view(high - low, *target.shape[1:])
    with torch.no_grad():  # per thread, so it belongs here and not around the pool
        target[low - rows[0] : high - rows[0]].copy_(source)


def _in_order(
    reads: Iterable[Item], work: Callable[[Item], Result], threads: int
) -> Iterator[Result]:
    """`map` over a pool that is at most `threads` reads ahead of the consumer."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for read in reads:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, read))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(store: Store, key: str, start: int, end: int) -> bytes:
    try:
        return store.read(key, start, end)
    except NotFound as error:
        raise CheckpointError(f"{key}: missing") from error


def _read_exactly(store: Store, key: str, size: int, sha256: str) -> bytes:
    data = _read(store, key, 0, size + 1)
    if len(data) != size:
        raise CheckpointError(f"{key}: its size is not the committed {size} bytes")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{key}: its SHA-256 is not the committed one")
    return data


def _check_size(key: str, expected: int, size: int | None) -> None:
    if size is None:
        raise CheckpointError(f"{key}: missing")
    if size != expected:
        raise CheckpointError(f"{key}: {size} bytes, expected {expected}")


def _file_problems(store: Store, manifest: FullManifest) -> list[str]:
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        found = list(pool.map(lambda file: _problems_of(store, file), manifest.files))
    return [problem for problems in found for problem in problems]


def _problems_of(store: Store, file: ShardFile) -> list[str]:
    starts = range(0, file.size, READ_BYTES_MAX)
    try:
        _check_size(file.key, file.size, store.size(file.key))
        chunks = (
            memoryview(_read(store, file.key, start, min(start + READ_BYTES_MAX, file.size)))
            for start in starts
        )
        bounds = [bound for piece in file.slices for bound in block_bounds(piece)]
        size, sha256, crcs = hash_blocks(chunks, bounds)
        _check_size(file.key, file.size, size)
    except CheckpointError as error:
        return [str(error)]
    problems = (
        [] if sha256 == file.sha256 else [f"{file.key}: its SHA-256 is not the one in the manifest"]
    )
    found = iter(crcs)
    for piece in file.slices:
        for index, crc in enumerate(piece.block_crc32):
            if next(found) != crc:
                problems.append(
                    f"{file.key}: {piece.name} block {index}: its CRC-32 is not the one in the manifest"
                )
    return problems


def _part_problems(store: Store, manifest: FullManifest) -> list[str]:
    """Parts are of no use once the manifest exists, so a missing one is no problem; a changed one is a sign of rot."""
    problems = []
    for file in manifest.files:
        rank = int(file.key.rpartition("-")[2].partition(".")[0])
        key = part_key(manifest.directory, rank)
        try:
            part = Part.from_bytes(store.read(key, 0, DOCUMENT_BYTES_MAX))
        except NotFound:
            continue
        except CheckpointError as error:
            problems.append(f"{key}: {error}")
            continue
        if part != Part(manifest.run_id, manifest.directory, rank, file, manifest.state):
            problems.append(f"{key}: does not say what the manifest says")
    return problems
