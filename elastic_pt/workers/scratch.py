"""A node's scratch directory: in memory, private to one agent, and gone when the agent is.

An agent that is killed cannot tidy up, so each holds a lock on its directory, and the next agent on the machine
removes every directory whose lock nobody holds any more, together with the semaphores that bear its name. A
directory that is swept between being made and being locked is made again.
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
    """A fresh directory below `base`, removed at the end.

    Raises `ConfigError` if `base` cannot hold one, and `NodeFailure` if it cannot now (no space, I/O).
    """
    try:
        sweep(Path(base), _PREFIX)
        path, lock = make_locked(Path(base), _PREFIX)
    except OSError as error:
        what = f"checkpoint.staging = {base!r}: {error.strerror}"
        if error.errno in _PASSING:
            raise NodeFailure(f"{what}; start this node again when that has passed") from error
        raise ConfigError(f"{what}; expected a writable local directory") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def make_locked(base: Path, prefix: str) -> tuple[Path, int]:
    """A directory, and the lock on it as a descriptor to close: until then no sweep takes it. Raises `OSError`."""
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
    raise OSError(errno.EBUSY, "swept as often as it was made")


def sweep(base: Path, prefix: str) -> None:
    """Remove this user's directories below `base` whose lock nobody holds: their owners are gone."""
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


def semaphore_prefix(scratch: Path) -> str:
    """How semaphores of the agent that owns this directory must be named to be swept with it."""
    return f"/{scratch.name}"


def _locked(path: Path) -> int | None:
    """The lock on a directory of this user; None if somebody else has it, or the directory is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        opened = os.fstat(lock)
        if opened.st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock before may have removed the directory.
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
