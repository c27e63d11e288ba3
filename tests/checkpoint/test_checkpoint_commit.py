"""Commits and deletes: the COMMIT in the log decides what is deleted."""

import threading
from pathlib import Path

import pytest

from elastic_pt.checkpoint.commit import directory_of
from elastic_pt.errors import StoreError
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Quarantine
from elastic_pt.store.open import open_store
from tests.checkpoint.committing import WAIT_S, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run that keeps two checkpoints."""
    return World(tmp_path, keep=2)


def test_a_checkpoint_kept_after_a_quarantine_is_not_deleted(world: World) -> None:
    """The first try would drop a checkpoint. The retry after a QUARANTINE keeps it, and it is not deleted."""
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
    """The operator of a request finds the answer in the newest COMMIT, also after later ones that met no request."""
    for step, request in ((1, -1), (2, 7), (3, -1)):
        world.commit(step, request)
        assert world.log.view.commit is not None
        assert world.log.view.commit.request == (-1 if step == 1 else 7)
    world.committer.close(WAIT_S)


def test_expired_checkpoints_are_removed_after_workers_are_released(world: World) -> None:
    """The workers are released at the COMMIT. The oldest checkpoint is deleted after that, while they train."""
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
    assert world.untidied == []


def test_a_failed_delete_fails_no_commit_and_is_retried(world: World) -> None:
    """A failed delete is reported as such, not as a failed commit, and is retried after a later commit."""
    refuse = [True]

    def before(verb: str, key: str) -> None:
        if verb == "delete" and refuse[0]:
            raise StoreError("the bucket refuses deletes")

    world.store.before = before  # type: ignore[method-assign]
    for step in (1, 2, 3):
        world.commit(step)
    while not world.untidied:
        threading.Event().wait(0.01)
    assert world.failed == []
    assert [each.step for each in world.commits] == [1, 2, 3]
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
