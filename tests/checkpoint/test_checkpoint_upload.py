"""Upload: the process may die at any step. An incomplete upload never counts."""

import hashlib
import mmap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_pt.checkpoint import upload
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.layout import (
    checkpoint_directory,
    manifest_key,
    shard_key,
)
from elastic_pt.checkpoint.nodes import (
    NodeNotice,
    NodeRecord,
    NodeRefusal,
    node_key,
    notice_key,
)
from elastic_pt.checkpoint.publish import Collector, ShareMissing, publish_manifest
from elastic_pt.checkpoint.retention import leftovers, listed_directories, remove
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, begin_buffer
from elastic_pt.checkpoint.upload import (
    KeptShard,
    Uploader,
    publish_node,
    upload_shard,
)
from elastic_pt.checkpoint.verify import newest_usable, verify
from elastic_pt.errors import AccessDenied, AlreadyExists, CheckpointError, StoreError
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import FilePart, Source, Store
from tests.checkpoint.world import (
    RUN_ID,
    collected,
    expected_digest,
    full_tensors,
    memory_store,
    nodes_of,
    stage,
    training_state,
    upload_nodes,
    write_buffer,
    write_checkpoint,
)

SMALL = {"b": (3,), "w": (4, 2)}
DIRECTORY = checkpoint_directory(50, 2, "ffff0000")
WAIT_S = 20.0


class Crash(Exception):
    """Simulates the end of the process."""


class FailingStore:
    """A store that crashes at the n-th change, before or after its effect. `gate` runs before each change."""

    def __init__(
        self,
        store: Store,
        crash_at: int = -1,
        after: bool = False,
        gate: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._crash_at, self._after, self._gate = store, crash_at, after, gate
        self.changes = 0
        self.url = store.url
        self.read, self.size, self.keys = store.read, store.size, store.keys

    def _change(self, change: Callable[[], None]) -> None:
        self._gate()
        crash = self.changes == self._crash_at
        self.changes += 1
        if not crash or self._after:
            change()
        if crash:
            raise Crash

    def create(self, key: str, data: bytes) -> None:
        self._change(lambda: self._store.create(key, data))

    def write(self, key: str, source: Source) -> None:
        self._change(lambda: self._store.write(key, source))

    def delete(self, key: str) -> None:
        self._change(lambda: self._store.delete(key))


def attempt(store: Store, shards: list[KeptShard]) -> Checkpoint:
    """Upload all shards and publish, as agents do, in one thread."""
    upload_nodes(store, shards)
    nodes = list(dict.fromkeys(shard.ranks for shard in shards))
    return publish_manifest(store, collected(store, DIRECTORY, len(shards), len(nodes[0])))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("crash_at", range(8))
def test_a_crash_at_any_step_leaves_no_valid_checkpoint(
    tmp_path: Path, crash_at: int, after: bool
) -> None:
    """After a crash at any step the committed checkpoint is the newest, each notice has its files, a retry works."""
    store = memory_store()
    old = write_checkpoint(store, tmp_path, full_tensors(SMALL, seed=1), 2, step=40)
    tensors = full_tensors(SMALL, seed=2)
    shards = stage(tmp_path, tensors, 3, DIRECTORY, training_state(50), workers=2)
    failing = FailingStore(store, crash_at, after)
    with pytest.raises(Crash):
        attempt(failing, shards)
    assert newest_usable(store, [old], RUN_ID).passed_over == ()
    for ranks in nodes_of(3, 2):
        key = notice_key(DIRECTORY, ranks.start)
        if store.size(key) is not None:
            share = NodeNotice.from_bytes(store.read(key)).share
            record = store.read(share.key)
            assert (len(record), hashlib.sha256(record).hexdigest()) == (share.size, share.sha256)
            for file in NodeRecord.from_bytes(record).files:
                assert hashlib.sha256(store.read(file.key)).hexdigest() == file.sha256
    assert leftovers(listed_directories(store), [old.directory], 2, 40) == []

    reference = attempt(store, shards)
    assert verify(store, reference, RUN_ID) == []
    manifest = read_manifest(store, reference, RUN_ID)
    assert digest(store, manifest) == expected_digest(tensors)

    torn = leftovers(listed_directories(store), [old.directory], 3, 60)
    assert torn == [DIRECTORY]
    remove(store, torn[0])
    assert store.keys(DIRECTORY) == []
    assert verify(store, old, RUN_ID) == []


def test_the_crash_test_reaches_every_change(tmp_path: Path) -> None:
    """An attempt makes these changes: three shards, records and notices of two nodes, and a manifest."""
    store = FailingStore(memory_store())
    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50), workers=2)
    attempt(store, shards)
    assert store.changes == 8


