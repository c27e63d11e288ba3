"""A worker's heartbeat: two files in the node's scratch directory that the agent reads.

    heartbeat-<local rank>  in shared memory: ticks, step, phase, and when these last changed
    stacks-<local rank>     Python stacks of all its threads: on request, and when a fatal signal ends it

A hung worker need not cooperate. Its numbers stop changing. A signal handler in C, which does not need the
interpreter's lock, writes the stacks: that of the main thread first, because a walk over the frames of threads
that run can crash the worker.
"""

import ctypes
import faulthandler
import mmap
import os
import platform
import signal
import struct
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

TICK_INTERVAL_S: Final = 0.1
STACKS_TIMEOUT_S: Final = 2.0
"""For the main thread's stack, and once more for those of all threads."""

# Native alignment: `struct` then stores a number with one instruction, so a reader never sees half of a number.
_HEADER: Final = struct.Struct("@qq")
_TICKS: Final = struct.Struct("@q")
_PROGRESS: Final = struct.Struct("@qqq")
_TICKS_AT: Final = _HEADER.size
_PROGRESS_AT: Final = _TICKS_AT + _TICKS.size
_FILE_BYTES: Final = _PROGRESS_AT + _PROGRESS.size
_VERSION: Final = 1
_STACKS_BYTES_MAX: Final = 16 * 1024
_STACKS_POLL_S: Final = 0.01
_STACKS_QUIET_S: Final = 0.05
_PF_EXITING: Final = 0x4
_MAIN_THREAD_SIGNAL: Final = signal.SIGUSR2
"""For the main thread alone, which then stands still in the handler."""
_ALL_THREADS_SIGNAL: Final = signal.SIGRTMIN
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_TGKILL: Final = 234 if platform.machine() == "x86_64" else 131
"""System call: 131 is its number on ARM and RISC-V."""


class WorkerPhase(IntEnum):
    """What a worker is doing."""

    START = 0
    """From its first line until the process group and an empty state exist."""
    RESTORE = 1
    DATA = 2
    """Waiting for the step's batch, or as it starts for the data's manifest."""
    COMPUTE = 3
    """Inside `run_step`, including waits for the other workers in it."""
    STAGE = 4
    END = 5
    """Waiting for the others after its last step."""
    EVALUATE = 6
    """In one pass of an evaluation, including waits for the other workers in it."""


class Heartbeat:
    """Writes the heartbeat. The main thread calls `enter`; another thread ticks. Worker process.

    A tick needs only the interpreter's lock. Ticks stop when the process is stopped, is in uninterruptible sleep,
    or never releases that lock. They continue while it waits in a collective.
    """

    def __init__(self, scratch: Path, local_rank: int, generation: int, step: int) -> None:
        stacks = (scratch / f"stacks-{local_rank}").open("w")
        faulthandler.register(_MAIN_THREAD_SIGNAL, file=stacks, all_threads=False)
        faulthandler.register(_ALL_THREADS_SIGNAL, file=stacks, all_threads=True)
        faulthandler.enable(file=stacks, all_threads=True)
        path = _path(scratch, local_rank)
        partial = path.with_suffix(".partial")
        # Written, not truncated to size: a full file system then fails here, not as SIGBUS at a later step.
        partial.write_bytes(_HEADER.pack(_VERSION, generation).ljust(_FILE_BYTES, b"\0"))
        with partial.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _FILE_BYTES)
        self.enter(WorkerPhase.START, step)
        partial.rename(path)
        threading.Thread(target=self._tick, name="heartbeat", daemon=True).start()

    def enter(self, phase: WorkerPhase, step: int) -> None:
        """Write the next phase; `step` steps of the run are done."""
        self.step = step
        # A reader may see one of the three values before the others. It counts that as one more change.
        _PROGRESS.pack_into(self._map, _PROGRESS_AT, time.monotonic_ns(), step, phase)

    def _tick(self) -> None:
        ticks = 0
        while True:
            time.sleep(TICK_INTERVAL_S)
            ticks += 1
            _TICKS.pack_into(self._map, _TICKS_AT, ticks)


