"""A JSONL file: one line per step, the history line with the run's id, the COMMIT's index and its time.

    {"run_id": "8396…", "commit": 2, "committed_at": "2026-…", "generation": 1, "step": 10, "loss": 5.49, …}

The last line tells the position. A writer that was killed may have left half a line, which the next one cuts off.
"""

import json
import os
from pathlib import Path
from typing import Any, Final

from elastic_pt.errors import ConfigError
from elastic_pt.report.history import Batch
from elastic_pt.report.sinks.exclusive import open_locked, unwritable
from elastic_pt.report.sinks.feed import Position

_BLOCK_BYTES: Final = 64 << 10


class JsonLines:
    """The file of one run."""

    def __init__(self, path: Path, run_id: str) -> None:
        """Open or create it. Raises `ConfigError` for a file of another run, or one that `sync` did not write."""
        self.name = f"jsonl:{path}"
        self._run_id = run_id
        self._handle = open_locked(path, os.O_RDWR | os.O_CREAT, self.name)
        try:
            self.position = self._resume()
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, batch: Batch) -> None:
        """Append the steps."""
        head = {
            "run_id": self._run_id,
            "commit": batch.record.index,
            "committed_at": batch.record.time,
        }
        lines = [json.dumps(head | line).encode() + b"\n" for line in batch.lines]
        try:
            _write_all(self._handle, b"".join(lines))
        except OSError as error:
            raise unwritable(self.name, error) from error
        self.position = Position(batch.record.index + 1, batch.lines[-1]["step"])

    def flush(self) -> None:
        """Return when the lines are on the disk."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise unwritable(self.name, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _resume(self) -> Position:
        """Cut off half a line, and return the position of the last whole one."""
        start = f'{{"run_id": "{self._run_id}", '.encode()
        try:
            found = os.pread(self._handle, len(start), 0)
        except OSError as error:
            raise unwritable(self.name, error) from error
        if not start.startswith(found):
            raise ConfigError(
                f"--to {self.name}: starts with {found.decode(errors='replace')!r}; "
                f"expected a new file, or one that `sync` wrote for this run ({self._run_id})"
            )
        try:
            end = self._end_of_lines(os.fstat(self._handle).st_size)
            os.ftruncate(self._handle, end)
            os.lseek(self._handle, end, os.SEEK_SET)
            if end == 0:
                return Position()
            begin = self._end_of_lines(end - 1)
            line: dict[str, Any] = json.loads(os.pread(self._handle, end - begin, begin))
            # The rest of this COMMIT's steps may be missing.
            return Position(int(line["commit"]), int(line["step"]))
        except OSError as error:
            raise unwritable(self.name, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--to {self.name}: its last line is not one of `sync`: {error!r}; "
                "expected a file that nothing else writes"
            ) from error

    def _end_of_lines(self, before: int) -> int:
        """The offset behind the last newline before an offset; 0 if there is none."""
        while before > 0:
            begin = max(0, before - _BLOCK_BYTES)
            found = os.pread(self._handle, before - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            before = begin
        return 0


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
