"""Writes events as JSON lines to a local file, rotated: 16 MiB, and four older files of that size.

A thread writes, so a slow file system delays no caller. A full disk or a missing directory ends nothing: the first failure of
an outage is reported, and later events try again. The file is locked: a second process would rotate it under the first one.
"""

import fcntl
import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

_FILE_BYTES_MAX: Final = 16 * 1024 * 1024
_OLDER_FILES: Final = 4
_QUEUE_EVENTS_MAX: Final = 10_000
_CLOSE_TIMEOUT_S: Final = 2.0


class LogFile:
    """Collects events for one file, of this process alone."""

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """`on_failure` gets the first error of each outage, and how many events were dropped, on the writing thread."""
        self._handler = _Raising(
            path, maxBytes=_FILE_BYTES_MAX, backupCount=_OLDER_FILES, encoding="utf-8", delay=True
        )
        self._on_failure = on_failure
        self._dropped = 0
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE_EVENTS_MAX)
        self._thread = threading.Thread(target=self._run, name="log file", daemon=True)
        self._thread.start()

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event; never blocks. Dropped if thousands wait already."""
        try:
            self._queue.put_nowait(json.dumps(event, default=str))
        except queue.Full:
            self._dropped += 1

    def end(self) -> None:
        """Ask the thread to write the remaining events and to end; does not wait."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Write the remaining events, within a bounded time."""
        self.end()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        fails, told = False, 0
        while (line := self._queue.get()) is not None:
            try:
                self._handler.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))
                fails = False
            except (OSError, ValueError) as error:
                # What could not be written must not collect in the stream's buffer.
                with suppress(OSError, ValueError):
                    self._handler.close()
                if not fails:
                    self._on_failure(str(error))
                fails = True
            dropped = self._dropped
            # Once all that waited is written: the event that tells of it must find room, too.
            if dropped > told and self._queue.empty():
                self._on_failure(f"too slow: {dropped - told} events were dropped")
                told = dropped
        with suppress(OSError, ValueError):
            self._handler.close()


class _Raising(RotatingFileHandler):
    """Passes errors to the caller, where the library would print them, and locks the file."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704 (the library calls this while it handles the error)

    def doRollover(self) -> None:
        """Hold the lock of the old file until the new one is locked, or another process could get the old one."""
        self.stream = self.stream or self._open()
        held = os.dup(self.stream.fileno())
        try:
            super().doRollover()
            self.stream = self._open()
        finally:
            os.close(held)

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and not self._is_own(stream):
            stream.close()
            raise OSError(
                "another process writes this file; expected {node} in telemetry.log_file for several nodes on one machine"
            )
        return stream

    def _is_own(self, stream: TextIOWrapper) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks
        # Between opening and locking, its owner may have rotated it.
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(self.baseFilename))
