"""A node's scratch directory: in memory, private to one agent, and gone when the agent is.

An agent that is killed cannot tidy up, so each holds a file lock in its directory, and the next agent on the
machine removes every directory whose lock nobody holds any more.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from elastic_pt.errors import ConfigError

_PREFIX: Final = "elastic_pt-"
_LOCK_NAME: Final = "lock"


@contextmanager
def scratch_directory(base: str) -> Iterator[Path]:
    """A fresh directory below `base`, removed at the end. Raises `ConfigError` if `base` cannot hold one."""
    try:
        _sweep(Path(base))
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    except OSError as error:
        raise ConfigError(
            f"checkpoint.staging = {base!r}: {error.strerror}; a writable local directory would be right"
        ) from error
    lock = os.open(path / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)
