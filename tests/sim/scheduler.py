"""Simulated time: one queue of events, one source of randomness, and processes that can stop, stand still and die.

Code that blocks runs in greenlets: whatever waits hands over to the scheduler, which switches back when
the wait is over. Between two waits nothing else runs, so every wait is a point where others may come in
between, and there are no others.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import greenlet

Call = Callable[[], Any]

_EVENTS_MAX: Final = 50_000_000
_CLOCK_GRAIN_S: Final = 1e-9
"""Less than this left of a wait is none: adding it to the clock might change nothing."""


class Process:
    """Something whose events wait while it is paused, and are dropped once it is dead. Has its own clock."""

    def __init__(self, scheduler: "Scheduler", name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.paused = False
        self.dead = False
        self.clock_offset_s = 0.0
        self.clock_rate = 1.0
        self.deferred: list[Call] = []
        self.greenlets: set[greenlet.greenlet] = set()

    def clock_s(self) -> float:
        """The process's monotonic clock."""
        return self.clock_offset_s + self.clock_rate * self.scheduler.now_s

    def after(self, delay_s: float, call: Call) -> None:
        """Call in `delay_s` seconds of this process's clock."""
        scheduler = self.scheduler
        scheduler.at(scheduler.now_s + delay_s / self.clock_rate, call, self)

    def soon(self, call: Call) -> None:
        """Call as soon as what runs now has ended."""
        self.scheduler.at(self.scheduler.now_s, call, self)

    def sleep(self, delay_s: float) -> None:
        """Block the running greenlet."""
        self.after(max(0.0, delay_s), greenlet.getcurrent().switch)
        self.scheduler.block()

    def spawn(self, run: Call) -> None:
        """Start a thread of this process."""
        started = greenlet.greenlet(run, parent=self.scheduler.hub)
        self.greenlets.add(started)
        self.soon(started.switch)

    def pause(self) -> None:
        """Stand still (SIGSTOP)."""
        self.paused = True

    def resume(self) -> None:
        """Go on; what came meanwhile is handled in its order."""
        if not self.paused:
            return
        self.paused = False
        late, self.deferred = self.deferred, []
        for call in late:
            self.soon(call)

    def kill(self) -> None:
        """End at once. Safe to call from one of its own threads, which then runs on until it blocks."""
        self.dead = True
        self.deferred.clear()
        self.scheduler.at(self.scheduler.now_s, self.unwind)

    def unwind(self) -> None:
        """End its threads."""
        for each in list(self.greenlets):
            if not each.dead:
                each.throw()
        self.greenlets.clear()


class Scheduler:
    """The clock and the queue of what happens next."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self.hub = greenlet.getcurrent()
        self.events = 0
        self.running: Process | None = None
        """Whose event is being handled."""
        self._queue: list[tuple[float, int, Call, Process | None]] = []
        self._count = 0

    def at(self, when_s: float, call: Call, process: Process | None = None) -> None:
        """Call at that time; of events at the same time, the first scheduled comes first."""
        self._count += 1
        heapq.heappush(self._queue, (when_s, self._count, call, process))

    def after(self, delay_s: float, call: Call, process: Process | None = None) -> None:
        """Call `delay_s` seconds from now."""
        self.at(self.now_s + delay_s, call, process)

    def block(self) -> Any:
        """Switch to other greenlets until one switches back to this one."""
        return self.hub.switch()

    def run(self, until_s: float, stop: Callable[[], bool] | None = None) -> None:
        """Handle events until `until_s`, or until `stop()` says so after one of them."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, call, process = heapq.heappop(queue)
            if process is not None:
                if process.dead:
                    continue
                if process.paused:
                    process.deferred.append(call)
                    continue
            self.running = process
            self.events += 1
            if self.events > _EVENTS_MAX:
                raise RuntimeError(f"more than {_EVENTS_MAX} events: the simulation runs away")
            call()
            if stop is not None and stop():
                return
        self.now_s = max(self.now_s, until_s)


class Lock:
    """`threading.Lock` for the threads of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._held = False
        self._waiting: deque[greenlet.greenlet] = deque()

    def __enter__(self) -> None:
        if self._held:
            self._waiting.append(greenlet.getcurrent())
            self._process.scheduler.block()
        self._held = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._waiting:
            # The lock passes to the next waiter without being free in between.
            self._process.soon(self._waiting.popleft().switch)
        else:
            self._held = False


class Condition:
    """`threading.Condition` for the threads of one process; its lock is not needed, as nothing runs in between."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: dict[greenlet.greenlet, int] = {}
        self._count = 0

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `predicate()` holds, at most `timeout` seconds; what it says at the end."""
        process, me = self._process, greenlet.getcurrent()
        deadline_s = None if timeout is None else process.clock_s() + timeout
        while not predicate():
            self._count += 1
            ticket = self._waiting[me] = self._count
            if deadline_s is not None:
                left_s = deadline_s - process.clock_s()
                if left_s <= _CLOCK_GRAIN_S:
                    del self._waiting[me]
                    return False
                process.after(left_s, lambda ticket=ticket: self._wake(me, ticket))
            process.scheduler.block()
        return True

    def notify_all(self) -> None:
        """Let all waiters check their condition again."""
        for waiting, ticket in list(self._waiting.items()):
            self._process.soon(lambda waiting=waiting, ticket=ticket: self._wake(waiting, ticket))

    def _wake(self, waiting: greenlet.greenlet, ticket: int) -> None:
        if self._waiting.get(waiting) == ticket:
            del self._waiting[waiting]
            waiting.switch()


class Event:
    """An event that one thread of a process waits for, as `asyncio.wait_for(event.wait(), timeout)` does."""

    def __init__(self, process: Process) -> None:
        self._condition = Condition(process)
        self._set = False

    def set(self) -> None:
        """Wake the waiters."""
        if not self._set:
            self._set = True
            self._condition.notify_all()

    def clear(self) -> None:
        """Wait again from here on."""
        self._set = False

    def wait(self, timeout_s: float) -> None:
        """Block until it is set, at most `timeout_s` seconds."""
        self._condition.wait_for(lambda: self._set, timeout_s)
