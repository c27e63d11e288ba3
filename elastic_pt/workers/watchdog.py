"""When a worker counts as hung: a pure function of its heartbeat and the time. Agent process.

    standstill    no tick for `hang_timeout_s`, or on a slow machine for 3 times the longest gap of the last minutes:
                  the process is stopped, sleeps in the kernel, or never releases the interpreter's lock
    no progress   it ticks, but step and phase have not changed for `progress_timeout_s`, or, if steps are long, for
                  6 times a long step

A worker that waits in a collective for a hung worker still ticks, so only the second rule could apply to it. That
rule takes longer, so the agent of the hung worker has already acted on the first rule. `startup_timeout_s` applies
before the first steps are done, in phases that move bytes or wait for the bucket, and in each pass of an evaluation:
these have no typical duration. An evaluation does not make its step a long one.

Time in which the agent did not observe (it was stopped, or the whole machine was) does not count.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from elastic_pt.workers.heartbeat import Reading, WorkerPhase

_LOOK_GAP_MAX_S: Final = 1.0
_GAP_FACTOR: Final = 3.0
_GAP_WINDOW_S: Final = 150.0
_STEP_FACTOR: Final = 6.0
_STEPS_REMEMBERED: Final = 64
_STEPS_BEFORE_JUDGING: Final = 8
_STEPS_BEFORE_DROPPING: Final = 16

_STOPPED: Final = ("T", "t")
_ENDING: Final = ("Z", "X", "")
# The first evaluation compiles, where `train.compile` is set.
_UNHURRIED: Final = (
    WorkerPhase.START,
    WorkerPhase.RESTORE,
    WorkerPhase.END,
    WorkerPhase.EVALUATE,
)
_WORDS: Final = {
    "T": "stopped",
    "t": "stopped by a debugger",
    "D": "uninterruptible sleep",
    "R": "running",
    "S": "sleeping",
    "X": "exiting",
    "Z": "ended",
    "": "gone",
}


@dataclass(frozen=True)
class WatchdogLimits:
    """The timeout of each rule. All but the last grow with the step time of the run."""

    hang_timeout_s: float = 2.0
    """Seconds without a tick."""
    progress_timeout_s: float = 30.0
    """Seconds in one step without progress. Longer than any wait for data: while another worker waits for its data,
    this one waits for that worker in a collective."""
    startup_timeout_s: float = 600.0
    """Seconds in one phase before the first steps are done, or in a phase that moves bytes. Does not grow."""


@dataclass(frozen=True)
class Hang:
    """Why a worker counts as hung."""

    standstill: bool
    """True for standstill, False for no progress."""
    seconds: float
    limit_s: float
    step: int
    phase: WorkerPhase
    state: str
    """The process's state letter."""

    def __str__(self) -> str:
        if self.standstill:
            where = _WORDS.get(self.state, f"state {self.state}")
            return f"wrote no heartbeat for {self.seconds:.1f} s at step {self.step} ({where})"
        return (
            f"made no progress for {self.seconds:.1f} s at step {self.step} "
            f"({self.phase.name.lower()}, limit {self.limit_s:.1f} s)"
        )


class Detector:
    """Watches one worker from its start. More frequent calls of `observe` detect a hang sooner."""

    def __init__(self, limits: WatchdogLimits, now_s: float) -> None:
        self._limits = limits
        self._looked_s = now_s
        self._last: Reading | None = None
        self._still_s = 0.0
        self._unchanged_s = 0.0
        self._cycle_s = 0.0
        self._stage_s = 0.0
        self._cycles_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._gap_s, self._earlier_gap_s, self._gap_window_until_s = 0.0, 0.0, now_s + _GAP_WINDOW_S

    def observe(self, now_s: float, reading: Reading | None, state: str) -> Hang | None:
        """The hang, if there is one, after the worker's heartbeat and its process's state letter at `now_s`."""
        passed_s = min(now_s - self._looked_s, _LOOK_GAP_MAX_S)
        self._looked_s = now_s
        self._unchanged_s += passed_s
        if reading is not None:
            self._take_tick(now_s, reading, passed_s)
            self._take_progress(reading, passed_s)
            self._last = reading
        return self._standstill(state) or self._no_progress(state)

    def stopped(self, state: str) -> Hang | None:
        """A hang if it is stopped now: it is the likely cause when another worker lost its connection."""
        return self._hang(True, self._still_s, 0.0, state) if state in _STOPPED else None

    def _take_tick(self, now_s: float, reading: Reading, passed_s: float) -> None:
        self._still_s += passed_s
        if now_s >= self._gap_window_until_s:
            self._gap_s, self._earlier_gap_s = 0.0, self._gap_s
            self._gap_window_until_s = now_s + _GAP_WINDOW_S
        if self._last is None or reading.ticks != self._last.ticks:
            if self._steps_by():
                self._gap_s = max(self._gap_s, self._still_s)
            self._still_s = 0.0

    def _take_progress(self, reading: Reading, passed_s: float) -> None:
        self._cycle_s += passed_s
        last = self._last
        if last is None:
            self._unchanged_s = self._cycle_s = 0.0
            return
        if (reading.changed_s, reading.step, reading.phase) == (
            last.changed_s,
            last.step,
            last.phase,
        ):
            return
        if last.phase is WorkerPhase.STAGE:
            self._stage_s = self._unchanged_s
        if reading.step > last.step and last.phase not in _UNHURRIED:
            self._cycles_s.append(self._cycle_s / (reading.step - last.step))
        if reading.step != last.step or last.phase in _UNHURRIED:
            self._cycle_s = 0.0
        self._unchanged_s = 0.0

    def _standstill(self, state: str) -> Hang | None:
        if self._last is None or self._last.ticks == 0:
            return None
        limit_s = self._limits.hang_timeout_s
        if state in _ENDING:
            # It is exiting. Freeing much memory takes time.
            limit_s = self._limits.progress_timeout_s
        elif state not in _STOPPED:
            # Imports, compilation and device set-up may hold the interpreter's lock for a long time.
            if not self._steps_by():
                return None
            limit_s = max(limit_s, _GAP_FACTOR * max(self._gap_s, self._earlier_gap_s))
        return self._hang(True, self._still_s, limit_s, state) if self._still_s > limit_s else None

    def _steps_by(self) -> bool:
        """Whether it is between its first finished step and its last step."""
        return (
            self._last is not None and self._last.phase not in _UNHURRIED and bool(self._cycles_s)
        )

    def _no_progress(self, state: str) -> Hang | None:
        limit_s = self._progress_limit_s()
        if self._unchanged_s <= limit_s:
            return None
        return self._hang(False, self._unchanged_s, limit_s, state)

    def _progress_limit_s(self) -> float:
        computes = self._last is not None and self._last.phase is WorkerPhase.COMPUTE
        if not computes or len(self._cycles_s) < _STEPS_BEFORE_JUDGING:
            return self._limits.startup_timeout_s
        # With many steps, ignore the longest: a single slow step must not raise the limit.
        drop = len(self._cycles_s) >= _STEPS_BEFORE_DROPPING
        long_step_s = sorted(self._cycles_s)[-2 if drop else -1]
        # This worker may wait in its next step for another one that still stages its checkpoint.
        return max(self._limits.progress_timeout_s, _STEP_FACTOR * max(long_step_s, self._stage_s))

    def _hang(self, standstill: bool, seconds: float, limit_s: float, state: str) -> Hang:
        step = self._last.step if self._last else 0
        phase = self._last.phase if self._last else WorkerPhase.START
        return Hang(standstill, seconds, limit_s, step, phase, state)
