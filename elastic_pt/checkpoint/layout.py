"""What a checkpoint is made of: names, records, and the checks that every record passes.

    ckpt/<step>-g<generation>-<nonce>/
        shard-<rank>.safetensors   the rows of every tensor that one worker held
        node-<rank>.json           what is in the files of one node's workers; <rank> is that of the first
        notice-<rank>.json         for the committing node: that the node record is there, and which rows it has
        manifest.json              names every node record, written when every notice is there

The directory counts if and only if a COMMIT record of the run's log names it, with the
manifest's size and SHA-256. From there the chain goes down: the manifest holds size and SHA-256 of
every node record; a node record those of its shard files, and a CRC-32 of every block of rows. So a reader of the
record can tell any other bytes from the right ones, whole files or the few rows it needs.

A tensor is cut by rows (its first dimension, as FSDP2's Shard(0) does); a file holds rows
`[first_row, end_row)` of it, and the files of a node hold rows without a gap between them. For every tensor the
rows of the nodes tile all rows without gap or overlap. This is checked three times: a node checks that the
slices of its workers join, the committing node that the rows of all nodes tile, and a reader checks the
manifest again, and each node record against the rows that the manifest says. Nothing here knows how many
workers will read.

Until schema 2 there was one `part-<rank>.json` per file, and the manifest held all slices itself. Such
checkpoints are still read: `FullManifest` is both that document and what a reader puts together from schema 2,
whose documents are in `nodes`.

Records check themselves when they are built, so a record that exists is a valid one, whether it was
decoded or constructed. This module does no I/O; every error is a `CheckpointError` of one line.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from elastic_pt.checkpoint.record import (
    Document,
    Record,
    all_whole,
    as_tuple,
    shown,
)
from elastic_pt.errors import CheckpointError

BLOCK_BYTES_MAX = 4 << 20
DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}

RowRange = tuple[int, int]

RANK_MAX = 99_999
DIRECTORY = re.compile(r"ckpt/([0-9]{10})-g([0-9]{1,10})-([0-9a-z]{4,32})")
KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_TENSOR_NAME = re.compile(r"(model|exp_avg|exp_avg_sq)/[A-Za-z0-9_.-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
LABEL = re.compile(r"[A-Za-z0-9._:+-]{1,128}")


@dataclass(frozen=True)
class DirectoryName:
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
    """Take a checkpoint directory's name apart. Raises `CheckpointError` for any other name."""
    found = DIRECTORY.fullmatch(directory)
    if found is None:
        raise CheckpointError(f"{shown(directory)} is not the name of a checkpoint directory")
    return DirectoryName(int(found[1]), int(found[2]), found[3])


def shard_key(directory: str, rank: int) -> str:
    """Key of the shard file of one rank of the world that wrote the checkpoint."""
    return f"{directory}/shard-{rank:05d}.safetensors"


def part_key(directory: str, rank: int) -> str:
    """Key of the record of one shard file in schema 1."""
    return f"{directory}/part-{rank:05d}.json"


def manifest_key(directory: str) -> str:
    """Key of the manifest."""
    return f"{directory}/manifest.json"


@dataclass(frozen=True)
class TrainingState(Record):
    """All resumable state that is not a tensor. It knows no rank and no world size.

    There is no RNG state in it, because nothing random depends on what was drawn before: initial
    weights, data order and every other draw are keyed by `seed` and the step (or row) they are for.
    `data_position` is the loader's whole state. The state is the one *after* step `step` was applied:
    `step` counts steps that are done, `optimizer_step` those of them that were not skipped for a
    non-finite gradient (AdamW's bias correction), `learning_rate_step` the schedule's position.
    """

    what: ClassVar[str] = "training state"

    step: int
    rows_seen: int
    tokens_seen: int
    seed: int
    optimizer_step: int
    learning_rate_step: int
    data_position: int
    data_fingerprint: str
    tokenizer_sha256: str
    config_fingerprint: str
    numerics: str
    slots: int
    skipped_in_a_row: int = 0
    """Steps just before this state that were skipped one after the other; left out of the JSON where it is 0."""

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object; one written before `skipped_in_a_row` existed keeps its bytes and its seal."""
        values = super().to_json()
        if not self.skipped_in_a_row:
            del values["skipped_in_a_row"]
        return values

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Decode strictly; an absent `skipped_in_a_row` is 0."""
        if isinstance(value, dict):
            value = {"skipped_in_a_row": 0} | value
        return super().from_json(value)

    def __post_init__(self) -> None:
        self._whole("step", 0, 9_999_999_999)
        for field in ("rows_seen", "tokens_seen", "data_position"):
            self._whole(field, 0)
        self._whole("seed", 0, (1 << 64) - 1)
        self._whole("optimizer_step", 0, self.step)
        self._whole("learning_rate_step", 0, self.step)
        self._whole("slots", 1)
        self._whole("skipped_in_a_row", 0, self.step - self.optimizer_step)
        for field in ("data_fingerprint", "config_fingerprint"):
            self._text(field, LABEL)
        self._text("tokenizer_sha256", SHA256)
        if self.numerics not in ("exact", "native"):
            self._refuse("numerics", "'exact' or 'native'")


