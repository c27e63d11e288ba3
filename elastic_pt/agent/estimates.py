"""How long a step, a snapshot and an upload of this node take, and what fits in the time before it must leave.

    steps, completions ─► Estimates: moving averages ─► Times ─┐
    seconds until the machine is taken away ─────────────────┴─► plan_leave ─► LeavePlan

A node that leaves has the next step agreed on by all workers and a state of that step made. The state must then be in
the memory of the members that stay, or in the bucket, whichever is sooner. If neither is possible in time, the node ends
at once: the others then start again sooner, and lose no more than they lose when a node vanishes. Agent process.

An evaluation is never broken off for a leave: its step would be in the history without its held-out loss. So what is left
of it counts. A node that ends at once in an evaluation has its step done and evaluated again, like a node that vanishes.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

_NEWEST_SHARE: Final = 0.2
"""The share of the newest value in a moving average."""
_STEPS_TO_AGREE: Final = 2.0
"""The step that is being computed, and one more: a step has the requests that were there when it began."""
_UPLOAD_MARGIN: Final = 1.3
"""A bucket's time varies more than that of memory."""
_STEPS_KEPT: Final = 4096
_UNMEASURED_STEPS_S: Final = 1.0
"""Time that counts for `_STEPS_TO_AGREE` before a step has been measured."""


@dataclass(frozen=True)
class Times:
    """Moving averages of this node. None until there is a first value."""

    step_s: float | None = None
    snapshot_s: float | None = None
    """From the end of a step until its state is whole on this node and on its mirrors. None without mirrors."""
    upload_s: float | None = None
    """From the end of a step until this node has uploaded its share of that checkpoint; on the committing node, until the COMMIT."""
    evaluations_s: float | None = None
    """No average: what is left of the evaluations after the steps that are still to be done."""


class Way(StrEnum):
    """How a node leaves."""

    MEMORY = "memory"
    """When the members that stay hold its state, or it is committed."""
    BUCKET = "bucket"
    """When its state is committed."""
    AT_ONCE = "at_once"
    """Without its state."""


@dataclass(frozen=True)
class LeavePlan:
    """How a node will leave, and why."""

    way: Way
    reason: str


def plan_leave(
    lead_s: float, times: Times, *, alone: bool, mirrors_leave: bool = False
) -> LeavePlan:
    """How to leave within `lead_s` seconds. `alone`: no other node can continue. Pure.

    `mirrors_leave`: all nodes that copy this one's state leave too, so no member that stays will hold it.
    Without a first value, a part counts as taking no time: it is tried.
    """
    work_s = _UNMEASURED_STEPS_S if times.step_s is None else _STEPS_TO_AGREE * times.step_s
    work_s += times.evaluations_s or 0.0
    needs_s = {Way.BUCKET: work_s + _UPLOAD_MARGIN * (times.upload_s or 0.0)}
    if times.snapshot_s is not None and not alone and not mirrors_leave:
        needs_s = {Way.MEMORY: work_s + times.snapshot_s, **needs_s}
    for way, need_s in needs_s.items():
        if need_s <= lead_s:
            return LeavePlan(way, f"needs about {need_s:.1f} of {lead_s:.1f} s")
    if alone:
        return LeavePlan(Way.BUCKET, "no other node waits for this one")
    need_s = min(needs_s.values())
    return LeavePlan(Way.AT_ONCE, f"needs about {need_s:.1f} s, but {lead_s:.1f} s are left")


class Estimates:
    """Computes the averages. Called from the threads of the channel, the snapshots, the uploads and the notices."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._times = Times()
        self._evaluation_s: float | None = None
        self._ends_s: dict[int, float] = {}
        """When each of the newest steps ended."""

    @property
    def times(self) -> Times:
        """The averages now."""
        return self._times

    def times_to_leave(self, evaluated: Callable[[int], bool]) -> Times:
        """The averages, and what is left of evaluations; `evaluated(step)` tells which steps have one."""
        with self._lock:
            times, evaluation_s = self._times, self._evaluation_s
            if evaluation_s is None or times.step_s is None:
                return times
            newest, ended_s = next(reversed(self._ends_s.items()))
            # After the step that has begun. Its evaluation may have begun, too.
            spent_s = max(0.0, self._clock_s() - ended_s - times.step_s)
        left_s = max(0.0, evaluation_s - spent_s) if evaluated(newest + 1) else 0.0
        # After the step in which all agree.
        left_s += evaluation_s if evaluated(newest + 2) else 0.0
        return replace(times, evaluations_s=left_s)

    def step_done(self, step: int, seconds: float, evaluation_s: float | None = None) -> None:
        """This node's first worker has done a step, and perhaps an evaluation after it."""
        with self._lock:
            self._times = replace(self._times, step_s=_averaged(self._times.step_s, seconds))
            if evaluation_s is not None:
                self._evaluation_s = _averaged(self._evaluation_s, evaluation_s)
            self._ends_s.pop(step, None)
            self._ends_s[step] = self._clock_s()
            if len(self._ends_s) > _STEPS_KEPT:
                del self._ends_s[next(iter(self._ends_s))]

    def held(self, step: int) -> None:
        """The state of a step is whole on this node and on its mirrors."""
        with self._lock:
            if step in self._ends_s:
                seconds = self._clock_s() - self._ends_s[step]
                self._times = replace(
                    self._times, snapshot_s=_averaged(self._times.snapshot_s, seconds)
                )

    def uploaded(self, step: int) -> None:
        """This node has done its share of the checkpoint of a step."""
        with self._lock:
            if step in self._ends_s:
                seconds = self._clock_s() - self._ends_s[step]
                self._times = replace(
                    self._times, upload_s=_averaged(self._times.upload_s, seconds)
                )


def _averaged(average_s: float | None, newest_s: float) -> float:
    return newest_s if average_s is None else average_s + _NEWEST_SHARE * (newest_s - average_s)
