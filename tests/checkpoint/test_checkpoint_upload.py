"""Uploading: any step may be the last one, and what was not finished never counts."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.layout import (
    CheckpointReference,
    Part,
    checkpoint_directory,
    manifest_key,
    part_key,
    shard_key,
)
from elastic_pt.checkpoint.restore import newest_usable, read_manifest, verify
from elastic_pt.checkpoint.retention import leftovers, listed_directories, remove
from elastic_pt.checkpoint.upload import (
    StagedShard,
    Uploader,
    collect,
    publish_manifest,
    upload_shard,
)
from elastic_pt.errors import AlreadyExists, CheckpointError, StoreError
from elastic_pt.store.port import Store
from tests.checkpoint.world import (
    RUN_ID,
    collected,
    expected_digest,
    full_tensors,
    memory_store,
    stage,
    training_state,
    write_checkpoint,
)

SMALL = {"b": (3,), "w": (4, 2)}
DIRECTORY = checkpoint_directory(50, 2, "ffff0000")
WAIT_S = 20.0


class Crash(Exception):
    """The process ends here."""


class FailingStore:
    """A store whose n-th change crashes, before or after it takes effect; `gate` runs before each change."""

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

    def write(self, key: str, source: bytes | Path) -> None:
        self._change(lambda: self._store.write(key, source))

    def delete(self, key: str) -> None:
        self._change(lambda: self._store.delete(key))


def attempt(store: Store, shards: list[StagedShard]) -> CheckpointReference:
    """Upload all shards and publish, as agents do, in one thread."""
    for shard in shards:
        upload_shard(store, shard)
    return publish_manifest(store, collected(store, DIRECTORY, len(shards)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("crash_at", range(5))
def test_a_crash_between_any_two_steps_leaves_nothing_that_counts(
    tmp_path: Path, crash_at: int, after: bool
) -> None:
    """Wherever the upload dies, the committed checkpoint stays the newest, a part has its file, a retry works."""
    store = memory_store()
    old = write_checkpoint(store, tmp_path, full_tensors(SMALL, seed=1), 2, step=40)
    tensors = full_tensors(SMALL, seed=2)
    shards = stage(tmp_path, tensors, 2, DIRECTORY, training_state(50))
    failing = FailingStore(store, crash_at, after)
    with pytest.raises(Crash):
        attempt(failing, shards)
    assert newest_usable(store, [old], RUN_ID, "full").passed_over == ()
    for shard in shards:
        key = part_key(DIRECTORY, shard.rank)
        if store.size(key) is not None:
            part = Part.from_bytes(store.read(key))
            assert hashlib.sha256(store.read(part.file.key)).hexdigest() == part.file.sha256
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
    """Two shards, two parts and a manifest are all the changes an attempt makes."""
    store = FailingStore(memory_store())
    attempt(store, stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50)))
    assert store.changes == 5


def test_publishing_twice_gives_the_same_reference(tmp_path: Path) -> None:
    """A committing agent that lost the response may do it again; a different manifest is refused."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    reference = attempt(store, shards)
    parts = collected(store, DIRECTORY, 2)
    assert publish_manifest(store, list(reversed(parts))) == reference
    with pytest.raises(AlreadyExists):
        publish_manifest(store, [replace(part, run_id="another") for part in parts])


def test_parts_of_one_checkpoint_agree(tmp_path: Path) -> None:
    """Parts with another state, run or directory, a missing rank, or no part at all are not published."""
    store = memory_store()
    for shard in stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50)):
        upload_shard(store, shard)
    parts = collected(store, DIRECTORY, 2)
    other = replace(parts[1], state=training_state(50, rows_seen=1))
    stranger = replace(parts[1], run_id="another")
    for wrong in (
        [parts[0], other],
        [parts[0], stranger],
        parts[:1],
        parts[1:],
        [parts[0]] * 2,
        [],
    ):
        with pytest.raises(CheckpointError):
            publish_manifest(store, wrong)
    assert store.size(manifest_key(DIRECTORY)) is None


