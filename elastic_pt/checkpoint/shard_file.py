"""One worker's rows as a safetensors file: the content of a buffer in memory, and of an object in the bucket.

The worker copies its rows into a buffer (`snapshot`), at the places of `ShardLayout`. The training step waits for that,
so everything else is the agent's: it hashes the file in one pass (`describe_shard`) and uploads it.

The file describes its content: `__metadata__` of the safetensors header holds the training state, the global shape and
first row of each tensor in the file, and the names, types and shapes of all tensors of the state. Any safetensors
reader can open it. There is no pickle.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from pydantic import TypeAdapter
from pydantic_core import from_json
from zlib_ng import zlib_ng

from elastic_pt.checkpoint.layout import (
    DTYPE_BYTES,
    Dtype,
    ShardFile,
    Tensor,
    TensorSlice,
    TrainingState,
    rows_per_block,
)
from elastic_pt.checkpoint.record import canonical
from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import FilePart

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_HEADER_SCHEMA = "3"
_TENSORS = TypeAdapter(tuple[Tensor, ...])
_HEADER_BYTES_MAX = 100_000_000
_SHARD_BYTES_MAX = 1 << 44
_STATE_BYTES_MAX = 512
"""Limit for the JSON text of a training state, quoted as a JSON string."""
_DATA_ALIGNMENT = 64


NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EFBIG}


class NoRoom(CheckpointError):
    """There is no room for a state now: not in the staging directory, or not in the buffers. There may be later."""


class LocalRows(NamedTuple):
    """One worker's rows of a tensor: `rows` is `[first_row, first_row + len(rows))` of `global_shape`."""

    rows: torch.Tensor
    global_shape: Sequence[int]
    first_row: int


class ShardLayout:
    """The place of each tensor in the shard file of one worker: the same for all steps of a generation.

    `tensors` maps `model/<parameter>`, `exp_avg/<parameter>` or `exp_avg_sq/<parameter>` to
    `(local rows, global shape, first row)`, see `LocalRows`. A worker without rows of a tensor gives zero rows. The
    header still lists such a tensor. Raises `CheckpointError` if a tensor does not fit its description.
    """

    def __init__(self, tensors: Mapping[str, tuple[torch.Tensor, Sequence[int], int]]) -> None:
        kept = {name: LocalRows(*tensors[name]) for name in tensors if tensors[name][0].numel()}
        # Wide types first: then every tensor is aligned to its element size, as the format requires.
        self.order = sorted(kept, key=lambda name: (-kept[name].rows.element_size(), name))
        """Names of the tensors with rows here, in the order of the file."""
        entries, whole, self.data_bytes = _entries(kept, self.order)
        metadata = {
            "elastic_pt_schema": _HEADER_SCHEMA,
            "rows": json.dumps(whole),
            "tensors": canonical(_tensors(tensors)).decode(),
            "state": "",
        }
        document = {"__metadata__": metadata} | entries
        text = json.dumps(document, separators=(",", ":")).encode("ascii")
        self._before, _, self._after = text.partition(b'"state":""')
        # Pad a short state with spaces, so that the data always begins at the same byte.
        bytes_max = 8 + len(text) + _STATE_BYTES_MAX
        self.header_bytes = -(-bytes_max // _DATA_ALIGNMENT) * _DATA_ALIGNMENT
        """Offset of the data in the file."""

    def header(self, state: TrainingState) -> bytes:
        """The file's first `header_bytes` bytes."""
        encoded = b'"state":' + json.dumps(canonical(state).decode()).encode("ascii")
        text = self._before + encoded + self._after
        length = self.header_bytes - 8
        if len(text) > length:
            raise CheckpointError(
                f"training state: {len(encoded)} bytes, expected at most {_STATE_BYTES_MAX}"
            )
        return length.to_bytes(8, "little") + text.ljust(length)


def describe_shard(part: FilePart, key: str) -> tuple[ShardFile, TrainingState, tuple[Tensor, ...]]:
    """Hash a shard file in one pass: SHA-256 of the file, CRC-32 of every block (agent process).

    `key` is the file's key in the bucket. Returns the file's description, the training state and all its tensors. Raises
    `CheckpointError` if it is not a complete shard file.
    """
    path = str(part.path)
    try:
        header_bytes = _header_bytes(part.read(0, 8), path)
        header = _decoded(part.read(8, header_bytes), path)
        state, tensors, slices = _parse_header(header, 8 + header_bytes, path)
        bounds = [bound for piece in slices for bound in block_bounds(piece)]
        size, sha256, crcs = hash_blocks(part.chunks(), bounds)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; expected a shard file"
        ) from error
    end = slices[-1].end_offset if slices else 8 + header_bytes
    if size != end:
        raise CheckpointError(f"{path}: {size} bytes, expected {end} as in its header")
    described, done = [], 0
    for piece in slices:
        blocks = len(piece.block_crc32)
        values = piece.to_json() | {"block_crc32": tuple(crcs[done : done + blocks])}
        described.append(TensorSlice(**values))
        done += blocks
    return ShardFile(key, size, sha256, tuple(described)), state, tensors


