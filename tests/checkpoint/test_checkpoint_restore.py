"""Restore: any number of workers reads a checkpoint of any number of writers. It gets the right bits or an error."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_pt.checkpoint.index import READS, read_index, read_manifest, read_root
from elastic_pt.checkpoint.layout import (
    FullManifest,
    ShardFile,
    TensorSlice,
    manifest_key,
    shard_key,
)
from elastic_pt.checkpoint.nodes import NodeRecord, RootManifest, node_key, notice_key
from elastic_pt.checkpoint.restore import (
    load_rows,
    plan_reads,
)
from elastic_pt.checkpoint.verify import newest_usable, quick_check, verify
from elastic_pt.errors import AccessDenied, CheckpointError
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store
from tests.checkpoint.world import (
    RUN_ID,
    SHAPES,
    flip,
    full_tensors,
    load_world,
    memory_store,
    same_bits,
    training_state,
    write_checkpoint,
)

SMALL = {"b": (3,), "w": (4, 2)}
shapes = st.dictionaries(
    st.sampled_from(["a", "b.weight", "c", "layers.0.w"]),
    st.lists(st.integers(1, 23), min_size=1, max_size=3).map(tuple),
    min_size=1,
)
worlds = st.integers(1, 9)


@pytest.fixture
def store() -> Store:
    """An empty store."""
    return memory_store()


def load_all(store: Store, manifest: FullManifest) -> None:
    """Load every row of every tensor."""
    load_world(store, manifest, 1)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=shapes,
    written_by=worlds,
    workers=st.integers(1, 4),
    read_by=worlds,
    seed=st.integers(0, 99),
)
def test_any_number_of_workers_restores_a_checkpoint_of_any_number(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    written_by: int,
    workers: int,
    read_by: int,
    seed: int,
) -> None:
    """Resharding from W to W' workers keeps every bit, also with odd sizes and fewer rows than workers."""
    store = memory_store()
    tensors = full_tensors(shapes, seed)
    reference = write_checkpoint(store, tmp_path, tensors, written_by, workers=workers)
    quick_check(store, reference, RUN_ID)
    manifest = read_manifest(store, reference, RUN_ID)
    restored = load_world(store, manifest, read_by)
    assert restored.keys() == tensors.keys()
    assert all(same_bits(restored[name], tensors[name]) for name in tensors)
    assert manifest.state == training_state()


@pytest.mark.parametrize(("written_by", "read_by"), [(1, 5), (4, 3), (9, 1), (2, 7)])
def test_tensors_of_several_blocks_are_resharded(
    store: Store, tmp_path: Path, written_by: int, read_by: int
) -> None:
    """Row ranges that begin and end inside blocks keep their bits."""
    tensors = full_tensors(SHAPES)
    manifest = read_manifest(store, write_checkpoint(store, tmp_path, tensors, written_by), RUN_ID)
    restored = load_world(store, manifest, read_by)
    assert all(same_bits(restored[name], tensors[name]) for name in tensors)


