"""The files and records of a checkpoint, and the checks of every record.

    ckpt/<step>-g<generation>-<nonce>/
        shard-<rank>.safetensors   the rows of every tensor that one worker held
        node-<rank>.json           the contents of the files of one node's workers; <rank> is its first worker's
        notice-<rank>.json         tells the committing node that the node record exists, and which rows it has
        manifest.json              names every node record; written after all notices

The directory is a checkpoint if and only if a COMMIT record of the run's log names it, with the size and SHA-256
of its manifest. The manifest holds size and SHA-256 of every node record. A node record holds size and SHA-256 of
its shard files, and a CRC-32 of every block of rows. So a reader of the log can detect any wrong byte, in whole
files and in the few rows that it needs.

A tensor is cut by rows (its first dimension, as FSDP2's Shard(0) does). A file holds rows
`[first_row, end_row)` of it, and the files of a node hold rows without a gap between them. For every tensor the
rows of the nodes tile all rows, without gap or overlap. This is checked three times. A node checks that the
slices of its workers join. The committing node checks that the rows of all nodes tile. A reader checks the
manifest again, and compares each node record with the rows in the manifest. The number of workers that will read is
not stored.

In schema 1 there was one `part-<rank>.json` per file, and the manifest held all slices. Such checkpoints are still
readable. A `FullManifest` is that document, or a reader builds it from the documents of later schemas, which are in
`nodes`.

This module does no I/O. Every error is a `CheckpointError` of one line.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from pydantic import Field, StringConstraints

from elastic_pt.checkpoint.record import Record, StoredDocument, record, shown
from elastic_pt.errors import CheckpointError

BLOCK_BYTES_MAX = 4 << 20
DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}

RowRange = tuple[int, int]

# Text without two dots in a row, so that no name can leave its directory.
_WORD: Final = r"\.?([A-Za-z0-9_-]\.?)+"
_DIRECTORY: Final = r"ckpt/([0-9]{10})-g([0-9]{1,10})-([0-9a-z]{4,32})"

Count = Annotated[int, Field(ge=0, le=1 << 53)]
Step = Annotated[int, Field(ge=0, le=9_999_999_999)]
Rank = Annotated[int, Field(ge=0, le=99_999)]
Row = Annotated[int, Field(ge=0, le=1 << 40)]
Shape = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...], Field(min_length=1, max_length=8)
]
FileBytes = Annotated[int, Field(ge=8, le=1 << 53)]
Crc32 = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, StringConstraints(pattern=r"^\.?([A-Za-z0-9_:+-]\.?)+$", max_length=128)]
Key = Annotated[str, StringConstraints(pattern=rf"^{_WORD}(/{_WORD})*$", max_length=512)]
Directory = Annotated[str, StringConstraints(pattern=rf"^{_DIRECTORY}$")]
TensorName = Annotated[
    str, StringConstraints(pattern=rf"^(model|exp_avg|exp_avg_sq)/{_WORD}$", max_length=512)
]
Dtype = Literal["F64", "I64", "F32", "BF16"]


class DirectoryName(NamedTuple):
    """The parts of a checkpoint directory's name."""

    step: int
    generation: int
    nonce: str


def checkpoint_directory(step: int, generation: int, nonce: str) -> str:
    """The directory of a checkpoint attempt; `nonce` is 4 to 32 of [0-9a-z], the same on all ranks."""
    directory = f"ckpt/{step:010d}-g{generation}-{nonce}"
    parse_directory(directory)
    return directory


def parse_directory(directory: str) -> DirectoryName:
    """Parse the name of a checkpoint directory. Raises `CheckpointError` for any other name."""
    found = re.fullmatch(_DIRECTORY, directory)
    if found is None:
        raise CheckpointError(
            f"directory {shown(directory)}: expected ckpt/<step>-g<generation>-<nonce>"
        )
    return DirectoryName(int(found[1]), int(found[2]), found[3])


def shard_key(directory: str, rank: int) -> str:
    """Key of the shard file of one rank of the generation that wrote the checkpoint."""
    return f"{directory}/shard-{rank:05d}.safetensors"


def part_key(directory: str, rank: int) -> str:
    """Key of the record of one shard file in schema 1."""
    return f"{directory}/part-{rank:05d}.json"


def manifest_key(directory: str) -> str:
    """Key of the manifest."""
    return f"{directory}/manifest.json"