def test_publishing_twice_gives_the_same_checkpoint(tmp_path: Path) -> None:
    """A committing agent that did not get the answer may publish again. A different manifest is refused."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    reference = attempt(store, shards)
    notices = collected(store, DIRECTORY, 2)
    assert publish_manifest(store, list(reversed(notices))) == reference
    with pytest.raises(AlreadyExists):
        publish_manifest(store, [replace(notice, run_id="another") for notice in notices])


def test_notices_that_do_not_agree_are_not_published(tmp_path: Path) -> None:
    """Notices with different states, runs or tensors, without a node, or no notices are not published."""
    store = memory_store()
    upload_nodes(store, stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50)))
    notices = collected(store, DIRECTORY, 2)
    other = replace(notices[1], state=training_state(50, optimizer_step=49))
    stranger = replace(notices[1], run_id="another")
    reshaped = replace(notices[1], tensors_sha256="0" * 64)
    for wrong in (
        [notices[0], other],
        [notices[0], stranger],
        [notices[0], reshaped],
        notices[:1],
        notices[1:],
        [notices[0]] * 2,
        [],
    ):
        with pytest.raises(CheckpointError):
            publish_manifest(store, wrong)
    assert store.size(manifest_key(DIRECTORY)) is None


def test_a_checkpoint_without_all_rows_is_not_published(tmp_path: Path) -> None:
    """Missing rows, rows on two nodes, and a missing tensor are errors that name the tensor."""
    store = memory_store()
    upload_nodes(store, stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50)))
    notices = collected(store, DIRECTORY, 2)
    names = [tensor.name for tensor in notices[0].tensors]
    at = 2 * names.index("model/w")
    for rows, reason in (
        ((3, 4), "rows 2 to 3 are missing"),
        ((1, 4), "rows 1 to 2 are there twice"),
        ((2, 3), "rows 3 to 4 are missing"),
        ((0, 0), "rows 2 to 4 are missing"),
    ):
        share = notices[1].share
        share = replace(share, rows=(*share.rows[:at], *rows, *share.rows[at + 2 :]))
        with pytest.raises(CheckpointError, match=f"model/w: {reason}"):
            publish_manifest(store, [notices[0], replace(notices[1], share=share)])
    assert store.size(manifest_key(DIRECTORY)) is None


def test_a_tensor_that_no_worker_staged_is_detected(tmp_path: Path) -> None:
    """Each worker lists all tensors of the state, so a tensor without rows is detected."""
    store = memory_store()
    rows = {
        "model/w": (torch.ones(4, 2), (4, 2), 0),
        "model/b": (torch.ones(0), (3,), 3),
    }
    path = write_buffer(tmp_path, 0, rows, training_state(50))
    upload_nodes(store, [KeptShard(path, RUN_ID, DIRECTORY, 0, range(1))])
    with pytest.raises(CheckpointError, match="model/b: rows 0 to 3 are missing"):
        publish_manifest(store, collected(store, DIRECTORY, 1))


def test_a_node_record_needs_rows_that_join(tmp_path: Path) -> None:
    """A gap between a node's workers, another state, or a missing worker is detected before the record is written."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50), workers=3)
    first, middle, last = (upload_shard(store, shard) for shard in shards)
    gap = replace(middle, file=replace(middle.file, slices=()))
    other = replace(middle, state=training_state(50, optimizer_step=49))
    for wrong, reason in (
        ([first, gap, last], "are missing"),
        ([first, other, last], "differ in their training state"),
        ([first, last], "expected all shards of ranks 0 to 2"),
        ([middle, first, last], "expected all shards"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            publish_node(store, wrong)
    assert store.size(node_key(DIRECTORY, 0)) is None
    assert store.size(notice_key(DIRECTORY, 0)) is None


def test_a_truncated_shard_in_the_store_stops_its_node(tmp_path: Path) -> None:
    """A node checks the size of each uploaded shard before it writes its record."""

    class Cutting(FailingStore):
        def write(self, key: str, source: Source) -> None:
            self._store.write(key, b"short")

    shards = stage(tmp_path, full_tensors(SMALL), 1, DIRECTORY, training_state(50))
    with pytest.raises(CheckpointError, match="5 bytes in the store"):
        upload_shard(Cutting(memory_store()), shards[0])


def test_late_notices_are_read_in_order(tmp_path: Path) -> None:
    """Notices may come late and in any order. They are returned in the order of ranks, and each is read once."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50))
    collector = Collector(store, DIRECTORY, nodes_of(3))
    for number, missing in ((2, 0), (0, 1)):
        assert not collector.read_more()
        upload_nodes(store, shards[number : number + 1])
        assert not collector.read_more()
        assert collector.missing == range(missing, missing + 1)
    upload_nodes(store, shards[1:2])
    assert collector.read_more()
    assert [notice.first_rank for notice in collector.notices] == [0, 1, 2]
    assert not collector.missing
    assert collector.read_more()


def test_a_refusal_ends_the_checkpoint(tmp_path: Path) -> None:
    """A node that cannot upload its shard writes a refusal. The committing node waits no longer."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    upload_nodes(store, shards[:1])
    content = shards[1].path.read_bytes()
    shards[1].path.write_bytes(content[:PAYLOAD_OFFSET] + b"\xff" * (len(content) - PAYLOAD_OFFSET))
    failures: list[int] = []
    uploader = Uploader(
        store, on_uploaded=lambda _: None, on_failed=lambda shard, _: failures.append(shard.step)
    )
    uploader.submit(shards[1])
    assert uploader.close(WAIT_S)
    assert failures == [50]
    with pytest.raises(
        ShareMissing, match=r"notice-00001.json: its node could not upload it: .*not a safetensors"
    ) as missing:
        collected(store, DIRECTORY, 2)
    assert missing.value.first_rank == 1


def test_notices_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    """A notice that is damaged, of other workers, or copied from another node or checkpoint is an error with its key."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    upload_nodes(store, shards)
    notices = collected(store, DIRECTORY, 2)
    elsewhere = checkpoint_directory(50, 2, "eeee0000")
    share = replace(notices[0].share, key=node_key(elsewhere, 0))
    foreign = replace(notices[0], directory=elsewhere, share=share)
    more = replace(notices[0].share, shard_sizes=(99, 99))
    for wrong in (
        notices[1].to_bytes(),
        foreign.to_bytes(),
        replace(notices[0], share=more).to_bytes(),
        b"{",
        notices[0].to_bytes()[:-1],
    ):
        store.write(notice_key(DIRECTORY, 0), wrong)
        with pytest.raises(CheckpointError, match=r"notice-00000.json"):
            collected(store, DIRECTORY, 2)


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    """Of two agents that write the record of the same ranks of a checkpoint, only one succeeds."""
    store = memory_store()
    ours = stage(tmp_path, full_tensors(SMALL, seed=1), 1, DIRECTORY, training_state(50))
    upload_nodes(store, ours)
    upload_nodes(store, ours)
    theirs = stage(tmp_path, full_tensors(SMALL, seed=2), 1, DIRECTORY, training_state(50))
    with pytest.raises(AlreadyExists):
        upload_nodes(store, theirs)


@pytest.mark.parametrize("moment", ["before", "hashing", "upload"])
def test_overwritten_buffer_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """If a worker writes into a kept buffer before, while it is hashed, or while it is uploaded, no record is written."""
    shard = stage(tmp_path, full_tensors(SMALL), 1, DIRECTORY, training_state(50))[0]

    def overwrite() -> None:
        with shard.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as buffer:
            begin_buffer(buffer, 51)

    gate = overwrite if moment == "upload" else lambda: None
    store = FailingStore(memory_store(), gate=gate)
    if moment == "before":
        overwrite()
    if moment == "hashing":
        hash_it = upload.describe_shard

        def described(part: FilePart, key: str) -> object:
            overwrite()
            return hash_it(part, key)

        monkeypatch.setattr(upload, "describe_shard", described)
    heard = Heard()
    uploader = heard.uploader(store)
    uploader.submit(shard)
    assert uploader.close(WAIT_S)
    assert ["overwritten" in str(error) for _, error in heard.failed] == [True]
    assert store.size(node_key(DIRECTORY, 0)) is None
    assert (store.size(shard_key(DIRECTORY, 0)) is None) == (moment != "upload")
    refusal = NodeRefusal.from_bytes(store.read(notice_key(DIRECTORY, 0)))
    assert "expected the state of step 50" in refusal.why


class Heard:
    """Collects the uploader's calls."""

    def __init__(self) -> None:
        self.uploaded: list[int] = []
        self.failed: list[tuple[int, Exception]] = []

    def uploader(self, store: Store) -> Uploader:
        return Uploader(
            store,
            on_uploaded=lambda shard: self.uploaded.append(shard.step),
            on_failed=lambda shard, error: self.failed.append((shard.step, error)),
        )


def test_the_uploader_uploads_every_shard(tmp_path: Path) -> None:
    """Each shard is uploaded and reported, and its buffer stays as it was. After the last one the node's record follows."""
    store, heard = memory_store(), Heard()
    tensors = full_tensors(SMALL)
    shards = stage(tmp_path, tensors, 3, DIRECTORY, training_state(50), workers=2)
    before = [shard.path.read_bytes() for shard in shards]
    uploader = heard.uploader(store)
    for shard in shards:
        uploader.submit(shard)
    assert uploader.close(WAIT_S)
    assert (heard.uploaded, heard.failed) == ([50, 50, 50], [])
    assert [shard.path.read_bytes() for shard in shards] == before
    reference = publish_manifest(store, collected(store, DIRECTORY, 3, 2))
    manifest = read_manifest(store, reference, RUN_ID)
    assert digest(store, manifest) == expected_digest(tensors)


def test_failed_uploads_are_reported(tmp_path: Path) -> None:
    """An error of the store and a damaged buffer are reported, once for each shard, and the thread continues."""
    store, heard = memory_store(), Heard()

    def give_up() -> None:
        if len(heard.failed) == 0:
            raise StoreError("deadline passed")

    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50))
    shards[1].path.write_bytes(b"damaged")
    uploader = heard.uploader(FailingStore(store, gate=give_up))
    for shard in shards:
        uploader.submit(shard)
    assert uploader.close(WAIT_S)
    assert [type(error) for _, error in heard.failed] == [StoreError, CheckpointError]
    assert heard.uploaded == [50]


