"""A thread that does one job after the other."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from elastic_pt.errors import CheckpointError

Job = TypeVar("Job")


class JobThread(Generic[Job]):
    """Calls `work(job)` for one job after the other, in a daemon thread of its own. `work` must not raise.

    A `ThreadPoolExecutor` of one thread cannot do three things that an agent needs:

    - End with the process. The interpreter joins an executor's threads at exit, so a hanging upload would keep the
      agent alive.
    - Close within a limit. `shutdown` waits without limit or not at all.
    - Return the jobs that it drops. A dropped shard is a local file that must be removed.
    """

    def __init__(self, name: str, work: Callable[[Job], None], queue_limit: int = 64) -> None:
        self._name = name
        self._work = work
        self._queue_limit = queue_limit
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `CheckpointError` when the queue is full or the thread has ended."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise CheckpointError(f"{self._name}: the thread has ended")
            if len(self._waiting) >= self._queue_limit:
                raise CheckpointError(
                    f"{self._name}: {len(self._waiting)} jobs wait, expected fewer than {self._queue_limit}"
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def pending(self) -> list[Job]:
        """The jobs that are not done, with the one in progress."""
        with self._changed:
            return [*self._current, *self._waiting]

    def discard(self) -> list[Job]:
        """Drop the jobs that have not started, and return them."""
        with self._changed:
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        return dropped

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for all jobs, then start no more. Returns whether all jobs are done."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: not self._waiting and not self._current, timeout_s
            )
            self._closed = True
            self._changed.notify_all()
        if done:
            self._thread.join()
        return done

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._current = [self._waiting.popleft()]
            try:
                self._work(self._current[0])
            finally:
                with self._changed:
                    self._current = []
                    self._changed.notify_all()
