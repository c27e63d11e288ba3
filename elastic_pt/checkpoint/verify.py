"""Verifies a checkpoint: by file sizes before a run resumes, by every byte for `checkpoints --verify`.

    quick_check     checks the root and the size of every file
    verify          checks every byte; returns the problems
    verify_share    the same for a random share of the bytes
    newest_usable   returns the first checkpoint without a problem, with every byte checked

`index` describes the errors. Runs in agents and the command line.
"""

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint.index import (
    REQUEST_THREADS,
    full_manifest,
    read_bytes,
    read_root,
)
from elastic_pt.checkpoint.layout import FullManifest, Part, ShardFile, part_key
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.restore import (
    READ_BYTES_MAX,
    Block,
    ReadRange,
    blocks_of,
    coalesce,
    read_blocks,
)
from elastic_pt.checkpoint.shard_file import block_bounds, hash_blocks
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store

_VERIFY_THREADS: Final = 4


@dataclass(frozen=True)
class UsableCheckpoint:
    """The newest checkpoint that passed the check, and the reason why each newer one failed."""

    manifest: FullManifest
    passed_over: tuple[tuple[Checkpoint, str], ...]


@dataclass(frozen=True)
class Verified:
    """The result of a check."""

    problems: tuple[str, ...]
    bytes: int
    """Size of all shard files; 0 if it is unknown, because the manifest or a node record is wrong."""
    compared_bytes: int
    """The part of `bytes` that was compared with its hashes."""

    @property
    def share(self) -> float:
        """Share of the bytes that was read, from 0 to 1."""
        return self.compared_bytes / self.bytes if self.bytes else 0.0


def quick_check(store: Store, checkpoint: Checkpoint, run_id: str) -> None:
    """Check the size of every file. Finds files that are missing or truncated.

    Costs one request per file. Raises `CheckpointError` with the first wrong file.
    """
    _check_sizes(store, read_root(store, checkpoint, run_id).sizes)


def _check_sizes(store: Store, expected: Sequence[tuple[str, int]]) -> None:
    with ThreadPoolExecutor(REQUEST_THREADS) as pool:
        sizes = pool.map(lambda file: store.size(file[0]), expected)
        for (key, size), found in zip(expected, sizes, strict=True):
            _check_size(key, size, found)


def verify(store: Store, checkpoint: Checkpoint, run_id: str) -> list[str]:
    """Read every byte of a checkpoint. Returns the problems; an empty list means that there are none.

    Checks the manifest against the commit, node records against the manifest, the tiling of every tensor, size
    and SHA-256 of every file, the CRC-32 of every block, and in schema 1 the part records that still exist.
    """
    return list(verify_share(store, checkpoint, run_id, share=1.0, seed=0).problems)


def verify_share(
    store: Store, checkpoint: Checkpoint, run_id: str, *, share: float, seed: int
) -> Verified:
    """Like `verify`, but with a `share` below 1 read only blocks that make up that share of the bytes, chosen by `seed`.

    Manifest, node records, tiling and the size of every file are always checked. No block covers the header of a
    file, so only a share of 1 reads it. The same seed chooses other blocks in another checkpoint.
    """
    assert 0.0 < share <= 1.0, f"share = {share}"
    try:
        root = read_root(store, checkpoint, run_id)
        manifest = full_manifest(store, root)
    except CheckpointError as error:
        return Verified((str(error),), 0, 0)
    size = sum(file.size for file in manifest.files)
    if share < 1.0:
        if problems := _size_problems(store, manifest):
            return Verified(tuple(problems), size, 0)
        draw = random.Random(f"{seed} {checkpoint.directory}")
        blocks = sampled_blocks(manifest, int(share * size), draw)
        compared_bytes = sum(block.end - block.start for _, block in blocks)
        return Verified(tuple(_block_problems(store, blocks)), size, compared_bytes)
    problems = _file_problems(store, manifest)
    if isinstance(root, FullManifest):
        problems += _part_problems(store, root)
    return Verified(tuple(problems), size, size)


