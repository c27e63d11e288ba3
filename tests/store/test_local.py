"""The directory store where it differs from a bucket: crashes, leftovers, permissions, a full disk."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_pt.errors import AlreadyExists, StoreError
from elastic_pt.store import local
from elastic_pt.store.local import UNFINISHED, LocalStore
from elastic_pt.store.port import NoAtomicCreate


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(f"file://{tmp_path}/run")


def test_a_killed_writer_leaves_nothing_under_the_key(tmp_path: Path) -> None:
    """kill -9 between the last byte and the publication: the old object stays, nothing new is listed."""
    store = LocalStore(f"file://{tmp_path}/run")
    store.write("x", b"old")
    code = (
        "import os, signal, sys\n"
        "from elastic_pt.store.local import LocalStore\n"
        "os.replace = os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"store = LocalStore('file://{tmp_path}/run')\n"
        "getattr(store, sys.argv[1])(sys.argv[2], b'new')\n"
    )
    for method, key in (("write", "x"), ("create", "y")):
        done = subprocess.run([sys.executable, "-c", code, method, key], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
    assert store.read("x") == b"old"
    assert store.keys("") == ["x"]
    assert len(list((tmp_path / "run" / UNFINISHED).iterdir())) == 2


def test_leftovers_of_killed_writers_are_removed_when_they_are_old(tmp_path: Path) -> None:
    """The next writer clears what nobody has touched for an hour, and only that."""
    making = tmp_path / UNFINISHED
    making.mkdir()
    (making / "old").write_bytes(b"1")
    (making / "young").write_bytes(b"1")
    long_ago_s = time.time() - local.ABANDONED_AFTER_S - 1
    os.utime(making / "old", (long_ago_s, long_ago_s))
    LocalStore(f"file://{tmp_path}").write("x", b"1")
    assert [path.name for path in making.iterdir()] == ["young"]


def test_delete_leaves_no_empty_directories(store: LocalStore, tmp_path: Path) -> None:
    """A checkpoint that is removed is gone, as in a bucket; directories in use stay."""
    store.write("ckpt/1/a", b"1")
    store.write("ckpt/2/a", b"1")
    store.delete("ckpt/1/a")
    assert not (tmp_path / "run" / "ckpt" / "1").exists()
    store.delete("ckpt/2/a")
    assert not (tmp_path / "run" / "ckpt").exists()
    assert (tmp_path / "run").exists()


def test_a_directory_that_vanishes_under_a_writer_is_made_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sibling's delete may take the directory away between making it and using it."""
    real, taken = os.link, []

    def link(source: Path, target: Path) -> None:
        if not taken:
            taken.append(target)
            target.parent.rmdir()
        real(source, target)

    monkeypatch.setattr(local.os, "link", link)
    store.create("a/b", b"1")
    assert taken
    assert store.read("a/b") == b"1"


def test_a_full_disk_is_told_and_leaves_the_old_object(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space left: one clear error at once, no torn object, no leftover."""
    store.write("x", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.os, "fsync", fail)
    with pytest.raises(StoreError, match=r"writing x of file://.*: No space left on device"):
        store.write("x", b"new")
    monkeypatch.undo()
    assert store.read("x") == b"old"
    assert not list((Path(store.url.removeprefix("file://")) / UNFINISHED).iterdir())


def test_a_directory_without_hard_links_says_so(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mounted buckets cannot link; then there is no create-once, and nothing pretends otherwise."""

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(local.os, "link", fail)
    with pytest.raises(NoAtomicCreate, match="file system without hard links"):
        store.create("x", b"1")


def test_what_is_published_is_on_the_disk(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content is synced before the name exists, the name after: a power cut leaves all or nothing."""
    done: list[str] = []
    real_sync, real_link = os.fsync, os.link

    def sync(descriptor: int) -> None:
        done.append("sync")
        real_sync(descriptor)

    def link(source: Path, target: Path) -> None:
        done.append("link")
        real_link(source, target)

    monkeypatch.setattr(local.os, "fsync", sync)
    monkeypatch.setattr(local.os, "link", link)
    store.create("a", b"1")
    assert done == ["sync", "link", "sync"]


def test_where_files_are_made_is_no_key(store: LocalStore) -> None:
    """The hidden folder cannot be addressed, so nobody depends on it."""
    with pytest.raises(ValueError, match="not a key"):
        store.read(f"{UNFINISHED}/x")


def test_a_lost_race_leaves_no_leftover(store: LocalStore, tmp_path: Path) -> None:
    """The loser of a create removes its file."""
    store.create("x", b"1")
    with pytest.raises(AlreadyExists):
        store.create("x", b"2")
    assert not list((tmp_path / "run" / UNFINISHED).iterdir())
