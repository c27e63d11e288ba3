"""A node's scratch directory: in memory, private to one agent, removed when the agent ends.

A killed agent cannot remove its directory. So each agent holds a lock on it, and the next agent on the machine
removes every directory without a lock holder, with the semaphores of the same name. If a directory is removed
between its creation and its lock, the agent creates another one.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from elastic_pt.errors import ConfigError, NodeFailure

_PREFIX: Final = "elastic_pt-"
_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_ATTEMPTS_MAX: Final = 100
_SEMAPHORES: Final = Path("/dev/shm")
"""Where the C library keeps the semaphores that have names, each as `sem.<name>`."""


@contextmanager
def scratch_directory(base: str) -> Iterator[Path]:
    """A new directory below `base`, removed at the end.

    Raises `ConfigError` if `base` cannot hold one, and `NodeFailure` if it cannot now (no space, I/O).
    """
    try:
        sweep(Path(base), _PREFIX)
        path, lock = make_locked(Path(base), _PREFIX)
    except OSError as error:
        what = f"checkpoint.staging = {base!r}: {error.strerror}"
        if error.errno in _PASSING:
            raise NodeFailure(
                f"{what}; expected free space there: start this node again when there is some"
            ) from error
        raise ConfigError(f"{what}; expected a writable local directory") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def make_locked(base: Path, prefix: str) -> tuple[Path, int]:
    """A directory, and its lock as an open descriptor: no sweep removes it until that is closed. Raises `OSError`."""
    for _ in range(_ATTEMPTS_MAX):
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        try:
            lock = _locked(path)
        except OSError:
            with suppress(OSError):
                path.rmdir()
            raise
        if lock is not None:
            return path, lock
    raise OSError(errno.EBUSY, f"another process removed it {_ATTEMPTS_MAX} times")


def sweep(base: Path, prefix: str) -> None:
    """Remove this user's directories below `base` without a lock: their owners are gone."""
    for path in base.glob(f"{prefix}*"):
        with suppress(OSError):
            lock = _locked(path)
            if lock is None:
                continue
            try:
                _remove_semaphores(path.name)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def scratches(base: Path) -> list[Path]:
    """All scratch directories below `base`, whoever holds them."""
    return sorted(base.glob(f"{_PREFIX}*"))


def semaphore_prefix(scratch: Path) -> str:
    """The prefix of semaphores that a sweep removes together with this directory."""
    return f"/{scratch.name}"


def _locked(path: Path) -> int | None:
    """The lock on a directory of this user; None if another process holds it, or the directory is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        opened = os.fstat(lock)
        if opened.st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the directory.
            if os.path.samestat(opened, path.lstat()):
                return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _remove_semaphores(owner: str) -> None:
    for path in _SEMAPHORES.glob(f"sem.{owner}-*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                path.unlink()
