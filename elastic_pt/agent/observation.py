"""What a node measures of its own workers: metrics, goodput, and how long each start took. Agent process."""

import threading
import time
from collections.abc import Callable
from typing import Final

from elastic_pt.agent.estimates import Estimates
from elastic_pt.membership.decision.status import StartTimes
from elastic_pt.runlog.records import Generation
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Activity, GoodputLedger
from elastic_pt.workers.channel import Message

_ACTIVITIES: Final = {"start": Activity.START, "restore": Activity.RESTORE, "train": Activity.START}


class Observation:
    """Turns the messages of workers into numbers. Called from the channel's threads and the main thread."""

    def __init__(self, metrics: Metrics, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.metrics = metrics
        self.estimates = Estimates(clock_s)
        self._clock_s = clock_s
        self._ledger = GoodputLedger(clock_s())
        self._lock = threading.Lock()
        self._generation = 0
        self._entered_s: dict[str, float] = {}
        self._awaits_first_step = False

    def enter(self, activity: Activity) -> None:
        """Count this node's time for another activity from now on."""
        # Read the clock inside the lock: a thread that waited for the lock would have an old time.
        with self._lock:
            now_s = self._clock_s()
            self._ledger.enter(activity, now_s)
            self.metrics.account(self._ledger.snapshot(now_s))

    def waits(self, *, paused: bool) -> None:
        """This node has no workers: the run is `paused`, or the nodes look for the next generation."""
        self.enter(Activity.PAUSED if paused else Activity.FORM)

    def starts(self, generation: Generation, known_s: float) -> None:
        """The workers of a generation, known to this node since `known_s`, are about to start."""
        with self._lock:
            self._generation = generation.number
            self._entered_s = {"known": known_s}
            self._awaits_first_step = True
        self.metrics.generations.inc()
        self.metrics.generation.set(generation.number)
        self.metrics.nodes.set(len(generation.members))
        self.metrics.world_size.set(generation.world_size)
        self.enter(Activity.START)

    def activity(self, name: str) -> None:
        """A worker has started to `start`, `restore` or `train`; of several workers the last one counts."""
        with self._lock:
            self._entered_s[name] = self._clock_s()
        self.enter(_ACTIVITIES[name])

    def step_done(self, message: Message) -> StartTimes | None:
        """A worker of this node has done a step; returns the times of the start after the first step."""
        self.metrics.step_done(message)
        self.estimates.step_done(int(message["step"]), message["seconds"])
        with self._lock:
            now_s = self._clock_s()
            self._ledger.step_done(int(message["step"]), now_s)
            self.metrics.account(self._ledger.snapshot(now_s))
            if not self._awaits_first_step:
                return None
            self._awaits_first_step = False
            known_s, start_s, restore_s, train_s = (
                self._entered_s.get(each, now_s) for each in ("known", "start", "restore", "train")
            )
        return StartTimes(
            self._generation,
            start_s=start_s - known_s,
            group_s=restore_s - start_s,
            restore_s=train_s - restore_s,
            step_s=now_s - train_s,
        )