def test_special_values_and_types_survive(store: Store, tmp_path: Path) -> None:
    """NaN payloads, infinities, negative zero, subnormals and every stored type keep their bits."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, -float("inf"), 1.0])
    odd.view(torch.int32)[0] |= 0x1234
    tensors = {
        "model/a": odd,
        "model/b": odd.to(torch.bfloat16),
        "exp_avg/c": odd.double(),
        "exp_avg_sq/d": torch.tensor([-(1 << 62), 3]),
    }
    manifest = read_manifest(store, write_checkpoint(store, tmp_path, tensors, 2), RUN_ID)
    into = {name: torch.empty_like(full) for name, full in tensors.items()}
    load_rows(store, manifest, {name: (0, len(full)) for name, full in tensors.items()}, into)
    assert all(same_bits(into[name], tensors[name]) for name in tensors)


def test_parameters_and_views_are_filled_in_place(store: Store, tmp_path: Path) -> None:
    """Rows are written into an autograd leaf and into a strided view, and neither is replaced by a copy."""
    tensors = full_tensors(SMALL)
    manifest = read_manifest(store, write_checkpoint(store, tmp_path, tensors, 2), RUN_ID)
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    strided = torch.zeros(2, 4).t()
    load_rows(store, manifest, {"model/w": (0, 4)}, {"model/w": parameter})
    load_rows(store, manifest, {"exp_avg/w": (0, 4)}, {"exp_avg/w": strided})
    assert same_bits(parameter.detach(), tensors["model/w"])
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert torch.equal(strided, tensors["exp_avg/w"])


def test_rows_that_do_not_exist_are_refused(store: Store, tmp_path: Path) -> None:
    """Unknown tensors, unknown rows, and targets with another shape or type are errors."""
    manifest = read_manifest(
        store, write_checkpoint(store, tmp_path, full_tensors(SMALL), 2), RUN_ID
    )
    for name, rows, target in (
        ("model/none", (0, 1), torch.empty(1)),
        ("model/w", (3, 5), torch.empty(2, 2)),
        ("model/w", (-1, 1), torch.empty(2, 2)),
        ("model/w", (0, 2), torch.empty(3, 2)),
        ("model/w", (0, 2), torch.empty(2, 2, dtype=torch.float64)),
    ):
        with pytest.raises(CheckpointError, match=name):
            load_rows(store, manifest, {name: rows}, {name: target})
    load_rows(store, manifest, {"model/w": (9, 9)}, {"model/w": torch.empty(0, 2)})


@st.composite
def planned(draw: st.DrawFn) -> tuple[FullManifest, dict[str, tuple[int, int]], int]:
    """A manifest with random slices and block sizes, wanted rows, and a limit for requests."""
    files: list[list[TensorSlice]] = [[] for _ in range(draw(worlds))]
    offsets = [256] * len(files)
    wanted = {}
    for name in ("model/a", "model/b", "exp_avg/a"):
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 3))
        cuts = draw(st.lists(st.integers(0, rows), max_size=len(files) - 1))
        edges = sorted({0, rows, *cuts})
        for rank, (first, end) in enumerate(itertools.pairwise(edges)):
            block_rows = draw(st.integers(1, end - first))
            crcs = (0,) * -(-(end - first) // block_rows)
            piece = TensorSlice(
                name, "F32", (rows, columns), first, end, offsets[rank], block_rows, crcs
            )
            files[rank].append(piece)
            offsets[rank] = piece.end_offset
        first = draw(st.integers(0, rows))
        wanted[name] = (first, draw(st.integers(first, rows)))
    directory = "ckpt/0000000040-g1-0a1b2c3d"
    shards = tuple(
        ShardFile(shard_key(directory, rank), offsets[rank], "a" * 64, tuple(pieces))
        for rank, pieces in enumerate(files)
    )
    manifest = FullManifest(RUN_ID, directory, shards, training_state())
    return manifest, wanted, draw(st.integers(1, 200))


@settings(deadline=None)
@given(planned())
def test_a_plan_covers_the_wanted_rows_once(
    drawn: tuple[FullManifest, dict[str, tuple[int, int]], int],
) -> None:
    """Each wanted row is in exactly one block, each block has wanted rows, and requests are as large as allowed."""
    manifest, wanted, limit = drawn
    reads = plan_reads(manifest, wanted, limit)
    rows: dict[str, list[int]] = {name: [] for name in wanted}
    for read in reads:
        assert read.end - read.start <= limit or len(read.blocks) == 1
        assert (read.start, read.end) == (read.blocks[0].start, read.blocks[-1].end)
        for left, right in zip(read.blocks, read.blocks[1:], strict=False):
            assert left.end == right.start
        for block in read.blocks:
            first, end = wanted[block.tensor]
            assert block.first_row < end
            assert first < block.end_row
            rows[block.tensor] += range(max(first, block.first_row), min(end, block.end_row))
    for name, (first, end) in wanted.items():
        assert sorted(rows[name]) == list(range(first, end))
    for left, right in itertools.pairwise(reads):
        assert (left.key, left.end) <= (right.key, right.start)
        touching = left.key == right.key and left.end == right.start
        assert not touching or right.blocks[0].end - left.start > limit


def test_every_flipped_bit_is_found(store: Store, tmp_path: Path) -> None:
    """After a bit flip in any byte of a checkpoint, `verify` names the object, and a load of this byte fails."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)
    manifest = read_manifest(store, reference, RUN_ID)
    assert verify(store, reference, RUN_ID) == []
    for rank in range(2):
        used = min(piece.offset for piece in manifest.files[rank].slices)
        for key in (shard_key(reference.directory, rank), node_key(reference.directory, rank)):
            for byte in range(store.size(key) or 0):
                good = flip(store, key, byte, byte % 8)
                problems = verify(store, reference, RUN_ID)
                assert problems
                assert all(key in problem for problem in problems)
                if key.endswith(".safetensors") and byte >= used:
                    with pytest.raises(CheckpointError, match=rf"{key}: \w+/\w block 0 \(rows"):
                        load_all(store, manifest)
                store.write(key, good)
    for byte in range(reference.manifest_size):
        good = flip(store, manifest_key(reference.directory), byte, byte % 8)
        with pytest.raises(CheckpointError):
            quick_check(store, reference, RUN_ID)
        assert verify(store, reference, RUN_ID)
        store.write(manifest_key(reference.directory), good)
    assert verify(store, reference, RUN_ID) == []


