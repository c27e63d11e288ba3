"""A directory of TensorBoard: one event file per run, written with TensorBoard's own record writer.

    file_version │ step 1 │ … │ step 20 │ CHECKPOINT msg=record 2 │ step 21 │ …

After the steps of each COMMIT there is an event that names its record. TensorBoard ignores it. A writer resumes at
the last such event and cuts off what follows. It writes the same bytes there again, so a TensorBoard that has read
further is not disturbed.
"""

import mmap
import os
import struct
from array import array
from pathlib import Path
from typing import Any, BinaryIO, Final

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from elastic_pt.errors import ConfigError
from elastic_pt.report.history import Batch
from elastic_pt.report.sinks.exclusive import open_locked, unwritable
from elastic_pt.report.sinks.feed import Position, scalars, times_s

_PREFIX: Final = "events.out.tfevents."
_SUFFIX: Final = ".elastic_pt"
_HEAD_BYTES: Final = 12
"""A record is a length of eight bytes, its CRC, the data, and the CRC of the data."""
_TAIL_BYTES: Final = 4


class TensorBoard:
    """The event file of one run."""

    def __init__(self, directory: Path, run_id: str) -> None:
        """Open or create it. Raises `ConfigError` if the directory has event files of another run or program."""
        self.name = f"tensorboard:{directory}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            others = sorted(
                each.name
                for each in directory.iterdir()
                if "tfevents" in each.name and each.name != f"{_PREFIX}{run_id}{_SUFFIX}"
            )
        except OSError as error:
            raise unwritable(self.name, error) from error
        if others:
            raise ConfigError(
                f"--to {self.name}: has {others[0]}, of another run or program; "
                f"expected a directory for this run alone ({run_id})"
            )
        self._lock = open_locked(directory, os.O_RDONLY | os.O_DIRECTORY, self.name)
        try:
            path = directory / f"{_PREFIX}{run_id}{_SUFFIX}"
            # Not truncated, and not "append": the position is set after the last whole COMMIT.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._file: BinaryIO = os.fdopen(handle, "r+b")
            end, self.position, self._time_s = _resume(self._file)
            self._file.truncate(end)
            self._file.seek(end)
        except OSError as error:
            os.close(self._lock)
            raise unwritable(self.name, error) from error
        self._writer = RecordWriter(self._file)

    def write(self, batch: Batch) -> None:
        """Append the steps and the event that names the COMMIT."""
        step = batch.lines[-1]["step"]
        try:
            if self._file.tell() == 0:
                self._append(Event(wall_time=batch.committed_at_s, file_version="brain.Event:2"))
            for line, time_s in zip(batch.lines, times_s(batch), strict=True):
                values = [
                    Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line)
                ]
                summary = Summary(value=values)
                # The times of two COMMITs come from two clocks, and the steps between may overlap a little.
                self._time_s = max(self._time_s, time_s)
                self._append(Event(wall_time=self._time_s, step=line["step"], summary=summary))
            mark = SessionLog(status=SessionLog.CHECKPOINT, msg=str(batch.record.index))
            self._append(Event(wall_time=self._time_s, step=step, session_log=mark))
            self._file.flush()
        except OSError as error:
            raise unwritable(self.name, error) from error
        self.position = Position(batch.record.index + 1, step)

    def flush(self) -> None:
        """Return when the events are on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.name, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        os.close(self._lock)

    def _append(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _resume(file: BinaryIO) -> tuple[int, Position, float]:
    """The end of the last whole COMMIT in an event file, its position, and its time. All are 0 if there is none."""
    if os.fstat(file.fileno()).st_size == 0:
        return 0, Position(), 0.0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for begin in reversed(_records(data)):
            end = begin + _HEAD_BYTES + struct.unpack_from("<Q", data, begin)[0]
            content = data[begin + _HEAD_BYTES : end]
            if struct.unpack_from("<I", data, end)[0] == masked_crc32c(content):
                event = Event.FromString(content)
                if event.HasField("session_log"):
                    position = Position(int(event.session_log.msg) + 1, event.step)
                    return end + _TAIL_BYTES, position, event.wall_time
    return 0, Position(), 0.0


def _records(data: mmap.mmap) -> "array[int]":
    """The offset of each whole record."""
    offsets = array("Q")
    offset = 0
    while offset + _HEAD_BYTES <= len(data):
        end = offset + _HEAD_BYTES + struct.unpack_from("<Q", data, offset)[0] + _TAIL_BYTES
        if end > len(data):
            break
        offsets.append(offset)
        offset = end
    return offsets
