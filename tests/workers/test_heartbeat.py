"""The agent's view of a worker, with real processes that are stopped, frozen, killed or do not tick."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_pt.workers.heartbeat import (
    STACKS_TIMEOUT_S,
    TICK_INTERVAL_S,
    HeartbeatReader,
    Reading,
    WorkerPhase,
    process_state,
)

PATIENCE_S = 20.0
FREEZER = Path("/sys/fs/cgroup/freezer")

WORKER = """
import ctypes, os, re, signal, sys, threading, time
from pathlib import Path
from elastic_pt.workers.heartbeat import WorkerPhase, Heartbeat

def in_a_named_function():
    {act}

progress = Heartbeat(Path(sys.argv[1]), 0, 7, 400)
progress.enter(WorkerPhase.COMPUTE, 412)
print("entered", flush=True)
sys.stdin.readline()
in_a_named_function()
threading.Event().wait()
"""


@contextmanager
def worker(scratch: Path, act: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """A worker process that has entered a phase, and acts after a line of input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(act=act), str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "entered\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def go_on(process: subprocess.Popen[str]) -> None:
    """Make the worker act."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of another process."""
    deadline_s, waiting = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s
        waiting.wait(0.01)


def read(reader: HeartbeatReader) -> Reading:
    """The heartbeat, which must exist."""
    reading = reader.read()
    assert reading is not None
    return reading


def stands_still(reader: HeartbeatReader) -> bool:
    """Whether there is no tick within five intervals."""
    before = read(reader).ticks
    threading.Event().wait(5 * TICK_INTERVAL_S)
    return read(reader).ticks == before


def test_the_agent_reads_step_and_phase_of_its_worker(tmp_path: Path) -> None:
    """The agent reads step, phase and the time of their last change. Ticks continue while the worker waits."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    assert reader.read() is None
    before_s = time.monotonic()
    with worker(tmp_path) as process:
        go_on(process)
        reading = read(reader)
        assert (reading.step, reading.phase) == (412, WorkerPhase.COMPUTE)
        assert before_s < reading.changed_s < time.monotonic()
        until(lambda: read(reader).ticks >= 3)
        assert read(reader).changed_s == reading.changed_s


def test_a_heartbeat_of_another_generation_is_not_read(tmp_path: Path) -> None:
    """Files of an earlier worker are removed, and a file of another generation is not read."""
    early = HeartbeatReader(tmp_path, 0, 6)
    with worker(tmp_path):
        assert early.read() is None
        assert HeartbeatReader(tmp_path, 1, 7).read() is None
    assert HeartbeatReader(tmp_path, 0, 7).read() is None
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_worker_does_not_tick_and_writes_its_stacks(tmp_path: Path) -> None:
    """SIGSTOP ends the ticks. On request, the stacks name the function in which it was stopped."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    with worker(tmp_path, "threading.Event().wait()") as process:
        go_on(process)
        until(lambda: read(reader).ticks >= 1)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: process_state(process.pid) == "T")
        assert stands_still(reader)
        began_s = time.monotonic()
        assert reader.request_stacks(process.pid)
        assert time.monotonic() - began_s < 2 * STACKS_TIMEOUT_S + 0.7
        # On a busy machine the stacks of the woken worker may come too late for the first call.
        until(lambda: "in _tick" in reader.request_stacks(process.pid))
        # The main thread's stack does not depend on the walk over the other threads, which can crash.
        main, _, others = reader.stacks().partition("in _tick")
        assert "in in_a_named_function" in main
        assert "in in_a_named_function" in others


def test_threads_of_a_c_library_do_not_take_the_request(tmp_path: Path) -> None:
    """A stopped worker's main thread answers, also among threads that Python does not know, as torch starts them."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    act = """
    libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
    for _ in range(20):
        libc.pthread_create(ctypes.byref(thread), None, libc.sleep, ctypes.c_void_p(600))
    threading.Event().wait()
"""
    with worker(tmp_path, act) as process:
        go_on(process)
        until(lambda: len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 22)
        written = tmp_path / "stacks-0"
        for requests in range(1, 11):
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: process_state(process.pid) == "T")
            reader.request_stacks(process.pid)
            # Alone, and once more among all threads.
            stacks = 2 * requests
            until(lambda: written.read_text().count("in in_a_named_function") == stacks)


def test_a_worker_that_holds_the_interpreter_lock_does_not_tick(tmp_path: Path) -> None:
    """A C function that holds the interpreter's lock ends the ticks, but the stacks are still written."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    with worker(tmp_path, "re.match('(a?){40}a{40}', 'a' * 40)") as process:
        until(lambda: read(reader).ticks >= 1)
        go_on(process)
        until(lambda: stands_still(reader))
        assert process_state(process.pid) == "R"
        until(lambda: "in in_a_named_function" in reader.request_stacks(process.pid))


def test_a_crash_writes_the_stacks(tmp_path: Path) -> None:
    """A fatal signal that Python can still handle writes the stacks without a request."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    with worker(tmp_path, "ctypes.string_at(1)") as process:
        go_on(process)
        assert process.wait(PATIENCE_S) == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in reader.stacks()
    assert "in in_a_named_function" in reader.stacks()


@pytest.mark.skipif(
    not os.access(FREEZER / "cgroup.procs", os.W_OK),
    reason="only a freezer of cgroup v1 gives a process that no signal wakes",
)
def test_a_worker_in_uninterruptible_sleep_gives_a_note_instead_of_stacks(tmp_path: Path) -> None:
    """Without an answer the text gives the process's state and kernel function, within its time limit."""
    reader = HeartbeatReader(tmp_path, 0, 7)
    group = FREEZER / f"elastic_pt-test-{os.getpid()}"
    group.mkdir()
    try:
        with worker(tmp_path) as process:
            until(lambda: read(reader).ticks >= 1)
            (group / "cgroup.procs").write_text(str(process.pid))
            (group / "freezer.state").write_text("FROZEN")
            until(lambda: process_state(process.pid) == "D")
            began_s = time.monotonic()
            text = reader.request_stacks(process.pid)
            assert time.monotonic() - began_s < STACKS_TIMEOUT_S + 0.7
            assert f"no Python stacks within 2.0 s: process {process.pid} is in state D" in text
            assert "refrigerator" in text
            (group / "freezer.state").write_text("THAWED")
    finally:
        (group / "freezer.state").write_text("THAWED")
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_states_of_processes_that_end(tmp_path: Path) -> None:
    """A process that has ended but was not reaped is Z, one that is gone has no state."""
    assert process_state(os.getpid()) == "R"
    with worker(tmp_path) as process:
        until(lambda: process_state(process.pid) == "S")
        process.kill()
        until(lambda: process_state(process.pid) == "Z")
        process.wait()
        assert process_state(process.pid) == ""
    assert HeartbeatReader(tmp_path, 0, 7).request_stacks(process.pid) == ""
