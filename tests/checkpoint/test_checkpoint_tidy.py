"""`elastic-pt tidy` removes what the agents would remove, and agents with `checkpoint.tidy = false` remove nothing."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.checkpoint.commit import directory_of
from elastic_pt.checkpoint.layout import checkpoint_directory, shard_key
from elastic_pt.checkpoint.retention import UPLOAD_AGE_S, listed_directories
from elastic_pt.checkpoint.sweep import OVERTAKEN_AGE_S
from elastic_pt.checkpoint.tidy import kept_directories, tidy_directories, tidy_uploads
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import COMPLETED, Stop
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store, UnfinishedUpload
from tests.checkpoint.committing import WAIT_S, DisturbedStore, World
from tests.membership.world import generation

LATER_S = time.time() + 2 * OVERTAKEN_AGE_S


def tidied(store: Store, *, now_s: float = LATER_S, dry_run: bool = False) -> set[str]:
    """The directories that one call removes, with a log of its own, as in the command."""
    log = RunLog(store, writer="collector")
    found = tidy_directories(store, log, now_s=lambda: now_s, dry_run=dry_run)
    return {each.directory for each in found}


def eventful(folder: Path, *, tidy: bool) -> World:
    """A run with expired, permanent and quarantined checkpoints, and attempts of its three generations."""
    world = World(folder, keep=2, keep_every_steps=20, tidy=tidy)
    for step in (10, 20, 30):
        world.commit(step)
    world.upload(35)
    world.succeed()
    world.commit(40)
    world.upload(60)
    world.step_back()
    world.succeed()
    for step in (42, 45):
        world.commit(step)
    world.upload(46)
    world.commit(100)  # the last step: agents sweep at once
    world.committer.close(WAIT_S)
    assert world.untidied == []
    return world


def test_the_command_removes_what_agents_would_have_removed(tmp_path: Path) -> None:
    """The same run with `tidy = false`, tidied once, has the same directories as with `tidy = true`."""
    with_agents = eventful(tmp_path / "agents", tidy=True)
    alone = eventful(tmp_path / "command", tidy=False)
    before = listed_directories(alone.store)
    assert alone.store.requests["delete ckpt"] == 0
    assert len(before) == 10
    gone = tidied(alone.store, now_s=time.time())
    assert listed_directories(alone.store) == listed_directories(with_agents.store)
    assert gone == set(before) - set(listed_directories(alone.store))
    assert tidied(alone.store, now_s=time.time()) == set()


def test_an_overtaken_attempt_goes_an_hour_after_the_commit_of_a_later_step(tmp_path: Path) -> None:
    """The hour counts from the first COMMIT of a later step, so it needs no memory. What expired goes at once."""
    world = World(tmp_path, keep=1, tidy=False)
    for step in (10, 20):
        world.commit(step)
    world.upload(25)
    attempt = directory_of(world.generation, 25)
    world.commit(30)
    began_s = world.log.view.committed_at_s
    for step in (40, 50):
        world.commit(step)
    expired = {directory_of(world.generation, step) for step in (10, 20, 30)}
    assert tidied(world.store, now_s=began_s + OVERTAKEN_AGE_S - 1) == expired
    assert tidied(world.store, now_s=began_s + OVERTAKEN_AGE_S + 1) == {attempt}


def test_what_a_node_may_still_commit_stays(tmp_path: Path) -> None:
    """Attempts after the newest commit, of any generation, are not removed, however old; nor is a kept checkpoint."""
    world = World(tmp_path, keep=1, tidy=False)
    for step in (10, 20):
        world.commit(step)
    names = [checkpoint_directory(step, number, "beef") for step, number in ((21, 1), (5, 2))]
    for name in names:
        world.store.write(shard_key(name, 0), b"half")
    world.succeed()
    names.pop()  # generation 2 is the newest now, but it has not committed: step 5 is no later than that
    assert tidied(world.store) == set()
    assert set(names) <= set(listed_directories(world.store))


@pytest.mark.parametrize("reason", [COMPLETED, "diverged: loss is nan"])
def test_after_completion_all_goes_that_is_not_kept(tmp_path: Path, reason: str) -> None:
    """No record follows `completed`, so no attempt waits for its hour. A failed run may be reopened: there it waits."""
    world = World(tmp_path, keep=1, keep_every_steps=20, tidy=False)
    for step in (20, 30, 40):
        world.commit(step)
    for step in (35, 50):
        world.upload(step)
    world.log.append(lambda _: Stop(reason, 50), generation=1)
    attempts = {directory_of(world.generation, step) for step in (35, 50)}
    assert tidied(world.store, now_s=time.time()) == (attempts if reason == COMPLETED else set())
    kept = kept_directories(world.log, world.log.view)
    assert {directory_of(world.generation, step) for step in (20, 30, 40)} == kept
    assert kept <= set(listed_directories(world.store))


def test_a_new_generation_makes_the_command_decide_anew(tmp_path: Path) -> None:
    """If another generation begins between two removals, the log is read again before the next one."""
    world = World(tmp_path, keep=1, tidy=False)
    for step in (10, 20, 30, 40):
        world.commit(step)
    deleted: list[tuple[int, str]] = []

    def replace_generation(verb: str, key: str) -> None:
        deleted.append((log.view.generation_number, key.rpartition("/")[0]))
        if verb == "delete" and len({name for _, name in deleted}) == 1:
            number = world.log.refresh().generation_number
            found = replace(generation("a"), number=number + 1)
            if number == 1:
                world.log.append(lambda _: found, generation=number)

    store = DisturbedStore(open_store(f"file://{tmp_path / 'run'}"))
    store.before = replace_generation
    log = RunLog(store, writer="collector")
    gone = list(tidy_directories(store, log, now_s=lambda: LATER_S, dry_run=False))
    assert [each.directory for each in gone] == list(dict.fromkeys(name for _, name in deleted))
    assert len(gone) == 2
    assert next(number for number, name in deleted if name == gone[1].directory) == 2


def test_a_dry_run_removes_nothing_and_tells_the_same(tmp_path: Path) -> None:
    """`--dry-run` lists the directories and their files, and a call without it removes exactly these."""
    world = World(tmp_path, keep=1, tidy=False)
    for step in (10, 20, 30):
        world.commit(step)
    log = RunLog(world.store, writer="collector")
    told = list(tidy_directories(world.store, log, now_s=lambda: LATER_S, dry_run=True))
    assert world.store.requests["delete ckpt"] == 0
    done = list(tidy_directories(world.store, log, now_s=lambda: LATER_S, dry_run=False))
    assert told == done
    assert [each.files for each in told] == [4]


class Keeping(DisturbedStore):
    """A store with unfinished uploads."""

    uploads: tuple[UnfinishedUpload, ...] = ()

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """See `KeepsUnfinished`."""
        return [each for each in self.uploads if each.key.startswith(prefix)]

    def abandon(self, upload: UnfinishedUpload) -> None:
        """See `KeepsUnfinished`."""
        self.uploads = tuple(each for each in self.uploads if each != upload)

    def expires_unfinished(self, prefix: str) -> bool:
        """See `KeepsUnfinished`."""
        raise AssertionError


def upload(step: int, number: int, age_s: float) -> UnfinishedUpload:
    """An unfinished upload of a shard."""
    return UnfinishedUpload(shard_key(checkpoint_directory(step, number, "beef"), 0), "id", age_s)


@pytest.mark.parametrize("complete", [False, True])
def test_uploads_without_a_writer_are_ended(tmp_path: Path, complete: bool) -> None:
    """Those of replaced generations and those older than a day; on a completed run all below ckpt/."""
    world = World(tmp_path, keep=1, tidy=False)
    world.commit(10)
    world.succeed()
    old, aged, running = upload(10, 1, 5.0), upload(20, 2, UPLOAD_AGE_S), upload(20, 2, 5.0)
    other = UnfinishedUpload("events/a/00000000.jsonl", "id", UPLOAD_AGE_S)
    store = Keeping(open_store(f"file://{tmp_path / 'run'}"))
    store.uploads = (old, aged, running, other)
    if complete:
        world.log.append(lambda _: Stop(COMPLETED, 10), generation=2)

    def ended(**options: Any) -> Iterable[UnfinishedUpload]:
        return list(tidy_uploads(store, RunLog(store, writer="collector"), **options))

    expected = [old, aged, *([running] if complete else [])]
    assert ended(dry_run=True) == expected
    assert len(store.uploads) == 4
    assert ended(dry_run=False) == expected
    assert store.uploads == tuple(
        each for each in (old, aged, running, other) if each not in expected
    )
    assert ended(dry_run=False) == []