@record
class TrainingState(Record):
    """All resumable state that is not a tensor. It contains no rank and no world size.

    It leaves out values that follow from the step and the configuration: the position in the data and in the
    schedule, the numbers of samples and tokens, and random values, whose key is the seed and the step (or row).
    `config_fingerprint` identifies the configuration, with the seed.
    """

    what: ClassVar[str] = "training state"

    step: Step
    """Number of steps done. The state is the one after them."""
    optimizer_step: Step
    """Number of those steps that were not skipped for a non-finite gradient (for AdamW's bias correction)."""
    skipped_in_a_row: Step
    """Number of consecutive skipped steps just before this state."""
    data_fingerprint: Label
    tokenizer_sha256: Sha256
    config_fingerprint: Label

    def __post_init__(self) -> None:
        if self.optimizer_step > self.step:
            raise self.refuse("optimizer_step", f"at most the {self.step} steps done")
        if self.skipped_in_a_row > self.step - self.optimizer_step:
            raise self.refuse("skipped_in_a_row", f"at most {self.step - self.optimizer_step}")


_LEFT_OUT: Final = {
    "rows_seen", "tokens_seen", "seed", "learning_rate_step", "data_position", "numerics", "slots"
}  # fmt: skip
"""Fields of states up to schema 2. They follow from the step and the configuration. Nothing reads them."""


