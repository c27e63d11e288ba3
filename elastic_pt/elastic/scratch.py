"""A node's scratch directory: in memory, private to one agent, and gone when the agent is.

An agent that is killed cannot tidy up, so each holds a lock on its directory, and the next agent on the machine
removes every directory whose lock nobody holds any more. A directory is made and locked under a name that no
sweep looks for, and only then gets the one that sweeps do: no other agent can come in between.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from elastic_pt.errors import ConfigError, NodeFailure

_PREFIX: Final = "elastic_pt-"
_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_MAKING: Final = ".elastic_pt-making-"


@contextmanager
def scratch_directory(base: str) -> Iterator[Path]:
    """A fresh directory below `base`, removed at the end.

    Raises `ConfigError` if `base` cannot hold one, and `NodeFailure` if it cannot now (no space, I/O).
    """
    try:
        _sweep(Path(base))
        path, lock = _make(Path(base))
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


def _make(base: Path) -> tuple[Path, int]:
    """A directory and the lock on it."""
    made = Path(tempfile.mkdtemp(prefix=_MAKING, dir=base))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = made.with_name(_PREFIX + made.name.removeprefix(_MAKING))
        made.rename(path)
    except OSError:
        os.close(lock)
        made.rmdir()
        raise
    return path, lock


def _sweep(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)