def test_a_load_ignores_damage_in_bytes_it_does_not_use(store: Store, tmp_path: Path) -> None:
    """A worker restores its rows when only other rows are damaged."""
    tensors = full_tensors(SMALL)
    reference = write_checkpoint(store, tmp_path, tensors, 2)
    manifest = read_manifest(store, reference, RUN_ID)
    store.delete(shard_key(reference.directory, 1))
    into = torch.empty(2, 2)
    load_rows(store, manifest, {"model/w": (0, 2)}, {"model/w": into})
    assert same_bits(into, tensors["model/w"][:2])
    with pytest.raises(CheckpointError, match="missing"):
        load_rows(store, manifest, {"model/w": (0, 3)}, {"model/w": torch.empty(3, 2)})
    store.write(shard_key(reference.directory, 1), b"cut")
    with pytest.raises(CheckpointError, match="the file ends before it"):
        load_rows(store, manifest, {"model/w": (0, 3)}, {"model/w": torch.empty(3, 2)})


def test_rows_are_verified_before_they_are_used(store: Store, tmp_path: Path) -> None:
    """A block with a wrong CRC leaves no byte in the tensor."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 1)
    manifest = read_manifest(store, reference, RUN_ID)
    (key, piece), *_ = manifest.tensors["model/w"].pieces
    flip(store, key, piece.offset + 5, 3)
    into = torch.zeros(4, 2)
    with pytest.raises(CheckpointError):
        load_rows(store, manifest, {"model/w": (0, 4)}, {"model/w": into})
    assert torch.equal(into, torch.zeros(4, 2))


def test_bytes_of_a_failed_request_are_wiped(store: Store, tmp_path: Path) -> None:
    """Blocks are read into the tensor's memory; after a wrong CRC or a file that is too short nothing of them is left."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 1)
    manifest = read_manifest(store, reference, RUN_ID)
    (key, piece), *_ = manifest.tensors["model/w"].pieces
    flip(store, key, piece.offset + 5, 3)
    wrong = store.read(key)
    for content in (wrong, wrong[: piece.offset + 7]):
        store.write(key, content)
        into = torch.ones(4, 2)
        with pytest.raises(CheckpointError):
            load_rows(store, manifest, {"model/w": (0, 4)}, {"model/w": into})
        assert torch.equal(into, torch.zeros(4, 2))


