"""Lets one process at a time write a sink. The kernel releases the lock when the process ends, however it ends."""

import fcntl
import os
from pathlib import Path

from elastic_pt.errors import ConfigError


def open_locked(path: Path, flags: int, name: str) -> int:
    """Open `path` and lock it. Raises `ConfigError` with the sink's name if that cannot be done."""
    try:
        handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unwritable(name, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(
            f"--to {name}: another `sync` writes it now; expected one at a time"
        ) from error
    return handle


def unwritable(name: str, error: OSError) -> ConfigError:
    """The mistake for a sink that the operating system refuses to open or to write."""
    return ConfigError(
        f"--to {name}: {error.strerror or error}; expected a place that this user may write to, with room"
    )
