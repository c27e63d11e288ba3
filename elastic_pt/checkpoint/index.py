"""Reads a checkpoint's index: where the rows of each tensor are.

    checkpoint (from the log) ── read_root ──┬── read_index      the node records that one worker needs
                                             └── read_manifest   the node records of all nodes

`read_root` reads the one object whose size and SHA-256 are in the log. `read_index` and `read_manifest` read
node records in parallel. They compare each one with the size, SHA-256 and rows in the root.

Errors: `CheckpointError` means that this checkpoint cannot be used, but another one may be usable. Any other
`StoreError` (no access, deadline passed) says nothing about the checkpoint and is not caught.
Runs in workers, agents and the command line.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import structlog

from elastic_pt.checkpoint.layout import (
    FullManifest,
    RowRange,
    TensorEntry,
    TensorSlice,
    TrainingState,
    manifest_key,
    parse_directory,
)
from elastic_pt.checkpoint.nodes import NodeRecord, NodeShare, RootManifest
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, decode
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store

REQUEST_THREADS: Final = 64
"""Parallel small requests of a reader: sizes and node records."""
READS: Final = 3
"""How often bytes with a wrong hash are read before they count as damaged in the store: they may have changed on the way."""

log = structlog.get_logger("elastic_pt.checkpoint.index")


class Readable(Protocol):
    """A source of rows that returns bytes: a `Store`."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `[start, end)` of a file."""


@runtime_checkable
class Memory(Protocol):
    """A source of rows that fills the caller's memory, without a copy of its own."""

    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> int:
        """Fill the parts, one after another, with the bytes of a file from `start` on. Returns the number of bytes."""


class Index(Protocol):
    """Where the rows of each tensor are. `restore` needs nothing else of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensors by name, with all pieces that hold rows the caller may want."""


@dataclass(frozen=True)
class PartialIndex:
    """The state of a checkpoint, and where the rows of one reader are."""

    state: TrainingState
    tensors: Mapping[str, TensorEntry]


def read_root(store: Store, checkpoint: Checkpoint, run_id: str) -> RootManifest | FullManifest:
    """Read the object `manifest.json` of a committed checkpoint, of any schema.

    Compares size and SHA-256 with the commit before it parses anything. Then compares run, step, generation and
    directory. Raises `CheckpointError` for a swapped or replayed manifest, or one of another run.
    """
    name = parse_directory(checkpoint.directory)
    if (name.step, name.generation) != (checkpoint.step, checkpoint.generation):
        raise CheckpointError(
            f"{checkpoint.directory}: committed as step {checkpoint.step} of generation {checkpoint.generation}; "
            f"expected step {name.step} of generation {name.generation}"
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
        raise CheckpointError(f"{key}: belongs to run {manifest.run_id!r}; expected {run_id!r}")
    if manifest.directory != checkpoint.directory:
        raise CheckpointError(
            f"{key}: written for {manifest.directory}; expected {checkpoint.directory}"
        )
    return manifest


def read_manifest(store: Store, checkpoint: Checkpoint, run_id: str) -> FullManifest:
    """Every slice of a committed checkpoint. Reads all its node records.

    Raises `CheckpointError` as `read_root` does, and for a node record that differs from the manifest.
    """
    return full_manifest(store, read_root(store, checkpoint, run_id))


def full_manifest(store: Store, root: RootManifest | FullManifest) -> FullManifest:
    """Every slice of the checkpoint with this root. Reads all its node records."""
    if isinstance(root, FullManifest):
        return root
    files = tuple(file for record in _read_nodes(store, root, root.nodes) for file in record.files)
    return FullManifest(root.run_id, root.directory, files, root.state)


def read_index(
    store: Store, checkpoint: Checkpoint, run_id: str, wanted: Mapping[str, RowRange]
) -> PartialIndex:
    """Where rows `[first, end)` of each wanted tensor are. Reads only the records of nodes that hold some of them.

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
    # Not `joined`: the nodes were chosen for different tensors, so rows may be missing. `plan_reads` checks that.
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


def _read_nodes(store: Store, root: RootManifest, nodes: Sequence[NodeShare]) -> list[NodeRecord]:
    """The records of these nodes. Raises `CheckpointError` for one that differs from the manifest."""

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
            raise CheckpointError(
                f"{node.key}: differs from the manifest; expected its run, directory, sizes and rows"
            )
        return record

    return list(in_order(nodes, read, REQUEST_THREADS))


def _read_exactly(store: Store, key: str, size: int, sha256: str) -> bytes:
    for attempt in range(READS):
        data = read_bytes(store, key, 0, size + 1)
        if len(data) != size:
            raise CheckpointError(f"{key}: wrong size; expected the committed {size} bytes")
        if hashlib.sha256(data).hexdigest() == sha256:
            if attempt:
                warn_of_wrong_bytes(f"{key}: wrong SHA-256")
            return data
    raise CheckpointError(f"{key}: wrong SHA-256; expected the committed {sha256}")


def warn_of_wrong_bytes(wrong: str) -> None:
    """Tell people that bytes of a checkpoint had changed on the way, as a further read had the right ones; `wrong` says which."""
    log.warning("checkpoint_bytes_wrong", cause=wrong)


def read_bytes(store: Readable, key: str, start: int, end: int) -> bytes:
    """Bytes `[start, end)` of an object. Raises `CheckpointError` if the object is missing."""
    try:
        return store.read(key, start, end)
    except NotFound as error:
        raise CheckpointError(f"{key}: missing") from error