def two_checkpoints(store: Store, folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """Step 50 and step 40, of the same shapes, written by three ranks."""
    old = write_checkpoint(store, folder, full_tensors(SMALL, seed=1), 3, step=40)
    new = write_checkpoint(store, folder, full_tensors(SMALL, seed=2), 3, step=50)
    return new, old


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "grown", "manifest missing"])
def test_wrong_sizes_fall_back_before_loading(store: Store, tmp_path: Path, damage: str) -> None:
    """A truncated, empty, missing or longer object fails the quick check. The previous checkpoint is used."""
    new, old = two_checkpoints(store, tmp_path)
    key = shard_key(new.directory, 1)
    data = store.read(key)
    if damage == "manifest missing":
        key = manifest_key(new.directory)
    if damage.endswith("missing"):
        store.delete(key)
    else:
        store.write(key, {"cut": data[:-1], "empty": b"", "grown": data + b"\0"}[damage])
    with pytest.raises(CheckpointError, match=key):
        quick_check(store, new, RUN_ID)
    usable = newest_usable(store, [new, old], RUN_ID)
    assert usable.manifest.directory == old.directory
    assert usable.manifest.step == 40
    [(passed_over, reason)] = usable.passed_over
    assert passed_over == new
    assert key in reason
    assert verify(store, new, RUN_ID)


def test_swapped_shards_are_found_by_reading(store: Store, tmp_path: Path) -> None:
    """Shards of equal size that were swapped between two checkpoints fail the full check and the load."""
    new, old = two_checkpoints(store, tmp_path)
    keys = shard_key(new.directory, 0), shard_key(old.directory, 0)
    left, right = store.read(keys[0]), store.read(keys[1])
    assert len(left) == len(right)
    store.write(keys[0], right)
    store.write(keys[1], left)
    quick_check(store, new, RUN_ID)
    with pytest.raises(CheckpointError, match=keys[0]):
        load_all(store, read_manifest(store, new, RUN_ID))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        newest_usable(store, [new, old], RUN_ID)
    store.write(keys[1], right)
    full = newest_usable(store, [new, old], RUN_ID)
    assert full.manifest.directory == old.directory
    assert "SHA-256" in full.passed_over[0][1]


def test_shards_swapped_between_ranks_are_found(store: Store, tmp_path: Path) -> None:
    """Swapped files of two ranks of one checkpoint are detected."""
    tensors = {"model/w": torch.randn(4, 2)}
    reference = write_checkpoint(store, tmp_path, tensors, 2)
    keys = [shard_key(reference.directory, rank) for rank in range(2)]
    data = [store.read(key) for key in keys]
    store.write(keys[0], data[1])
    store.write(keys[1], data[0])
    assert len(verify(store, reference, RUN_ID)) >= 2
    with pytest.raises(CheckpointError):
        load_all(store, read_manifest(store, reference, RUN_ID))


def test_replayed_and_foreign_manifests_are_refused(store: Store, tmp_path: Path) -> None:
    """An older manifest under a newer name, one of another attempt, and one of another run are refused."""
    new, old = two_checkpoints(store, tmp_path)
    good = store.read(manifest_key(new.directory))
    store.write(manifest_key(new.directory), store.read(manifest_key(old.directory)))
    with pytest.raises(CheckpointError, match=r"SHA-256|size"):
        read_manifest(store, new, RUN_ID)
    # The reference has the hash of the old bytes. They are still refused, because they name another directory.
    forged = replace(old, step=new.step, directory=new.directory)
    with pytest.raises(CheckpointError, match=f"written for {old.directory}"):
        read_manifest(store, forged, RUN_ID)
    store.write(manifest_key(new.directory), good)
    with pytest.raises(CheckpointError, match="belongs to run"):
        read_manifest(store, new, "run-of-somebody-else")
    assert read_manifest(store, new, RUN_ID).step == 50


