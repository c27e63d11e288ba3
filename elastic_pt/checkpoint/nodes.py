"""The documents that nodes write: the uploads of a node's workers, and the nodes of a checkpoint.

    NodeRecord (every slice of a node's workers) ◄── NodeShare (its size, SHA-256 and rows)
    NodeNotice or NodeRefusal (to the committing node) ──► RootManifest (the share of every node)

`layout` describes the checks. No I/O.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints

from elastic_pt.checkpoint.layout import (
    Directory,
    FileBytes,
    Key,
    Label,
    Rank,
    Row,
    RowRange,
    Sha256,
    ShardFile,
    Tensor,
    TrainingState,
    check_tiling,
    joined,
    require_step,
    shard_key,
    upgraded_state,
)
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, Document, Record, canonical, record
from elastic_pt.errors import CheckpointError

REASON_LENGTH_MAX = 512


def node_key(directory: str, first_rank: int) -> str:
    """Key of a node's record. `first_rank` is the rank of the node's first worker."""
    return f"{directory}/node-{first_rank:05d}.json"


def notice_key(directory: str, first_rank: int) -> str:
    """Key of the notice that this node's record exists, or of the refusal instead of it."""
    return f"{directory}/notice-{first_rank:05d}.json"


def fingerprint_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of names, types and shapes of all tensors of the state; equal on all nodes of a checkpoint."""
    return hashlib.sha256(canonical(tensors)).hexdigest()


@record
class NodeRecord(Document):
    """The contents of the shard files of one node's workers. The agent writes it after all of them are uploaded."""

    what: ClassVar[str] = "node record"
    schemas: ClassVar[tuple[int, ...]] = (2,)

    run_id: Label
    directory: Directory
    first_rank: Rank
    files: tuple[ShardFile, ...]

    def __post_init__(self) -> None:
        ranks = range(self.first_rank, self.first_rank + len(self.files))
        if not ranks or [each.key for each in self.files] != [
            shard_key(self.directory, rank) for rank in ranks
        ]:
            raise CheckpointError(
                f"{self.what}: wrong files; expected those of ranks {self.first_rank}, ... of {self.directory}"
            )

    def rows_of(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """First and end row of each tensor on this node, as one flat list; 0, 0 for a tensor without rows here.

        Raises `CheckpointError` if rows between its workers are missing, or if a slice is of another tensor.
        """
        entries = joined(self.files)
        found: list[int] = []
        for tensor in tensors:
            entry = entries.pop(tensor.name, None)
            if entry is None:
                found += (0, 0)
                continue
            if (entry.dtype, entry.global_shape) != (tensor.dtype, tensor.global_shape):
                raise CheckpointError(
                    f"{tensor.name}: {entry.dtype} {entry.global_shape} at rank {self.first_rank}, "
                    f"expected {tensor.dtype} {tensor.global_shape}"
                )
            found += entry.rows
        if entries:
            raise CheckpointError(
                f"{next(iter(entries))}: no tensor of {self.directory}; expected only its tensors"
            )
        return tuple(found)


@record
class NodeShare(Record):
    """One node's share of a checkpoint, as an entry of the manifest. `rows` is the result of `NodeRecord.rows_of`."""

    what: ClassVar[str] = "node share"

    key: Key
    size: Annotated[int, Field(ge=2, le=DOCUMENT_BYTES_MAX)]
    sha256: Sha256
    shard_sizes: Annotated[tuple[FileBytes, ...], Field(min_length=1)]
    """Bytes of each worker's shard file."""
    rows: tuple[Row, ...]

    def spans(self) -> Iterable[RowRange]:
        """The rows of each tensor, in the order of the manifest's tensors."""
        numbers = iter(self.rows)
        return zip(numbers, numbers, strict=True)


@record
class NodeNotice(Document):
    """Tells the committing node that all shards of a node and its record are in the store."""

    what: ClassVar[str] = "node notice"
    schemas: ClassVar[tuple[int, ...]] = (2, 3)

    run_id: Label
    directory: Directory
    first_rank: Rank
    share: NodeShare
    state: TrainingState
    tensors_sha256: Sha256
    """`fingerprint_of` all tensors."""
    tensors: tuple[Tensor, ...]
    """All tensors, sorted by name. Only in the notice of the first node: they are equal on all nodes."""

    def __post_init__(self) -> None:
        if self.share.key != node_key(self.directory, self.first_rank):
            raise CheckpointError(
                f"{self.what}: record {self.share.key}; "
                f"expected {node_key(self.directory, self.first_rank)}"
            )
        require_step(self.what, self.directory, self.state)
        if bool(self.tensors) != (self.first_rank == 0):
            raise self.refuse("tensors", "all tensors at rank 0, and none at other ranks")
        if self.tensors and fingerprint_of(self.tensors) != self.tensors_sha256:
            raise self.refuse("tensors_sha256", "the SHA-256 of the tensors")

    @classmethod
    def _upgraded(cls, schema: int, content: dict[str, Any]) -> dict[str, Any]:
        return upgraded_state(schema, content)

    @property
    def ranks(self) -> range:
        """The ranks of the node's workers."""
        return range(self.first_rank, self.first_rank + len(self.share.shard_sizes))


@record
class NodeRefusal(Document):
    """Replaces a node's notice if the node cannot write its record. The committing node then stops waiting."""

    what: ClassVar[str] = "node refusal"
    schemas: ClassVar[tuple[int, ...]] = (2,)

    run_id: Label
    directory: Directory
    first_rank: Rank
    why: Annotated[str, StringConstraints(max_length=REASON_LENGTH_MAX)]


@record
class RootManifest(Document):
    """The node records of a checkpoint and the rows of each; bound to one run, step, generation and directory."""

    what: ClassVar[str] = "checkpoint manifest"
    schemas: ClassVar[tuple[int, ...]] = (2, 3)

    run_id: Label
    directory: Directory
    tensors: tuple[Tensor, ...]
    nodes: tuple[NodeShare, ...]
    """In the order of their ranks."""
    state: TrainingState

    def __post_init__(self) -> None:
        require_step(self.what, self.directory, self.state)
        names = [tensor.name for tensor in self.tensors]
        if not names or names != sorted(set(names)):
            raise CheckpointError(
                f"{self.what}: wrong tensors; expected at least one, sorted by name"
            )
        if not self.nodes:
            raise CheckpointError(f"{self.what}: no nodes; expected at least one")
        first_rank = 0
        for node in self.nodes:
            if node.key != node_key(self.directory, first_rank):
                raise CheckpointError(
                    f"{self.what}: record {node.key}; expected that of the node of rank {first_rank}"
                )
            if len(node.rows) != 2 * len(names):
                raise CheckpointError(
                    f"{node.key}: rows of {len(node.rows) / 2:g} tensors, expected {len(names)}"
                )
            first_rank += len(node.shard_sizes)
        spans_of_tensors = zip(*(node.spans() for node in self.nodes), strict=True)
        for tensor, spans in zip(self.tensors, spans_of_tensors, strict=True):
            check_tiling(
                tensor.name, [each for each in spans if each != (0, 0)], tensor.global_shape[0]
            )

    @classmethod
    def _upgraded(cls, schema: int, content: dict[str, Any]) -> dict[str, Any]:
        return upgraded_state(schema, content)

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """Key and size of every file of the checkpoint, without the manifest."""
        sizes = [size for node in self.nodes for size in node.shard_sizes]
        shards = [(shard_key(self.directory, rank), size) for rank, size in enumerate(sizes)]
        return [(node.key, node.size) for node in self.nodes] + shards

    @property
    def removable(self) -> set[str]:
        """Keys of all objects of the checkpoint, without the manifest."""
        notices = {node.key.replace("/node-", "/notice-") for node in self.nodes}
        return {key for key, _ in self.sizes} | notices