def sampled_blocks(
    manifest: FullManifest, wanted_bytes: int, draw: random.Random
) -> list[tuple[str, Block]]:
    """Random blocks, at least one, of `wanted_bytes` or at most one block more, as `(file key, block)` in file order."""
    blocks = [
        (file.key, block)
        for file in manifest.files
        for piece in file.slices
        for block in blocks_of(piece)
    ]
    draw.shuffle(blocks)
    found, size = [], 0
    for key, block in blocks:
        found.append((key, block))
        size += block.end - block.start
        if size >= wanted_bytes:
            break
    return sorted(found, key=lambda item: (item[0], item[1].start))


def newest_usable(store: Store, checkpoints: Iterable[Checkpoint], run_id: str) -> UsableCheckpoint:
    """The first of `checkpoints` (committed ones, newest first) without a wrong byte.

    Raises `CheckpointError` with all reasons if there is none.
    """
    passed_over: list[tuple[Checkpoint, str]] = []
    for checkpoint in checkpoints:
        try:
            root = read_root(store, checkpoint, run_id)
            # Cheap: finds an incomplete checkpoint before it reads gigabytes.
            _check_sizes(store, root.sizes)
            manifest = full_manifest(store, root)
        except CheckpointError as error:
            passed_over.append((checkpoint, str(error)))
            continue
        problems = _file_problems(store, manifest)
        if not problems:
            return UsableCheckpoint(manifest, tuple(passed_over))
        passed_over.append((checkpoint, "; ".join(problems)))
    reasons = "; ".join(f"step {checkpoint.step}: {reason}" for checkpoint, reason in passed_over)
    raise CheckpointError(
        f"no usable checkpoint: {reasons or 'none was committed'}; expected at least one"
    )


def _check_size(key: str, expected: int, size: int | None) -> None:
    if size is None:
        raise CheckpointError(f"{key}: missing; expected {expected} bytes")
    if size != expected:
        raise CheckpointError(f"{key}: {size} bytes, expected {expected}")


def _size_problems(store: Store, manifest: FullManifest) -> list[str]:
    def problem_of(file: ShardFile) -> str:
        try:
            _check_size(file.key, file.size, store.size(file.key))
        except CheckpointError as error:
            return str(error)
        return ""

    return list(filter(None, in_order(manifest.files, problem_of, REQUEST_THREADS)))


def _block_problems(store: Store, blocks: Sequence[tuple[str, Block]]) -> list[str]:
    """The problems of these blocks: the first one of each request."""

    def problem_of(read: ReadRange) -> str:
        try:
            for _ in read_blocks(store, read):
                pass
        except CheckpointError as error:
            return str(error)
        return ""

    return list(filter(None, in_order(coalesce(blocks), problem_of, _VERIFY_THREADS)))


def _file_problems(store: Store, manifest: FullManifest) -> list[str]:
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        found = list(pool.map(lambda file: _problems_of(store, file), manifest.files))
    return [problem for problems in found for problem in problems]


def _problems_of(store: Store, file: ShardFile) -> list[str]:
    starts = range(0, file.size, READ_BYTES_MAX)
    try:
        _check_size(file.key, file.size, store.size(file.key))
        chunks = (
            memoryview(read_bytes(store, file.key, start, min(start + READ_BYTES_MAX, file.size)))
            for start in starts
        )
        bounds = [bound for piece in file.slices for bound in block_bounds(piece)]
        size, sha256, crcs = hash_blocks(chunks, bounds)
        _check_size(file.key, file.size, size)
    except CheckpointError as error:
        return [str(error)]
    problems = (
        [] if sha256 == file.sha256 else [f"{file.key}: SHA-256 {sha256}, expected {file.sha256}"]
    )
    found = iter(crcs)
    for piece in file.slices:
        for index, crc in enumerate(piece.block_crc32):
            if next(found) != crc:
                problems.append(
                    f"{file.key}: {piece.name} block {index}: wrong CRC-32; expected that of its record"
                )
    return problems


def _part_problems(store: Store, manifest: FullManifest) -> list[str]:
    """Parts are not read after the manifest exists. A missing part is accepted, a changed part is reported."""
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
            problems.append(f"{key}: differs from the manifest; expected the same file and state")
    return problems