def test_queued_shards_can_be_dropped(tmp_path: Path) -> None:
    """Dropping the queue returns its shards. The shard in progress is finished. A closed uploader accepts no shard."""
    store, heard = memory_store(), Heard()
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert release.wait(WAIT_S)

    shards = stage(tmp_path, full_tensors(SMALL), 4, DIRECTORY, training_state(50))
    uploader = heard.uploader(FailingStore(store, gate=hold))
    uploader.submit(shards[0])
    assert started.wait(WAIT_S)
    uploader.submit(shards[1])
    uploader.submit(shards[2])
    assert uploader.discard() == shards[1:3]
    assert not uploader.close(0.0)
    release.set()
    assert uploader.close(WAIT_S)
    assert heard.uploaded == [50]
    with pytest.raises(CheckpointError, match="ended"):
        uploader.submit(shards[3])


def test_a_shard_without_room_becomes_a_refusal(tmp_path: Path) -> None:
    """If a worker's shard is missing, its node writes a refusal and uploads nothing more of this checkpoint."""
    store, heard = memory_store(), Heard()
    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50), workers=3)
    uploader = heard.uploader(store)
    uploader.submit(shards[0])
    uploader.submit(replace(shards[1], path=Path(), missing="no room"))
    uploader.submit(shards[2])
    assert uploader.close(WAIT_S)
    assert (heard.uploaded, heard.failed) == ([50, 50, 50], [])
    assert store.size(shard_key(DIRECTORY, 2)) is None
    refusal = NodeRefusal.from_bytes(store.read(notice_key(DIRECTORY, 0)))
    assert (refusal.first_rank, refusal.why) == (0, "no room")
    with pytest.raises(ShareMissing, match="could not upload it: no room"):
        collected(store, DIRECTORY, 3, 3)


def test_a_refused_overwrite_of_the_same_shard_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an overwrite takes the right to delete, a second attempt accepts the bytes of the first, and no others."""

    class Refusing(FailingStore):
        def write(self, key: str, source: Source) -> None:
            if self.size(key) is not None:
                raise AccessDenied("no right to overwrite")
            super().write(key, source)

    monkeypatch.setattr(upload, "_READ_BYTES", 100)
    shard = stage(tmp_path, full_tensors(SMALL), 1, DIRECTORY, training_state(50))[0]
    store = memory_store()
    first = upload_shard(Refusing(store), shard)
    assert upload_shard(Refusing(store), shard) == first
    data = store.read(first.file.key)
    for wrong in (data[:-1] + b"!", data + b"!"):
        store.write(first.file.key, wrong)
        with pytest.raises(AccessDenied):
            upload_shard(Refusing(store), shard)
