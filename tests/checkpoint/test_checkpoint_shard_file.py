"""A worker's shard file: plain safetensors, with a CRC for each block."""

import contextlib
import hashlib
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastic_pt.checkpoint.layout import ShardFile, Tensor, TrainingState
from elastic_pt.checkpoint.shard_file import (
    LocalRows,
    block_bounds,
    describe_shard,
    hash_blocks,
)
from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import FilePart
from tests.checkpoint.world import full_tensors, local_rows, same_bits, training_state, write_shard

KEY = "ckpt/0000000040-g1-0a1b2c3d/shard-00001.safetensors"


def described(path: Path) -> tuple[ShardFile, TrainingState, tuple[Tensor, ...]]:
    """The description of a whole file; of 8 bytes if it is missing."""
    size = path.stat().st_size if path.exists() else 8
    return describe_shard(FilePart(path, 0, size), KEY)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """The safetensors library reads rows of every supported type and layout, bit for bit."""
    grid = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    tensors = {
        "model/float32": LocalRows(grid, (12, 10), 6),
        "model/bfloat16": LocalRows(grid[:3].to(torch.bfloat16), (3, 10), 0),
        "model/not_contiguous": LocalRows(grid.t(), (10, 6), 0),
        "model/vector": LocalRows(torch.randn(7, dtype=torch.float64), (9,), 1),
        "model/whole_numbers": LocalRows(torch.arange(5), (5,), 0),
        "model/parameter": LocalRows(torch.nn.Parameter(torch.randn(2, 2)), (2, 2), 0),
    }
    path = tmp_path / "shard.safetensors"
    write_shard(path, tensors, training_state())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensors[name].rows.detach().contiguous()) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata()["elastic_pt_schema"] == "3"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_description_matches_the_file(tmp_path: Path) -> None:
    """State, row ranges, SHA-256 and the CRC of every block are those of the bytes on disk."""
    path = tmp_path / "shard.safetensors"
    tensors = local_rows(full_tensors(), 1, 2)
    write_shard(path, tensors, training_state())
    file, state, _ = described(path)
    data = path.read_bytes()
    assert (file.key, file.size, state) == (KEY, len(data), training_state())
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    kept = {name: rows for name, rows in tensors.items() if len(rows.rows)}
    assert {piece.name for piece in file.slices} == kept.keys()
    assert "model/one.bias" not in kept
    for piece in file.slices:
        rows, shape, first_row = kept[piece.name]
        assert (piece.global_shape, piece.first_row) == (tuple(shape), first_row)
        assert piece.end_row == first_row + len(rows)
        assert data[piece.offset : piece.end_offset] == rows.numpy().tobytes()
        crcs = [zlib.crc32(data[start:end]) for start, end in block_bounds(piece)]
        assert list(piece.block_crc32) == crcs
    assert max(len(piece.block_crc32) for piece in file.slices) > 1


def test_a_worker_without_rows_still_reports_the_state(tmp_path: Path) -> None:
    """If there are fewer rows than workers, the files of the last workers are empty and valid."""
    path = tmp_path / "shard.safetensors"
    write_shard(path, {"model/x": (torch.empty(0, 3), (2, 3), 4)}, training_state())
    file, state, tensors = described(path)
    assert (file.slices, state) == ((), training_state())
    assert tensors == (Tensor("model/x", "F32", (2, 3)),)
    assert load_file(path) == {}


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 299), max_size=12), st.integers(1, 64))
def test_hashes_do_not_depend_on_the_chunks(data: bytes, cuts: list[int], chunk: int) -> None:
    """CRCs and SHA-256 of a stream depend only on its bytes, not on chunks or on gaps between blocks."""
    edges = sorted({cut for cut in cuts if cut <= len(data)})
    bounds = list(zip(edges[0::2], edges[1::2], strict=False))
    view = memoryview(data)
    chunks = [view[start : start + chunk] for start in range(0, len(data), chunk)]
    size, sha256, crcs = hash_blocks(chunks, bounds)
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert crcs == [zlib.crc32(data[start:end]) for start, end in bounds]


@pytest.mark.parametrize(
    "rows",
    [
        (torch.randn(3, 4), (5, 4), 3),
        (torch.randn(3, 4), (5, 5), 0),
        (torch.randn(3, 4), (5,), 0),
        (torch.randn(3, 4), (5, 4), -1),
        (torch.tensor(1.0), (), 0),
        (torch.randn(3, 4).to(torch.float16), (5, 4), 0),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, rows: tuple[torch.Tensor, tuple[int, ...], int]
) -> None:
    """A worker cannot save rows that do not fit the description of their tensor."""
    with pytest.raises(CheckpointError, match="model/x"):
        write_shard(tmp_path / "shard", {"model/x": rows}, training_state())
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    """A file that is truncated, longer, empty, of another kind, or missing is a `CheckpointError`."""
    good = tmp_path / "good"
    write_shard(good, {"model/x": (torch.randn(8, 8), (8, 8), 0)}, training_state())
    data = good.read_bytes()
    bad = tmp_path / "bad"
    for changed in (b"", data[:4], data[:40], data[:-1], data + b"x", b"\xff" * 64, b"[]" * 40):
        bad.write_bytes(changed)
        with pytest.raises(CheckpointError):
            described(bad)
    bad.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        described(bad)
    save_file({"model/x": torch.ones(3)}, bad)
    with pytest.raises(CheckpointError, match="not written by this project"):
        described(bad)
    save_file({"model/x": torch.ones(3)}, bad, {"elastic_pt_schema": "9"})
    with pytest.raises(CheckpointError, match="schema"):
        described(bad)


def test_damaged_headers_never_crash_the_agent(tmp_path: Path) -> None:
    """With any damaged byte in the header, the result is a description or a `CheckpointError`."""
    path = tmp_path / "shard"
    write_shard(path, {"model/x": (torch.randn(3, 2), (3, 2), 0)}, training_state())
    data = path.read_bytes()
    for position in range(len(data) - 24):
        for value in (0x00, 0x22, 0x2D, 0x39, data[position] ^ 1):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            with contextlib.suppress(CheckpointError):
                described(path)
