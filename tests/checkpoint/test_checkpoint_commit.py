"""Commits and deletes: what is deleted follows from the COMMIT that is in the log."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.checkpoint.commit import Committer, directory_of
from elastic_pt.errors import StoreError
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Generation, Quarantine
from elastic_pt.store.open import open_store
from tests.checkpoint.world import full_tensors, stage, training_state, upload_nodes
from tests.membership.bucket import WatchedStore
from tests.membership.world import generation, member

WAIT_S = 20.0


class DisturbedStore(WatchedStore):
    """A store in which something happens just before a key of some kind is created or deleted."""

    before: Callable[[str, str], None] = staticmethod(lambda verb, key: None)  # type: ignore[assignment]

    def _ask(self, verb: str, key: str, *arguments: Any) -> Any:
        if verb in ("create", "delete"):
            self.before(verb, key)
        return super()._ask(verb, key, *arguments)


class World:
    """A run of one node with one worker whose checkpoints are committed one by one."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.store = DisturbedStore(open_store(f"file://{folder / 'run'}"))
        self.log = RunLog(self.store, writer="a")
        self.generation: Generation = replace(
            generation("a"), members=(replace(member("a"), incarnation="abcd"),)
        )
        self.log.append(lambda _: self.generation, generation=0)
        self.done: dict[int, threading.Event] = {}
        self.committed: list[Checkpoint] = []
        self.failed: list[int] = []
        self.untidy: list[Exception] = []
        self.committer = Committer(
            self.store,
            self.log,
            keep=keep,
            last_step=100,
            timeout_s=WAIT_S,
            superseded=lambda _: False,
            on_commit=self.committed.append,
            on_done=lambda step: self.done[step].set(),
            on_failure=lambda generation, step, error: self.failed.append(step),
            on_untidy=self.untidy.append,
        )

    def upload(self, step: int) -> None:
        """A worker's shard of a step reaches the bucket."""
        directory = directory_of(self.generation, step)
        run_id = self.log.view.run_id
        shards = stage(
            self.folder, full_tensors(), 1, directory, training_state(step), run_id=run_id
        )
        upload_nodes(self.store, shards)

    def commit(self, step: int, request: int = -1) -> None:
        """Take a step's checkpoint all the way; returns once the workers would be released."""
        self.upload(step)
        self.done[step] = threading.Event()
        self.committer.expect(step, self.generation, request)
        assert self.done[step].wait(WAIT_S)

    def there(self, step: int) -> bool:
        """Whether the files of a checkpoint are in the bucket."""
        return bool(self.store.keys(f"{directory_of(self.generation, step)}/"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run that keeps two checkpoints."""
    return World(tmp_path, keep=2)


def test_a_checkpoint_kept_after_a_quarantine_is_not_deleted(world: World) -> None:
    """An append that is retried behind a QUARANTINE keeps, and does not delete, what its first attempt would have dropped."""
    world.commit(1)
    world.commit(2)
    interfering = RunLog(open_store(world.store.url), writer="z")
    once = [Quarantine(directory_of(world.generation, 2), "torn")]

    def before(verb: str, key: str) -> None:
        if key.startswith("log/") and once:
            quarantine = once.pop()
            interfering.append(lambda _: quarantine, generation=1)

    world.store.before = before  # type: ignore[method-assign]
    world.commit(3)
    world.committer.close(WAIT_S)
    assert once == []
    assert [each.step for each in world.log.view.checkpoints] == [3, 1]
    assert world.there(1)
    assert world.there(3)


def test_a_commit_names_the_newest_request_that_was_met(world: World) -> None:
    """Who asked for a checkpoint finds the answer in the newest COMMIT, also after later ones that met nothing."""
    for step, request in ((1, -1), (2, 7), (3, -1)):
        world.commit(step, request)
        assert world.log.view.commit is not None
        assert world.log.view.commit.request == (-1 if step == 1 else 7)
    world.committer.close(WAIT_S)


def test_expired_checkpoints_are_removed_after_workers_are_released(world: World) -> None:
    """The workers are released at the COMMIT; only then, and without them, the oldest checkpoint goes."""
    released = threading.Event()

    def before(verb: str, key: str) -> None:
        if verb == "delete":
            assert released.wait(WAIT_S)

    world.store.before = before  # type: ignore[method-assign]
    for step in (1, 2, 3):
        world.commit(step)
    assert world.there(1)
    released.set()
    world.committer.close(WAIT_S)
    assert not world.there(1)
    assert world.there(2)
    assert world.untidy == []


def test_a_failed_delete_fails_no_commit_and_is_retried(world: World) -> None:
    """A failed delete has its own counter, and is done after a later commit."""
    refuse = [True]

    def before(verb: str, key: str) -> None:
        if verb == "delete" and refuse[0]:
            raise StoreError("the bucket refuses deletes")

    world.store.before = before  # type: ignore[method-assign]
    for step in (1, 2, 3):
        world.commit(step)
    while not world.untidy:
        threading.Event().wait(0.01)
    assert world.failed == []
    assert [each.step for each in world.committed] == [1, 2, 3]
    refuse[0] = False
    world.commit(4)
    world.committer.close(WAIT_S)
    assert (world.there(1), world.there(2), world.there(3)) == (False, False, True)


def test_stop_does_not_wait_for_deletes(world: World) -> None:
    """STOP follows the last COMMIT at once, even while deletes hang."""
    stuck = threading.Event()

    def before(verb: str, key: str) -> None:
        if verb == "delete":
            stuck.wait(WAIT_S)

    world.store.before = before  # type: ignore[method-assign]
    for step in (1, 2, 100):
        world.commit(step)
    world.done[100].clear()
    world.committer.finish(world.generation)
    assert world.done[100].wait(WAIT_S)
    assert world.log.view.stop is not None
    stuck.set()
    world.committer.close(WAIT_S)
