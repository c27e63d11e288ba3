"""A thread for one job after the other: the queue has a limit, and the thread never delays the end of the process."""

import subprocess
import sys
import threading

import pytest

from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.errors import CheckpointError

WAIT_S = 20.0


class Held:
    """Work that waits until it is released."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.started, self.release = threading.Event(), threading.Event()

    def __call__(self, job: int) -> None:
        self.started.set()
        assert self.release.wait(WAIT_S)
        self.done.append(job)


def test_jobs_are_done_in_order() -> None:
    """`close` waits for all jobs, which are done one after the other."""
    done: list[int] = []
    jobs = JobThread("test", done.append)
    for job in range(9):
        jobs.submit(job)
    assert jobs.close(WAIT_S)
    assert done == list(range(9))
    assert jobs.pending() == []


def test_the_queue_is_bounded() -> None:
    """A job above the limit is refused at once, with the limit in the error."""
    held = Held()
    jobs = JobThread("test", held, queue_limit=2)
    jobs.submit(0)
    assert held.started.wait(WAIT_S)
    jobs.submit(1)
    jobs.submit(2)
    with pytest.raises(CheckpointError, match="2 jobs wait, expected fewer than 2"):
        jobs.submit(3)
    held.release.set()
    assert jobs.close(WAIT_S)
    assert held.done == [0, 1, 2]


def test_close_ends_at_its_timeout_and_waiting_jobs_can_be_taken_back() -> None:
    """A hanging job does not delay `close`. Waiting jobs never start, and `discard` returns them."""
    held = Held()
    jobs = JobThread("test", held)
    for job in range(3):
        jobs.submit(job)
    assert held.started.wait(WAIT_S)
    assert not jobs.close(0.01)
    assert jobs.pending() == [0, 1, 2]
    assert jobs.discard() == [1, 2]
    held.release.set()
    assert jobs.close(WAIT_S)
    assert held.done == [0]
    with pytest.raises(CheckpointError, match="ended"):
        jobs.submit(4)


def test_a_hanging_job_does_not_keep_the_process_alive() -> None:
    """The interpreter ends while a job is in progress, unlike with an executor."""
    program = (
        "import threading\n"
        "from elastic_pt.checkpoint.job_thread import JobThread\n"
        "started = threading.Event()\n"
        "jobs = JobThread('test', lambda job: (started.set(), threading.Event().wait(60)))\n"
        "jobs.submit(0)\n"
        "assert started.wait(20)\n"
        "assert not jobs.close(0.1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