def test_only_the_committed_manifest_counts(store: Store, tmp_path: Path) -> None:
    """A well-formed manifest of the same directory, run and size is refused if it is not the committed one."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)
    root = read_root(store, reference, RUN_ID)
    other = replace(root, state=training_state(data_fingerprint="c" * 64)).to_bytes()
    assert len(other) == reference.manifest_size
    store.write(manifest_key(reference.directory), other)
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_manifest(store, reference, RUN_ID)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 41},
        {"generation": 2},
        {"manifest_size": 0},
        {"manifest_size": 1 << 40},
        {"manifest_sha256": ""},
        {"directory": "ckpt/../0000000040-g1-0a1b2c3d"},
    ],
)
def test_a_commit_that_contradicts_its_directory_is_refused(
    store: Store, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Step, generation, size and hash in the log must agree with the directory's name and its manifest."""
    checkpoint = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)
    with pytest.raises(CheckpointError):
        read_root(store, replace(checkpoint, **changes), RUN_ID)


def vouched_for(
    store: Store, reference: Checkpoint, change: Callable[[NodeRecord], NodeRecord]
) -> Checkpoint:
    """A checkpoint whose manifest has the hash of a changed record of the first node."""
    root = read_root(store, reference, RUN_ID)
    assert isinstance(root, RootManifest)
    share, *others = root.nodes
    record = change(NodeRecord.from_bytes(store.read(share.key))).to_bytes()
    store.write(share.key, record)
    share = replace(share, size=len(record), sha256=hashlib.sha256(record).hexdigest())
    data = replace(root, nodes=(share, *others)).to_bytes()
    store.write(manifest_key(reference.directory), data)
    sha256 = hashlib.sha256(data).hexdigest()
    return replace(reference, manifest_size=len(data), manifest_sha256=sha256)


def test_verify_checks_the_recorded_crcs_too(store: Store, tmp_path: Path) -> None:
    """A load with a wrong CRC in a node record fails even if the bytes are right, so `verify` reports it."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 1)

    def wrong_crc(record: NodeRecord) -> NodeRecord:
        first, *others = record.files[0].slices
        first = replace(first, block_crc32=(first.block_crc32[0] ^ 1,))
        return replace(record, files=(replace(record.files[0], slices=(first, *others)),))

    problems = verify(store, vouched_for(store, reference, wrong_crc), RUN_ID)
    key = shard_key(reference.directory, 0)
    assert any(
        problem.startswith(key) and "block 0: wrong CRC-32" in problem for problem in problems
    )


def test_a_node_record_that_differs_from_the_manifest_is_refused(
    store: Store, tmp_path: Path
) -> None:
    """A record without a slice, or of another run, is refused even if its hash is in the manifest."""
    tensors = full_tensors(SMALL)
    for change in (
        lambda record: replace(
            record, files=(replace(record.files[0], slices=record.files[0].slices[1:]),)
        ),
        lambda record: replace(record, run_id="another"),
    ):
        reference = write_checkpoint(store, tmp_path, tensors, 2)
        vouched = vouched_for(store, reference, change)
        key = node_key(reference.directory, 0)
        with pytest.raises(CheckpointError, match=f"{key}: differs from the manifest"):
            read_manifest(store, vouched, RUN_ID)
        with pytest.raises(CheckpointError, match=f"{key}: differs from the manifest"):
            read_index(store, vouched, RUN_ID, {"model/w": (0, 1)})
        for gone in store.keys(reference.directory):
            store.delete(gone)


def test_a_reader_reads_only_the_records_of_its_rows(store: Store, tmp_path: Path) -> None:
    """A reader of rows on two nodes reads two records. The records of other nodes may be missing."""
    tensors = full_tensors({"b": (3,), "w": (8, 2)})
    reference = write_checkpoint(store, tmp_path, tensors, 8, workers=2)
    store.delete(node_key(reference.directory, 2))
    wanted = {"model/w": (6, 8), "model/b": (0, 1), "exp_avg/b": (0, 0)}
    index = read_index(store, reference, RUN_ID, wanted)
    into = {
        name: torch.zeros(end - first, *tensors[name].shape[1:])
        for name, (first, end) in wanted.items()
    }
    load_rows(store, index, wanted, into)
    for name, (first, end) in wanted.items():
        assert same_bits(into[name], tensors[name][first:end])
    assert index.state == training_state()
    with pytest.raises(CheckpointError, match=r"node-00002\.json: missing"):
        read_index(store, reference, RUN_ID, {"model/w": (0, 8)})


def test_rows_outside_the_index_are_refused(store: Store, tmp_path: Path) -> None:
    """A load fails if the records of its rows were not read. It does not leave old values in the tensor."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)
    index = read_index(store, reference, RUN_ID, {"model/w": (0, 2)})
    with pytest.raises(CheckpointError, match="model/w: 2 of rows 0 to 3 are in the index"):
        load_rows(store, index, {"model/w": (0, 3)}, {"model/w": torch.empty(3, 2)})


