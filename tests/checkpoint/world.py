"""Helpers that write checkpoints with the real code and read them with any number of workers."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from elastic_pt.checkpoint.layout import (
    FullManifest,
    TrainingState,
    checkpoint_directory,
    parse_directory,
)
from elastic_pt.checkpoint.nodes import NodeNotice
from elastic_pt.checkpoint.publish import Collector, publish_manifest
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.shard_file import LocalRows
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, SnapshotBuffers
from elastic_pt.checkpoint.upload import (
    KeptShard,
    UploadedShard,
    publish_node,
    upload_shard,
)
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

RUN_ID = "run-7f3a"
SHAPES = {"head.weight": (7, 3), "norm.weight": (5,), "one.bias": (1, 2), "wide": (9, 80_000)}


def memory_store() -> Store:
    """A new empty store."""
    return open_store(f"memory://{uuid.uuid4().hex}/run", timeout_s=5.0)


def training_state(step: int = 40, **changes: object) -> TrainingState:
    """A plausible state after `step` steps."""
    values: dict[str, object] = {
        "step": step,
        "optimizer_step": step,
        "skipped_in_a_row": 0,
        "data_fingerprint": "d" * 64,
        "tokenizer_sha256": "e" * 64,
        "config_fingerprint": "f" * 64,
    }
    return TrainingState(**(values | changes))  # type: ignore[arg-type]


def full_tensors(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The whole weights and both moments of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def row_range(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows of one rank as Shard(0) cuts them: equal chunks, the last ranks may get none."""
    chunk = -(-rows // world_size)
    return min(rows, rank * chunk), min(rows, (rank + 1) * chunk)


def local_rows(
    tensors: Mapping[str, torch.Tensor], rank: int, world_size: int
) -> dict[str, LocalRows]:
    """The rows of one rank."""
    cut = {name: row_range(len(full), rank, world_size) for name, full in tensors.items()}
    return {
        name: LocalRows(full[slice(*cut[name])], tuple(full.shape), cut[name][0])
        for name, full in tensors.items()
    }


def write_buffer(
    folder: Path,
    rank: int,
    rows: Mapping[str, tuple[torch.Tensor, Sequence[int], int]],
    state: TrainingState,
    generation: int = 1,
) -> Path:
    """The buffer file in which a worker keeps this state for a checkpoint."""
    buffers = SnapshotBuffers(folder, generation, rank, rows)
    for old in folder.glob(f"snapshot-g{generation}-rank-{rank}-*"):
        old.unlink()
    buffers.allocate(1)
    return buffers.write(state).path(folder)


def write_shard(
    path: Path, rows: Mapping[str, tuple[torch.Tensor, Sequence[int], int]], state: TrainingState
) -> None:
    """The shard file of a worker, as it is in the bucket."""
    buffer = write_buffer(path.parent, 0, rows, state, generation=99)
    path.write_bytes(buffer.read_bytes()[PAYLOAD_OFFSET:])
    buffer.unlink()


def stage(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    world_size: int,
    directory: str,
    state: TrainingState,
    run_id: str = RUN_ID,
    workers: int = 1,
) -> list[KeptShard]:
    """Keep the state of every rank in a buffer in a local folder. A node has `workers` ranks, the last maybe fewer."""
    kept = []
    generation, home = parse_directory(directory).generation, folder / directory.rpartition("/")[2]
    home.mkdir(exist_ok=True)
    for rank in range(world_size):
        rows = local_rows(tensors, rank, world_size)
        path = write_buffer(home, rank, rows, state, generation)
        kept.append(
            KeptShard(path, run_id, directory, rank, nodes_of(world_size, workers)[rank // workers])
        )
    return kept


def nodes_of(world_size: int, workers: int = 1) -> list[range]:
    """The ranks of each node's workers."""
    firsts = range(0, world_size, workers)
    return [range(first, min(first + workers, world_size)) for first in firsts]


def upload_nodes(store: Store, shards: Sequence[KeptShard]) -> list[UploadedShard]:
    """Upload all shards and write the record and the notice of each node, as agents do, in one thread."""
    uploaded: list[UploadedShard] = []
    for shard in shards:
        uploaded.append(upload_shard(store, shard))
        if shard.rank == shard.ranks[-1]:
            publish_node(store, uploaded[-len(shard.ranks) :])
    return uploaded


def collected(store: Store, directory: str, world_size: int, workers: int = 1) -> list[NodeNotice]:
    """The notices of all nodes, which already exist."""
    collector = Collector(store, directory, nodes_of(world_size, workers))
    assert collector.read_more()
    return collector.notices


def write_checkpoint(
    store: Store,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    world_size: int,
    *,
    step: int = 40,
    generation: int = 1,
    nonce: str = "0a1b2c3d",
    run_id: str = RUN_ID,
    workers: int = 1,
) -> Checkpoint:
    """Write a checkpoint of these tensors. Returns it as in a COMMIT record."""
    directory = checkpoint_directory(step, generation, nonce)
    shards = stage(
        folder, tensors, world_size, directory, training_state(step), run_id, workers=workers
    )
    upload_nodes(store, shards)
    for shard in shards:
        shard.path.unlink()
    return publish_manifest(store, collected(store, directory, world_size, workers))


def load_world(store: Store, manifest: FullManifest, world_size: int) -> dict[str, torch.Tensor]:
    """Load the rows of each of `world_size` ranks, and join them."""
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in manifest.tensors}
    for rank in range(world_size):
        wanted, into = {}, {}
        for name, entry in manifest.tensors.items():
            first, end = row_range(entry.global_shape[0], rank, world_size)
            wanted[name] = (first, end)
            into[name] = torch.full((end - first, *entry.global_shape[1:]), float("nan"))
        load_rows(store, manifest, wanted, into)
        for name, rows in into.items():
            pieces[name].append(rows)
    return {name: torch.cat(rows) for name, rows in pieces.items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal shapes, types and bytes (so NaN equals itself and -0 is not 0)."""
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def expected_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The documented digest of whole tensors."""
    result = hashlib.sha256()
    names = sorted(name.removeprefix("model/") for name in tensors if name.startswith("model/"))
    order = [f"model/{name}" for name in names]
    order += [f"{kind}/{name}" for name in names for kind in ("exp_avg", "exp_avg_sq")]
    for name in filter(tensors.__contains__, order):
        result.update(tensors[name].to(torch.float32).numpy().astype("<f4").tobytes())
    return result.hexdigest()


def flip(store: Store, key: str, byte: int, bit: int) -> bytes:
    """Flip one bit of an object. Returns the bytes before that."""
    data = store.read(key)
    store.write(key, data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :])
    return data