def test_a_file_lost_before_the_manifest_stops_it(tmp_path: Path) -> None:
    """The manifest is not written while a shard it names is missing or has another size."""
    store = memory_store()
    for shard in stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50)):
        upload_shard(store, shard)
    store.write(shard_key(DIRECTORY, 1), b"short")
    with pytest.raises(CheckpointError, match="5 bytes in the store"):
        publish_manifest(store, collected(store, DIRECTORY, 2))
    assert store.size(manifest_key(DIRECTORY)) is None


class Clock:
    """A clock that only waiting moves; `events` happen at their second."""

    def __init__(self, events: dict[float, Callable[[], object]] | None = None) -> None:
        self.now_s = 100.0
        self._events = dict(events or {})

    def now(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for due in [at for at in self._events if at <= self.now_s - 100.0]:
            self._events.pop(due)()


def collect_by(
    clock: Clock, store: Store, *, ranks: int, deadline_s: float, stop_after_s: float = float("inf")
) -> list[Part] | None:
    """Collect the parts of `DIRECTORY` on a clock that only waiting moves."""
    return collect(
        store,
        DIRECTORY,
        range(ranks),
        deadline_s=deadline_s,
        now=clock.now,
        wait=clock.wait,
        should_stop=lambda: clock.now_s > stop_after_s,
    )


def test_collecting_waits_for_late_parts(tmp_path: Path) -> None:
    """Parts may come in any order and late; they are returned by rank."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50))
    clock = Clock({0.3 * (3 - n): lambda n=n: upload_shard(store, shards[n]) for n in range(3)})  # type: ignore[misc]
    parts = collect_by(clock, store, ranks=3, deadline_s=5.0)
    assert parts is not None
    assert [part.rank for part in parts] == [0, 1, 2]
    assert clock.now_s < 101.5


def test_nobody_waits_for_a_shard_that_will_not_come(tmp_path: Path) -> None:
    """A node that cannot upload its shard leaves a note, and collecting ends there instead of at its deadline."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    upload_shard(store, shards[0])
    shards[1].path.write_bytes(b"not a shard")
    failures: list[int] = []
    with Uploader(
        store, on_uploaded=lambda _: None, on_failed=lambda step, _: failures.append(step)
    ) as uploader:
        uploader.submit(shards[1])
        assert uploader.drain(WAIT_S)
    assert failures == [50]
    clock = Clock()
    with pytest.raises(
        CheckpointError, match=r"shard-00001.safetensors: its node could not upload it"
    ):
        collect_by(clock, store, ranks=2, deadline_s=600.0)
    assert clock.now_s < 101.0


def test_collecting_has_an_end(tmp_path: Path) -> None:
    """A part that never comes is an error that names it and the limit; a stop request ends the wait at once."""
    store = memory_store()
    upload_shard(store, stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))[0])
    clock = Clock()
    with pytest.raises(CheckpointError, match=r"part-00001.json: not there after 5.0 s"):
        collect_by(clock, store, ranks=2, deadline_s=5.0)
    assert clock.now_s == pytest.approx(105.0, abs=0.3)
    stopped = collect_by(clock, store, ranks=2, deadline_s=5.0, stop_after_s=106.0)
    assert stopped is None


def test_parts_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    """A part that is damaged, or was copied from another rank or checkpoint, is named and not used."""
    store = memory_store()
    shards = stage(tmp_path, full_tensors(SMALL), 2, DIRECTORY, training_state(50))
    parts = [upload_shard(store, shard) for shard in shards]
    elsewhere = checkpoint_directory(50, 2, "eeee0000")
    file = replace(parts[0].file, key=shard_key(elsewhere, 0))
    foreign = Part(RUN_ID, elsewhere, 0, file, parts[0].state)
    for wrong in (parts[1].to_bytes(), foreign.to_bytes(), b"{", parts[0].to_bytes()[:-1]):
        store.write(part_key(DIRECTORY, 0), wrong)
        with pytest.raises(CheckpointError, match=r"part-00000.json"):
            collected(store, DIRECTORY, 2)