def test_the_error_has_all_reasons_if_no_checkpoint_is_usable(store: Store, tmp_path: Path) -> None:
    """If every checkpoint is bad, the error has all reasons. If none was committed, it says that."""
    new, old = two_checkpoints(store, tmp_path)
    store.delete(shard_key(new.directory, 2))
    store.write(manifest_key(old.directory), b"")
    with pytest.raises(CheckpointError, match=r"step 50: .*missing.*step 40: .*size"):
        newest_usable(store, [new, old], RUN_ID)
    with pytest.raises(CheckpointError, match="none was committed"):
        newest_usable(store, [], RUN_ID)


def test_a_store_error_is_not_a_bad_checkpoint(tmp_path: Path) -> None:
    """If access is denied, no checkpoint counts as bad. The store's error is raised."""
    store = memory_store()
    references = two_checkpoints(store, tmp_path)

    class Denied:
        url = store.url

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            raise AccessDenied("credentials expired")

        create, write, size, keys, delete = (
            store.create,
            store.write,
            store.size,
            store.keys,
            store.delete,
        )

    with pytest.raises(AccessDenied):
        newest_usable(Denied(), references, RUN_ID)
    with pytest.raises(AccessDenied):
        verify(Denied(), references[0], RUN_ID)


def test_notices_are_not_needed_once_the_manifest_exists(store: Store, tmp_path: Path) -> None:
    """A published checkpoint is usable without its notices."""
    reference = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)
    for rank in range(2):
        store.delete(notice_key(reference.directory, rank))
    assert verify(store, reference, RUN_ID) == []
    assert newest_usable(store, [reference], RUN_ID).passed_over == ()


class FlippingOnTheWay:
    """A store of which each object's first reads come with a wrong bit."""

    def __init__(self, store: Store, wrong_reads: int) -> None:
        self._store = store
        self._left: dict[str, int] = {}
        self._wrong_reads = wrong_reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes, of which the last one is wrong until this has been read often enough."""
        data = bytearray(self._store.read(key, start, end))
        self._left.setdefault(key, self._wrong_reads)
        if self._left[key] > 0:
            self._left[key] -= 1
            data[-1] ^= 1
        return bytes(data)


def test_what_changed_on_the_way_is_read_again(store: Store, tmp_path: Path) -> None:
    """F35: a good checkpoint is not given up because of bits that flip between the bucket and a reader; people are told."""
    tensors = full_tensors(SMALL)
    reference = write_checkpoint(store, tmp_path, tensors, 2)
    flipping: Any = FlippingOnTheWay(store, READS - 1)
    with capture_logs() as told:
        found = load_world(flipping, read_manifest(flipping, reference, RUN_ID), 1)
    assert {each["event"] for each in told} == {"checkpoint_bytes_wrong"}
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    damaged: Any = FlippingOnTheWay(store, READS)
    with capture_logs() as told, pytest.raises(CheckpointError, match="wrong SHA-256"):
        read_manifest(damaged, reference, RUN_ID)
    assert told == []