@dataclass(frozen=True)
class Reading:
    """A heartbeat at one moment."""

    ticks: int
    step: int
    """Steps of the run that are done."""
    phase: WorkerPhase
    changed_s: float
    """When step or phase last changed, on the machine's monotonic clock."""


class HeartbeatReader:
    """Reads the heartbeat of one worker. Agent process; create it before the worker starts.

    It removes the files of an earlier worker, and never reads a file of another generation.
    """

    def __init__(self, scratch: Path, local_rank: int, generation: int) -> None:
        self._path = _path(scratch, local_rank)
        self._stacks_path = scratch / f"stacks-{local_rank}"
        self._generation = generation
        self._map: mmap.mmap | None = None
        self._path.unlink(missing_ok=True)
        self._stacks_path.unlink(missing_ok=True)

    def read(self) -> Reading | None:
        """The heartbeat now; None until the worker has written one."""
        if self._map is None:
            try:
                with self._path.open("rb") as file:
                    found = mmap.mmap(file.fileno(), _FILE_BYTES, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                return None
            if _HEADER.unpack_from(found) != (_VERSION, self._generation):
                return None
            self._map = found
        (ticks,) = _TICKS.unpack_from(self._map, _TICKS_AT)
        changed_ns, step, phase = _PROGRESS.unpack_from(self._map, _PROGRESS_AT)
        return Reading(ticks, step, WorkerPhase(phase), changed_ns / 1e9)

    def stacks(self) -> str:
        """The end of the stacks that the worker has written so far: the main thread comes last."""
        try:
            text = self._stacks_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return text[-_STACKS_BYTES_MAX:]

    def request_stacks(self, pid: int) -> str:
        """Make the worker write its stacks, and wait for them at most twice `STACKS_TIMEOUT_S`.

        This wakes a stopped worker and can crash it, so the caller must kill it at once afterwards. If there are no
        stacks, the text gives the process's state, and the kernel function that it is in, if that can be read.
        """
        state = process_state(pid)
        try:
            _signal_main_thread(pid, _MAIN_THREAD_SIGNAL)
            os.kill(pid, signal.SIGCONT)
            if self._written_stacks():
                os.kill(pid, _ALL_THREADS_SIGNAL)
                return self._written_stacks()
        except ProcessLookupError:
            return self.stacks()
        return (
            f"no Python stacks within {STACKS_TIMEOUT_S} s: process {pid} is in state {state or '?'}"
            f"{_kernel_function(pid)}"
        )

    def _written_stacks(self) -> str:
        """The stacks when their file has not grown for a while: the handler writes one thread after the other."""
        deadline_s = time.monotonic() + STACKS_TIMEOUT_S
        text, since_s = self.stacks(), time.monotonic()
        while (now_s := time.monotonic()) < deadline_s:
            if text and now_s - since_s > _STACKS_QUIET_S:
                break
            time.sleep(_STACKS_POLL_S)
            if (more := self.stacks()) != text:
                text, since_s = more, time.monotonic()
        return text


def process_state(pid: int) -> str:
    """State letter of a process's main thread as in `ps`; X while it is exiting, empty when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    state, flags = fields[0], int(fields[6])
    return "X" if flags & _PF_EXITING and state != "Z" else state


def _signal_main_thread(pid: int, number: int) -> None:
    """Signal this one thread. `kill` of a stopped process lets any thread take the signal, also one of a library
    in C, for which Python's handler writes nothing.

    Raises `ProcessLookupError` if there is no such process.
    """
    # By number, as the C library has no `tgkill` before glibc 2.30.
    if _LIBC.syscall(_TGKILL, pid, pid, number) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _kernel_function(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
    return f", in the kernel's {name}" if name.strip("0") else ""


def _path(scratch: Path, local_rank: int) -> Path:
    return scratch / f"heartbeat-{local_rank}"
