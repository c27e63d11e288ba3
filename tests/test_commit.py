"""What the committing node lets go, and what a failed delete may not do."""

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_pt.checkpoint.upload import upload_shard
from elastic_pt.commit import Committer, directory_of
from elastic_pt.elastic.log import RunLog
from elastic_pt.elastic.records import Generation, Quarantine
from elastic_pt.errors import StoreError
from elastic_pt.store.open import open_store
from tests.checkpoint.world import full_tensors, stage, training_state
from tests.elastic.bucket import WatchedStore
from tests.elastic.world import generation, member

SMALL = {"head.weight": (7, 3)}


class Bucket(WatchedStore):
    """A bucket that lets a test act just before a record is appended, or refuses deletes."""

    before_append: Callable[[], None] | None = None
    refuses_deletes = False

    def create(self, key: str, data: bytes) -> None:
        """See `Store`."""
        if key.startswith("log/") and self.before_append is not None:
            act, self.before_append = self.before_append, None
            act()
        super().create(key, data)

    def delete(self, key: str) -> None:
        """See `Store`."""
        if self.refuses_deletes:
            raise StoreError("deletes are refused")
        super().delete(key)


class World:
    """A committing node alone: commits checkpoints of one shard, and hears what its committer tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Bucket(open_store(f"file://{folder}/run"))
        self.log = RunLog(self.store, writer="a")
        members = (replace(member("a"), incarnation="abcd"),)
        self.generation: Generation = replace(generation("a"), members=members)
        self.log.append(lambda _: self.generation, generation=0)
        self.done: dict[int, threading.Event] = {}
        self.failures: list[Exception] = []
        self.untidy: queue.Queue[Exception] = queue.Queue()
        self.committer = Committer(
            self.store,
            self.log,
            keep=2,
            last_step=99,
            deadline_s=5.0,
            superseded=lambda _: False,
            on_commit=lambda _: None,
            on_done=lambda step: self.done[step].set(),
            on_failure=lambda _, error: self.failures.append(error),
            on_untidy=self.untidy.put,
        )

    def directory(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return directory_of(self.generation, step)

    def commit(self, step: int) -> None:
        """Upload and commit a checkpoint; returns once the workers are released."""
        run_id = self.log.refresh().run_id
        for shard in stage(
            self.folder,
            full_tensors(SMALL),
            1,
            self.directory(step),
            training_state(step),
            run_id,
        ):
            upload_shard(self.store, shard)
        self.done[step] = threading.Event()
        self.committer.expect(step, self.generation)
        assert self.done[step].wait(20)

    def stored(self) -> set[str]:
        """The checkpoint directories in the bucket."""
        return {key.rpartition("/")[0] for key in self.store.keys("ckpt/")}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A node with two commits behind it."""
    world = World(tmp_path)
    world.commit(10)
    world.commit(20)
    return world


def test_only_what_the_winning_append_lets_go_is_deleted(world: World) -> None:
    """A QUARANTINE that comes between two attempts of a COMMIT saves the checkpoint that is needed instead."""
    other = RunLog(world.store.store, writer="b")
    bad = Quarantine(world.directory(20), "rotten")

    def quarantine() -> None:
        other.append(lambda _: bad, generation=1)

    world.store.before_append = quarantine
    world.commit(30)
    world.committer.close(20)
    kept = {each.directory for each in world.log.refresh().checkpoints}
    assert kept == {world.directory(30), world.directory(10)}
    assert kept <= world.stored()
    assert world.failures == []
    assert world.untidy.empty()


def test_a_failed_delete_is_no_failed_commit_and_is_made_up_for(world: World) -> None:
    """A commit whose tidying fails counts, releases the workers, and a later commit removes what was left."""
    world.store.refuses_deletes = True
    world.commit(30)
    assert world.log.refresh().checkpoints[0].step == 30
    world.commit(40)
    for _ in (30, 40):
        world.untidy.get(timeout=20)
    world.store.refuses_deletes = False
    world.commit(50)
    world.committer.close(20)
    assert world.failures == []
    assert world.stored() == {world.directory(40), world.directory(50)}
