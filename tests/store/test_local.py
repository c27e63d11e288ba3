"""How the directory store differs from a bucket: crashes, unfinished files, hard links, a full disk."""

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
    """After kill -9 between the last byte and the rename, the old object stays and nothing new is listed."""
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


def test_old_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    """The next writer removes unfinished files older than an hour, and only those."""
    making = tmp_path / UNFINISHED
    making.mkdir()
    old, young = "0" * 32, "1" * 32
    (making / old).write_bytes(b"1")
    (making / young).write_bytes(b"1")
    long_ago_s = time.time() - local.ABANDONED_AFTER_S - 1
    os.utime(making / old, (long_ago_s, long_ago_s))
    LocalStore(f"file://{tmp_path}").write("x", b"1")
    assert [path.name for path in making.iterdir()] == [young]


def test_delete_leaves_no_empty_directories(store: LocalStore, tmp_path: Path) -> None:
    """Deleting the last key of a directory removes the directory; directories in use stay."""
    store.write("ckpt/1/a", b"1")
    store.write("ckpt/2/a", b"1")
    store.delete("ckpt/1/a")
    assert not (tmp_path / "run" / "ckpt" / "1").exists()
    store.delete("ckpt/2/a")
    assert not (tmp_path / "run" / "ckpt").exists()
    assert (tmp_path / "run").exists()


def test_writer_recreates_a_directory_that_was_removed(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's delete may remove the directory after it is made and before it is used."""
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


def test_full_disk_is_an_error_and_leaves_the_old_object(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without space, a write raises at once, and leaves no partial object and no unfinished file."""
    store.write("x", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.os, "fsync", fail)
    with pytest.raises(StoreError, match=r"writing x of file://.*: No space left on device"):
        store.write("x", b"new")
    monkeypatch.undo()
    assert store.read("x") == b"old"
    assert not list((Path(store.url.removeprefix("file://")) / UNFINISHED).iterdir())


def test_create_without_hard_links_is_an_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mounted buckets have no hard links. Then create-once is not possible, and create raises."""

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(local.os, "link", fail)
    with pytest.raises(NoAtomicCreate, match="file system without hard links"):
        store.create("x", b"1")


def test_content_and_name_are_synced_in_order(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content is synced before it gets its name, the directory after it: a power cut leaves all or nothing."""
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


def test_folder_of_unfinished_files_is_not_a_key(store: LocalStore) -> None:
    """No key can address the hidden folder, so nothing depends on it."""
    with pytest.raises(ValueError, match="not a key"):
        store.read(f"{UNFINISHED}/x")


def test_lost_race_leaves_no_file(store: LocalStore, tmp_path: Path) -> None:
    """The loser of a create removes its unfinished file."""
    store.create("x", b"1")
    with pytest.raises(AlreadyExists):
        store.create("x", b"2")
    assert not list((tmp_path / "run" / UNFINISHED).iterdir())


def test_what_is_below_secret_is_for_its_owner_alone(store: LocalStore, tmp_path: Path) -> None:
    """Created or written, whatever the umask allows; other files have the modes of new ones."""
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode & 0o777
    for folder, mode in (("secret", 0o600), ("log", usual)):
        store.create(f"{folder}/created", b"1")
        store.write(f"{folder}/written", b"2")
        for path in (tmp_path / "run" / folder).iterdir():
            assert path.stat().st_mode & 0o777 == mode & usual, path