def parse_shard_header(
    data: memoryview, path: str
) -> tuple[TrainingState, tuple[TensorSlice, ...]]:
    """The state and the slices in file order of a shard file in memory. Their CRCs are zero.

    Raises `CheckpointError` if the file does not begin with a `ShardLayout.header`, or is too short.
    """
    end = 8 + _header_bytes(data, path)
    state, _, slices = _parse_header(_decoded(bytes(data[8:end]), path), end, path)
    if slices and slices[-1].end_offset > len(data):
        raise CheckpointError(
            f"{path}: {len(data)} bytes, expected {slices[-1].end_offset} as in its header"
        )
    return state, tuple(slices)


def block_bounds(piece: TensorSlice) -> list[tuple[int, int]]:
    """Byte ranges `[start, end)` in the file of the slice's blocks, in order."""
    step = piece.block_rows * piece.row_bytes
    end = piece.end_offset
    return [(start, min(start + step, end)) for start in range(piece.offset, end, step)]


def hash_blocks(
    chunks: Iterable[memoryview], bounds: Sequence[tuple[int, int]]
) -> tuple[int, str, list[int]]:
    """Size, SHA-256 and one CRC-32 per block of a byte stream. Reads the stream once.

    `bounds` are byte ranges, ascending and disjoint. If the stream ends inside a block, its CRC covers the bytes so far.
    """
    digest = hashlib.sha256()
    crcs = [0] * len(bounds)
    position = block = 0
    for chunk in chunks:
        digest.update(chunk)
        end = position + len(chunk)
        while block < len(bounds) and bounds[block][0] < end:
            low, high = max(bounds[block][0], position), min(bounds[block][1], end)
            crcs[block] = zlib_ng.crc32(chunk[low - position : high - position], crcs[block])
            if bounds[block][1] > end:
                break
            block += 1
        position = end
    return position, digest.hexdigest(), crcs


def _tensors(tensors: Mapping[str, tuple[torch.Tensor, Sequence[int], int]]) -> list[Tensor]:
    described = []
    for name in sorted(tensors):
        rows, shape, _ = tensors[name]
        if rows.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{name}: {rows.dtype}, expected {'/'.join(DTYPE_BYTES)}")
        described.append(Tensor(name, _DTYPE_NAMES[rows.dtype], tuple(shape)))
    return described


def _entries(
    kept: Mapping[str, LocalRows], order: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The header's entry of each tensor, the first row and global shape of each, and the bytes of all tensors."""
    entries: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    offset = 0
    for name in order:
        rows, shape, first_row = kept[name]
        dtype = _DTYPE_NAMES.get(rows.dtype)
        fits = rows.dim() == len(shape) >= 1 and tuple(rows.shape[1:]) == tuple(shape[1:])
        if dtype is None or not fits or not 0 <= first_row <= shape[0] - len(rows):
            raise CheckpointError(
                f"{name}: {rows.dtype} rows of shape {tuple(rows.shape)} from row {first_row} "
                f"do not fit; expected rows of a {'/'.join(DTYPE_BYTES)} tensor of shape {tuple(shape)}"
            )
        end = offset + rows.numel() * rows.element_size()
        entries[name] = {"dtype": dtype, "shape": list(rows.shape), "data_offsets": [offset, end]}
        whole[name] = [first_row, *shape]
        offset = end
    return entries, whole, offset


def _header_bytes(first: bytes | memoryview, path: str) -> int:
    """Length of the header's text in bytes, from the first eight bytes of a file."""
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= _HEADER_BYTES_MAX:
        raise CheckpointError(f"{path}: not a safetensors file; expected a shard file")
    return length


def _decoded(text: bytes, path: str) -> dict[str, Any]:
    try:
        header = from_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its safetensors header is not JSON; expected a JSON object"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header; expected a JSON object")
    return header


def _parse_header(
    header: dict[str, Any], base: int, path: str
) -> tuple[TrainingState, tuple[Tensor, ...], list[TensorSlice]]:
    """The state, all tensors, and the slices in file order. Their CRCs are zero."""
    try:
        metadata = header.pop("__metadata__")
        if metadata["elastic_pt_schema"] != _HEADER_SCHEMA:
            raise CheckpointError(
                f"{path}: written with schema {metadata['elastic_pt_schema']!r:.40}; "
                f"expected {_HEADER_SCHEMA!r}"
            )
        state = TrainingState.from_json(metadata["state"])
        tensors = _TENSORS.validate_json(metadata["tensors"])
        whole = from_json(metadata["rows"])
        slices = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first_row, *shape = whole[name]
            rows = entry["shape"][0]
            start, end = entry["data_offsets"]
            if not (0 <= start < end <= _SHARD_BYTES_MAX and 0 < rows <= end - start):
                raise ValueError("more than a file can hold")
            row_bytes = (end - start) // rows
            block_rows = rows_per_block(row_bytes, rows)
            crcs = (0,) * -(-rows // block_rows)
            piece = TensorSlice(
                name,
                entry["dtype"],
                tuple(shape),
                first_row,
                first_row + rows,
                base + start,
                block_rows,
                crcs,
            )
            if entry["shape"][1:] != shape[1:] or piece.end_offset != base + end:
                raise CheckpointError(
                    f"{path}: the header has two shapes of {name}; expected equal ones"
                )
            slices.append(piece)
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        ZeroDivisionError,
        AttributeError,
    ) as error:
        raise CheckpointError(
            f"{path}: its safetensors header was not written by this project; expected a shard file"
        ) from error
    return state, tensors, slices