def test_a_part_is_never_overwritten(tmp_path: Path) -> None:
    """Two agents that claim one rank of one checkpoint cannot both succeed."""
    store = memory_store()
    ours = stage(tmp_path, full_tensors(SMALL, seed=1), 1, DIRECTORY, training_state(50))[0]
    upload_shard(store, ours)
    upload_shard(store, ours)
    theirs = stage(tmp_path, full_tensors(SMALL, seed=2), 1, DIRECTORY, training_state(50))[0]
    with pytest.raises(AlreadyExists):
        upload_shard(store, theirs)


class Heard:
    """What the uploader said."""

    def __init__(self) -> None:
        self.uploaded: list[int] = []
        self.failed: list[tuple[int, Exception]] = []

    def uploader(self, store: Store, queue_limit: int = 64) -> Uploader:
        return Uploader(
            store,
            on_uploaded=self.uploaded.append,
            on_failed=lambda step, error: self.failed.append((step, error)),
            queue_limit=queue_limit,
        )


def test_the_uploader_uploads_and_removes(tmp_path: Path) -> None:
    """Every submitted shard arrives with its part, is reported, and its local file is gone."""
    store, heard = memory_store(), Heard()
    tensors = full_tensors(SMALL)
    shards = stage(tmp_path, tensors, 3, DIRECTORY, training_state(50))
    with heard.uploader(store) as uploader:
        for shard in shards:
            uploader.submit(shard)
        assert uploader.drain(WAIT_S)
    assert (heard.uploaded, heard.failed) == ([50, 50, 50], [])
    assert list(tmp_path.iterdir()) == []
    reference = publish_manifest(store, collected(store, DIRECTORY, 3))
    manifest = read_manifest(store, reference, RUN_ID)
    assert digest(store, manifest) == expected_digest(tensors)


def test_failed_uploads_are_reported_and_make_room(tmp_path: Path) -> None:
    """A store that gives up, a damaged file and even a bug are reported, memory is freed, the thread goes on."""
    store, heard = memory_store(), Heard()

    def give_up() -> None:
        if len(heard.failed) == 0:
            raise StoreError("deadline passed")

    shards = stage(tmp_path, full_tensors(SMALL), 3, DIRECTORY, training_state(50))
    shards[1].path.write_bytes(b"damaged")
    with heard.uploader(FailingStore(store, gate=give_up)) as uploader:
        for shard in shards:
            uploader.submit(shard)
        assert uploader.drain(WAIT_S)
    assert [type(error) for _, error in heard.failed] == [StoreError, CheckpointError]
    assert heard.uploaded == [50]
    assert list(tmp_path.iterdir()) == []


def test_the_queue_is_bounded_and_can_be_dropped(tmp_path: Path) -> None:
    """A full queue refuses at once; dropping it frees its files; the shard under way is finished."""
    store, heard = memory_store(), Heard()
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert release.wait(WAIT_S)

    shards = stage(tmp_path, full_tensors(SMALL), 4, DIRECTORY, training_state(50))
    uploader = heard.uploader(FailingStore(store, gate=hold), queue_limit=2)
    uploader.submit(shards[0])
    assert started.wait(WAIT_S)
    uploader.submit(shards[1])
    uploader.submit(shards[2])
    with pytest.raises(CheckpointError, match="2 shards are waiting"):
        uploader.submit(shards[3])
    assert not uploader.drain(0.0)
    assert uploader.discard() == 2
    assert not uploader.drain(0.0)
    assert not uploader.close()
    release.set()
    assert uploader.close(WAIT_S)
    assert heard.uploaded == [50]
    assert [path.name for path in tmp_path.iterdir()] == [shards[3].path.name]
    with pytest.raises(CheckpointError, match="ended"):
        uploader.submit(shards[3])


def test_a_shard_that_had_no_room_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """A worker's missing shard becomes a note in the bucket, and the committer gives the checkpoint up at once."""
    store = memory_store()
    told: list[int] = []
    with Uploader(store, on_uploaded=told.append, on_failed=lambda *_: None) as uploader:
        uploader.submit(StagedShard(Path(), RUN_ID, DIRECTORY, 0, missing="no room"))
        assert uploader.drain(10)
    assert told == [50]
    with pytest.raises(CheckpointError, match="could not upload"):
        collected(store, DIRECTORY, 1)