def upgraded_state(schema: int, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a document, with its `state` converted from schema 1 or 2 to schema 3."""
    state = content.get("state")
    if schema >= 3 or not isinstance(state, dict):
        return content
    missing = _LEFT_OUT - state.keys()
    if missing:
        raise CheckpointError(f"training state: missing field {min(missing)!r}")
    kept = {key: state[key] for key in state if key not in _LEFT_OUT}
    # Older documents leave it out if it is 0.
    return content | {"state": {"skipped_in_a_row": 0} | kept}


@record
class Tensor(Record):
    """One whole tensor of the state, without the places of its rows."""

    what: ClassVar[str] = "tensor"

    name: TensorName
    dtype: Dtype
    global_shape: Shape


@record
class TensorSlice(Record):
    """Rows `[first_row, end_row)` of one tensor, stored at byte `offset` of one shard file.

    Block i covers `block_rows` rows from `first_row + i * block_rows` on (the last block may be shorter).
    `block_crc32[i]` is the CRC-32 of its bytes. A block is at most 4 MiB, or a single row.
    """

    what: ClassVar[str] = "tensor slice"

    name: TensorName
    dtype: Dtype
    global_shape: Shape
    first_row: Row
    end_row: Row
    offset: FileBytes
    block_rows: Row
    block_crc32: tuple[Crc32, ...]

    def __post_init__(self) -> None:
        rows = self.global_shape[0]
        if not self.first_row < self.end_row <= rows:
            raise self.refuse("end_row", f"{self.first_row + 1} to {rows}")
        if not 1 <= self.block_rows <= rows:
            raise self.refuse("block_rows", f"1 to {rows}")
        if self.block_rows > 1 and self.block_rows * self.row_bytes > BLOCK_BYTES_MAX:
            raise self.refuse(
                "block_rows", f"at most {BLOCK_BYTES_MAX} bytes of {self.row_bytes}-byte rows"
            )
        blocks = -(-(self.end_row - self.first_row) // self.block_rows)
        if len(self.block_crc32) != blocks:
            raise self.refuse("block_crc32", f"{blocks} CRC-32 values")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.global_shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def end_offset(self) -> int:
        """Offset of the first byte after this slice."""
        return self.offset + (self.end_row - self.first_row) * self.row_bytes


def rows_per_block(row_bytes: int, rows: int, block_bytes: int = 1 << 20) -> int:
    """Rows of one block, for rows of `row_bytes` each: as many as fit in `block_bytes`, at least one.

    1 MiB is large enough to amortise a request. It is small enough that a reader whose rows begin inside a block
    discards few bytes. A checkpoint of 100 GB then has 100,000 CRCs, which are 1 MB of node records.
    """
    return max(1, min(rows, block_bytes // row_bytes))


@record
class ShardFile(Record):
    """One immutable file of a checkpoint. `key` is relative to the run's store, `size` is in bytes."""

    what: ClassVar[str] = "shard file"

    key: Key
    size: FileBytes
    sha256: Sha256
    slices: tuple[TensorSlice, ...]

    def __post_init__(self) -> None:
        end, names = 0, set()
        for piece in self.slices:
            if piece.offset < end or piece.end_offset > self.size or piece.name in names:
                raise CheckpointError(
                    f"shard file {self.key}: the bytes of {piece.name} overlap others, "
                    f"lie outside the file's {self.size} bytes, or are listed twice"
                )
            end = piece.end_offset
            names.add(piece.name)


@record
class Part(StoredDocument):
    """One worker's share of a checkpoint of schema 1."""

    what: ClassVar[str] = "checkpoint part"
    schemas: ClassVar[tuple[int, ...]] = (1,)

    run_id: Label
    directory: Directory
    rank: Rank
    file: ShardFile
    state: TrainingState

    def __post_init__(self) -> None:
        if self.file.key != shard_key(self.directory, self.rank):
            raise CheckpointError(
                f"{self.what}: file {self.file.key}; expected {shard_key(self.directory, self.rank)}"
            )
        require_step(self.what, self.directory, self.state)

    @classmethod
    def _upgraded(cls, schema: int, content: dict[str, Any]) -> dict[str, Any]:
        return upgraded_state(schema, content)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and its pieces `(file key, slice)`, in the order of their rows."""

    name: str
    dtype: Dtype
    global_shape: tuple[int, ...]
    pieces: tuple[tuple[str, TensorSlice], ...]

    @property
    def rows(self) -> RowRange:
        """First row of the first piece and end row of the last."""
        return self.pieces[0][1].first_row, self.pieces[-1][1].end_row


@record
class FullManifest(StoredDocument):
    """Every slice of a checkpoint, bound to one run, step, generation and directory.

    In schema 1 this is the object `manifest.json`. For later schemas a reader builds it from the node records.
    """

    what: ClassVar[str] = "checkpoint manifest"
    schemas: ClassVar[tuple[int, ...]] = (1,)

    run_id: Label
    directory: Directory
    files: tuple[ShardFile, ...]
    state: TrainingState

    def __post_init__(self) -> None:
        require_step(self.what, self.directory, self.state)
        # Ranks are numbered from 0 without gaps, so the sorted keys are known.
        if [file.key for file in self.files] != [
            shard_key(self.directory, rank) for rank in range(len(self.files))
        ]:
            raise CheckpointError(
                f"{self.what}: wrong files; expected those of ranks 0, 1, ... of {self.directory}"
            )
        if not self.tensors:
            raise CheckpointError(f"{self.what}: no tensors; expected at least one")

    @classmethod
    def _upgraded(cls, schema: int, content: dict[str, Any]) -> dict[str, Any]:
        return upgraded_state(schema, content)

    @property
    def step(self) -> int:
        """The step of this state."""
        return parse_directory(self.directory).step

    @property
    def generation(self) -> int:
        """The generation that wrote it."""
        return parse_directory(self.directory).generation

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """Key and size of every file of the checkpoint, without the manifest."""
        return [(file.key, file.size) for file in self.files]

    @property
    def removable(self) -> set[str]:
        """Keys of all objects of the checkpoint, without the manifest."""
        parts = {part_key(self.directory, rank) for rank in range(len(self.files))}
        return {file.key for file in self.files} | parts

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name, sorted. Raises `CheckpointError` unless the slices tile all its rows."""
        entries = joined(self.files)
        for name, entry in entries.items():
            check_tiling(name, [entry.rows], entry.global_shape[0])
        return entries


def require_step(what: str, directory: str, state: TrainingState) -> None:
    """Raise `CheckpointError` unless the state is of the step in the directory's name."""
    if state.step != parse_directory(directory).step:
        raise CheckpointError(
            f"{what}: state of step {state.step} in {directory}; expected the step of the directory"
        )


def joined(files: Iterable[ShardFile]) -> dict[str, TensorEntry]:
    """Every tensor of these files by name, sorted.

    Raises `CheckpointError` if rows between the slices of a tensor are missing, or are there twice.
    """
    pieces: dict[str, list[tuple[str, TensorSlice]]] = {}
    for file in files:
        for piece in file.slices:
            pieces.setdefault(piece.name, []).append((file.key, piece))
    return {name: _entry(name, pieces[name]) for name in sorted(pieces)}


def _entry(name: str, pieces: list[tuple[str, TensorSlice]]) -> TensorEntry:
    pieces = sorted(pieces, key=lambda piece: piece[1].first_row)
    first = pieces[0][1]
    row = first.first_row
    for key, piece in pieces:
        if (piece.dtype, piece.global_shape) != (first.dtype, first.global_shape):
            raise CheckpointError(
                f"{name}: {key} has another dtype or shape than {pieces[0][0]}; expected the same"
            )
        if piece.first_row != row:
            raise CheckpointError(f"{name}: {_gap(row, piece.first_row)} ({key})")
        row = piece.end_row
    return TensorEntry(name, first.dtype, first.global_shape, tuple(pieces))


def check_tiling(name: str, spans: Iterable[RowRange], rows: int) -> None:
    """Raise `CheckpointError` unless the spans tile rows 0 to `rows` of a tensor."""
    row = 0
    for first, end in sorted(spans):
        if first != row:
            raise CheckpointError(f"{name}: {_gap(row, first)}")
        if end <= first:
            raise CheckpointError(f"{name}: rows {first} to {end}, expected at least one")
        row = end
    if row != rows:
        raise CheckpointError(f"{name}: {_gap(row, rows)}")


def _gap(row: int, next_row: int) -> str:
    low, high = sorted((row, next_row))
    return f"rows {low} to {high} are {'missing' if next_row > row else 'there twice'}"
