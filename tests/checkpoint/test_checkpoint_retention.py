"""Retention deletes old checkpoints and uploads, but never a kept checkpoint or an upload that may be committed."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.checkpoint.commit import Tidier, _Expired
from elastic_pt.checkpoint.layout import (
    checkpoint_directory,
    manifest_key,
    shard_key,
)
from elastic_pt.checkpoint.retention import (
    KEPT_MIN,
    UPLOAD_AGE_S,
    abandoned,
    expired,
    is_permanent,
    kept,
    leftovers,
    listed_directories,
    overtaken,
    remove,
)
from elastic_pt.checkpoint.verify import newest_usable, verify
from elastic_pt.errors import CheckpointError
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.store.port import UnfinishedUpload
from tests.checkpoint.world import RUN_ID, full_tensors, memory_store, write_checkpoint

SMALL = {"b": (3,), "w": (4, 2)}


def reference(step: int, generation: int = 1, permanent: bool = False) -> Checkpoint:
    """A committed checkpoint."""
    directory = checkpoint_directory(step, generation, "0a1b2c3d")
    return Checkpoint(step, generation, directory, 100, "a" * 64, loss=None, permanent=permanent)


references = st.lists(
    st.builds(reference, st.integers(0, 60), st.integers(1, 4), st.booleans()),
    unique_by=lambda each: each.directory,
    max_size=20,
)


@settings(deadline=None)
@given(references, st.integers(1, 6))
def test_the_newest_and_the_permanent_are_kept(committed: list[Checkpoint], keep: int) -> None:
    """The first `keep` commits, at least two, are named, in any order of steps; of the others only permanent ones stay."""
    named = committed[: max(2, keep)]
    assert kept(committed, keep) == named
    assert expired(committed, keep) == [
        each for each in committed[len(named) :] if not each.permanent
    ]
    assert KEPT_MIN == 2


@pytest.mark.parametrize(
    ("step", "previous_step", "keep_every_steps", "permanent"),
    [
        (100, 50, 0, False),
        (100, 50, 100, True),
        (99, 50, 100, False),
        (130, 99, 100, True),
        (150, 100, 100, False),
        (350, 90, 100, True),
        (5, 0, 100, False),
        (7, 5, 1, True),
        (100, 100, 100, False),
        (120, 190, 100, False),
    ],
)
def test_the_first_commit_at_or_after_a_multiple_is_permanent(
    step: int, previous_step: int, keep_every_steps: int, permanent: bool
) -> None:
    """A commit is permanent if a multiple lies after the previous commit and at or before this one."""
    assert is_permanent(step, previous_step, keep_every_steps) is permanent


@given(
    st.lists(st.integers(1, 500), unique=True, min_size=1, max_size=40).map(sorted),
    st.integers(1, 120),
)
def test_each_multiple_has_one_permanent_commit(steps: list[int], every: int) -> None:
    """For any distance of commits, exactly the first commit at or after each multiple is permanent."""
    before = [0, *steps[:-1]]
    found = [
        step for step, last in zip(steps, before, strict=True) if is_permanent(step, last, every)
    ]
    multiples = range(every, steps[-1] + 1, every)
    wanted = {next(step for step in steps if step >= multiple) for multiple in multiples}
    assert found == sorted(wanted)


def test_after_a_fall_back_the_order_of_commits_counts() -> None:
    """If step 200 was bad, a later commit of step 150 is the newest."""
    log = [reference(150, 5), reference(140, 5), reference(200, 4), reference(100, 4)]
    assert expired(log, 1) == log[2:]


def test_keeping_no_checkpoint_is_refused() -> None:
    """The newest checkpoint is always kept: `keep` below 1 is a programming error."""
    with pytest.raises(AssertionError):
        expired([reference(1)], 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), unique=True, max_size=20),
    st.data(),
    st.integers(1, 6),
    st.integers(0, 60),
)
def test_only_uploads_that_nothing_can_commit_are_leftovers(
    attempts: list[tuple[int, int]], data: st.DataObject, generation: int, newest_step: int
) -> None:
    """Kept directories, those of the current or a later generation, and steps beyond the newest commit stay."""
    names = {checkpoint_directory(*attempt, "beef"): attempt for attempt in attempts}
    committed = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
    torn = leftovers([*names, "ckpt/notes", "log"], committed, generation, newest_step)
    for name, (step, attempt_generation) in names.items():
        hopeless = attempt_generation < generation and step <= newest_step
        assert (name in torn) == (hopeless and name not in committed)
    assert set(torn) <= names.keys()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), unique=True, max_size=20),
    st.data(),
    st.integers(0, 60),
    st.integers(1, 6),
)
def test_only_earlier_steps_of_the_committing_generation_are_overtaken(
    attempts: list[tuple[int, int]], data: st.DataObject, newest_step: int, generation: int
) -> None:
    """A committed directory, a later step and another generation's attempt are never overtaken."""
    names = {checkpoint_directory(*attempt, "beef"): attempt for attempt in attempts}
    committed = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
    found = overtaken([*names, "ckpt/notes", "log"], committed, reference(newest_step, generation))
    for name, (step, attempt_generation) in names.items():
        behind = attempt_generation == generation and step < newest_step
        assert (name in found) == (behind and name not in committed)
    assert set(found) <= names.keys()