@dataclass(frozen=True)
class Tensor(Record):
    """One whole tensor of the state, whoever holds its rows."""

    what: ClassVar[str] = "tensor"

    name: str
    dtype: str
    global_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_tensor(self)

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"global_shape": as_tuple(values["global_shape"])}


@dataclass(frozen=True)
class TensorSlice(Record):
    """Rows `[first_row, end_row)` of one tensor, stored at byte `offset` of one shard file.

    Block i covers `block_rows` rows from `first_row + i * block_rows` on (the last may be shorter) and
    `block_crc32[i]` is the CRC-32 of its bytes. A block is at most 4 MiB, or a single row.
    """

    what: ClassVar[str] = "tensor slice"

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    first_row: int
    end_row: int
    offset: int
    block_rows: int
    block_crc32: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_tensor(self)
        shape = self.global_shape
        self._whole("first_row", 0, shape[0] - 1)
        self._whole("end_row", self.first_row + 1, shape[0])
        self._whole("offset", 8)
        self._whole("block_rows", 1, shape[0])
        if self.block_rows > 1 and self.block_rows * self.row_bytes > BLOCK_BYTES_MAX:
            self._refuse(
                "block_rows", f"at most {BLOCK_BYTES_MAX} bytes of {self.row_bytes}-byte rows"
            )
        blocks = -(-(self.end_row - self.first_row) // self.block_rows)
        crcs = self.block_crc32
        if not (all_whole(crcs, 0, 0xFFFFFFFF) and len(crcs) == blocks):
            self._refuse("block_crc32", f"{blocks} CRC-32 values")

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        lists = ("global_shape", "block_crc32")
        return values | {field: as_tuple(values[field]) for field in lists}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.global_shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def end_offset(self) -> int:
        """First byte of the file behind this slice."""
        return self.offset + (self.end_row - self.first_row) * self.row_bytes


def _check_tensor(tensor: Tensor | TensorSlice) -> None:
    tensor._text("name", _TENSOR_NAME)
    if tensor.dtype not in DTYPE_BYTES:
        tensor._refuse("dtype", f"one of {', '.join(DTYPE_BYTES)}")
    shape = tensor.global_shape
    if not (all_whole(shape, 1, 1 << 40) and 1 <= len(shape) <= 8):
        tensor._refuse("global_shape", "one to eight sizes of at least 1")


def rows_per_block(row_bytes: int, rows: int, block_bytes: int = 1 << 20) -> int:
    """Rows of one block, for rows of `row_bytes` each: as many as `block_bytes` hold, at least one.

    1 MiB is enough to amortise a request and small enough that a reader whose rows begin inside
    a block throws little away; a checkpoint of 100 GB then has 100,000 CRCs, a megabyte of manifest.
    """
    return max(1, min(rows, block_bytes // row_bytes))


@dataclass(frozen=True)
class ShardFile(Record):
    """One immutable file of a checkpoint. `key` is relative to the run's store, `size` is in bytes."""

    what: ClassVar[str] = "shard file"

    key: str
    size: int
    sha256: str
    slices: tuple[TensorSlice, ...]

    def __post_init__(self) -> None:
        self._text("key", KEY)
        self._whole("size", 8)
        self._text("sha256", SHA256)
        end, names = 0, set()
        for piece in self.slices:
            if piece.offset < end or piece.end_offset > self.size or piece.name in names:
                raise CheckpointError(
                    f"shard file {self.key}: the bytes of {piece.name} overlap others, "
                    f"lie outside the file's {self.size} bytes, or are listed twice"
                )
            end = piece.end_offset
            names.add(piece.name)

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"slices": tuple(map(TensorSlice.from_json, as_tuple(values["slices"])))}


@dataclass(frozen=True)
class Part(Document):
    """One worker's share of a checkpoint of schema 1."""

    what: ClassVar[str] = "checkpoint part"
    schema: ClassVar[int] = 1

    run_id: str
    directory: str
    rank: int
    file: ShardFile
    state: TrainingState

    def __post_init__(self) -> None:
        self._text("run_id", LABEL)
        self._text("directory", DIRECTORY)
        self._whole("rank", 0, RANK_MAX)
        if self.file.key != shard_key(self.directory, self.rank):
            raise CheckpointError(f"{self.what}: {self.file.key} is not rank {self.rank}'s file")
        if self.state.step != parse_directory(self.directory).step:
            raise CheckpointError(
                f"{self.what}: state of step {self.state.step} in {self.directory}"
            )

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        file = ShardFile.from_json(values["file"])
        return values | {"file": file, "state": TrainingState.from_json(values["state"])}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and its pieces, `(file key, slice)`, in the order of their rows and without gap or overlap."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    pieces: tuple[tuple[str, TensorSlice], ...]

    @property
    def rows(self) -> RowRange:
        """First and end row of the pieces together."""
        return self.pieces[0][1].first_row, self.pieces[-1][1].end_row


@dataclass(frozen=True)
class FullManifest(Document):
    """Every slice of a checkpoint, bound to one run, step, generation and place.

    In schema 1 this is the object `manifest.json`; in schema 2 a reader puts it together from the node records.
    """

    what: ClassVar[str] = "checkpoint manifest"
    schema: ClassVar[int] = 1

    run_id: str
    directory: str
    files: tuple[ShardFile, ...]
    state: TrainingState

    def __post_init__(self) -> None:
        self._text("run_id", LABEL)
        self._text("directory", DIRECTORY)
        if self.state.step != self.step:
            raise CheckpointError(
                f"{self.what}: state of step {self.state.step} in {self.directory}"
            )
        # Ranks count from 0 without gaps, so the sorted keys are known.
        if [file.key for file in self.files] != [
            shard_key(self.directory, rank) for rank in range(len(self.files))
        ]:
            raise CheckpointError(
                f"{self.what}: its files are not those of ranks 0, 1, ... of {self.directory}"
            )
        if not self.tensors:
            raise CheckpointError(f"{self.what}: no tensors")

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        files = tuple(map(ShardFile.from_json, as_tuple(values["files"])))
        return values | {"files": files, "state": TrainingState.from_json(values["state"])}

    @property
    def step(self) -> int:
        """The step whose state this is."""
        return parse_directory(self.directory).step

    @property
    def generation(self) -> int:
        """The generation whose workers wrote it."""
        return parse_directory(self.directory).generation

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """Key and size of every file that the checkpoint consists of besides the manifest."""
        return [(file.key, file.size) for file in self.files]

    @property
    def removable(self) -> set[str]:
        """Keys of all that belongs to the checkpoint besides the manifest."""
        parts = {part_key(self.directory, rank) for rank in range(len(self.files))}
        return {file.key for file in self.files} | parts

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name, sorted. Raises `CheckpointError` unless the slices tile all its rows."""
        entries = joined(self.files)
        for name, entry in entries.items():
            check_tiling(name, [entry.rows], entry.global_shape[0])
        return entries


def joined(files: Iterable[ShardFile]) -> dict[str, TensorEntry]:
    """Every tensor of these files by name, sorted. Raises `CheckpointError` if rows are missing between its slices, or are there twice."""
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
            raise CheckpointError(f"{name}: {key} has another dtype or shape than {pieces[0][0]}")
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
