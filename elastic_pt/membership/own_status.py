"""This node's own status, shared by the threads of its agent."""

import dataclasses
import threading

from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.membership.resources import Resources


class OwnStatus:
    """This node's own `NodeStatus`. Agent process; thread-safe."""

    def __init__(self, first: NodeStatus, resources: Resources) -> None:
        self._status = first
        self._log = resources.log
        self._clock_s = resources.clock_s
        self._states = resources.states
        self._lock = threading.Lock()
        self._resting = ""
        self._rest_until_s = float("-inf")
        self._stepped_s: float | None = None
        self.leaving = False
        """Whether this node wants to leave. Not in `_status`: a signal handler must not take its lock."""
        self.leave_reason = ""
        """Why this node leaves; empty if nothing more is known than that it was asked to."""

    @property
    def stated(self) -> NodeStatus:
        """The status last set, without the values that follow from the log, the clock and the memory."""
        return self._status

    @property
    def now(self) -> NodeStatus:
        """The complete status."""
        view, now_s, stepped_s = self._log.view, self._clock_s(), self._stepped_s
        return dataclasses.replace(
            self._status,
            log_length=view.length,
            generation=view.generation_number,
            leaving=self.leaving,
            leave_reason=self.leave_reason if self.leaving else "",
            resting=self._resting if now_s < self._rest_until_s else "",
            step_age_s=None if stepped_s is None else round(max(0.0, now_s - stepped_s), 3),
            held=self._states.held,
            unusable=self._states.unusable,
        )

    def say(self, **changes: object) -> None:
        """Change fields of the status."""
        with self._lock:
            self._status = dataclasses.replace(self._status, **changes)  # type: ignore[arg-type]

    def step_done(self, step: int, loss: float | None) -> None:
        """The workers have done a step."""
        with self._lock:
            self._status = dataclasses.replace(self._status, step=step, loss=loss)
            self._stepped_s = self._clock_s()

    def rest(self, why: str, seconds: float) -> None:
        """Take no part in the run for so many seconds."""
        with self._lock:
            self._resting, self._rest_until_s = why, self._clock_s() + seconds

    def give_up(self, generation: int) -> None:
        """State that this generation is broken; an older number changes nothing."""
        with self._lock:
            if generation > self._status.broken:
                self._status = dataclasses.replace(self._status, broken=generation)