OLD_S, YOUNG_S = UPLOAD_AGE_S, UPLOAD_AGE_S - 1


@pytest.mark.parametrize(
    ("step", "generation", "age_s", "goes"),
    [
        (40, 2, YOUNG_S, True),
        (50, 2, YOUNG_S, True),
        (60, 2, YOUNG_S, False),
        (60, 2, OLD_S, True),
        (40, 3, YOUNG_S, False),
        (40, 3, OLD_S, True),
        (60, 3, OLD_S, True),
        (40, 4, OLD_S, False),
        (60, 4, OLD_S, False),
    ],
)
def test_only_uploads_without_a_writer_are_abandoned(
    step: int, generation: int, age_s: float, goes: bool
) -> None:
    """In generation 3, with step 50 committed: uploads that cannot be committed any more or are a day old, never those of a newer generation."""
    key = shard_key(checkpoint_directory(step, generation, "beef"), 0)
    upload = UnfinishedUpload(key, "id", age_s)
    assert abandoned([upload], 3, 50) == ([upload] if goes else [])


@pytest.mark.parametrize("key", ["history/x", "ckpt/notes/shard-00000.safetensors", "ckpt/x"])
def test_uploads_of_other_files_are_not_abandoned(key: str) -> None:
    """An upload outside checkpoint directories is not ended at any age."""
    assert abandoned([UnfinishedUpload(key, "id", 1e9)], 3, 50) == []


def test_remove_deletes_the_manifest_first_and_can_be_repeated(tmp_path: Path) -> None:
    """If a removal crashes after any delete, the checkpoint does not verify. A second removal completes it."""
    for survived in range(8):
        store = memory_store()
        old = write_checkpoint(store, tmp_path, full_tensors(SMALL, seed=1), 2, step=40)
        new = write_checkpoint(store, tmp_path, full_tensors(SMALL, seed=2), 2, step=50)

        class Dying:
            url, read, create = store.url, store.read, store.create
            write, size, keys = store.write, store.size, store.keys
            left = survived

            def delete(self, key: str, store=store) -> None:  # type: ignore[no-untyped-def]
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                store.delete(key)

        if survived < 7:
            with pytest.raises(KeyboardInterrupt):
                remove(Dying(), new.directory)
        usable = newest_usable(store, [new, old], RUN_ID)
        assert usable.manifest.directory == (new if survived in (0, 7) else old).directory
        remove(store, new.directory)
        remove(store, new.directory)
        assert store.keys(new.directory) == []
        assert listed_directories(store) == [old.directory]
        assert verify(store, old, RUN_ID) == []


def test_remove_does_not_depend_on_the_listing(tmp_path: Path) -> None:
    """Files that are missing in a stale listing are deleted, because the manifest names them."""
    store = memory_store()
    gone = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2)

    class Blind:
        url, read, create = store.url, store.read, store.create
        write, size, delete = store.write, store.size, store.delete

        def keys(self, prefix: str) -> list[str]:
            return []

    remove(Blind(), gone.directory)
    assert store.keys("") == []


def test_remove_is_limited_to_checkpoint_directories(tmp_path: Path) -> None:
    """Other names are refused. A manifest that was copied from another directory deletes nothing there."""
    store = memory_store()
    kept = write_checkpoint(store, tmp_path, full_tensors(SMALL), 2, step=40)
    for name in ("log", "ckpt", "ckpt/", "ckpt/../log", "", f"{kept.directory}/x"):
        with pytest.raises(CheckpointError):
            remove(store, name)
    torn = checkpoint_directory(30, 1, "beef")
    store.write(manifest_key(torn), store.read(manifest_key(kept.directory)))
    store.write(shard_key(torn, 0), b"half")
    remove(store, torn)
    assert listed_directories(store) == [kept.directory]
    assert verify(store, kept, RUN_ID) == []


def test_a_directory_that_is_no_checkpoint_stops_no_removal(tmp_path: Path) -> None:
    """A COMMIT of a hostile writer may name the log: nothing of it is removed, and what has expired is."""
    store = open_store(f"file://{tmp_path}")
    expired = "ckpt/0000000001-g1-0123456789abcdef"
    store.write(f"{expired}/manifest.json", b"{}")
    store.write("log/00000000000000000000.json", b"{}")
    failures: list[Exception] = []
    tidier = Tidier(store, RunLog(store, writer="a"), on_failure=failures.append)
    tidier.tidy(_Expired(RunView(), {"aaa", expired, "log"}, last=False))
    tidier.close(10.0)
    assert store.keys("ckpt/") == []
    assert store.keys("log/") == ["log/00000000000000000000.json"]
    assert sum(isinstance(each, CheckpointError) for each in failures) == 2
