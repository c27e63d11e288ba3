"""What this node says of itself, shared by the threads of its agent."""

import dataclasses
import threading
from collections.abc import Callable

from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.log import RunLog


class OwnStatus:
    """This node's own `NodeStatus`. Agent process; safe to share between threads."""

    def __init__(self, first: NodeStatus, log: RunLog, clock_s: Callable[[], float]) -> None:
        self._status = first
        self._log = log
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._resting = ""
        self._rest_until_s = float("-inf")
        self.leaving = False
        """Whether this node wants to leave. Not in `_status`: a signal handler must not take its lock."""
        self.leave_reason = ""
        """Why, if there is more to say than that it was asked to."""

    @property
    def stated(self) -> NodeStatus:
        """What was said last, without the values that follow from the log and the clock."""
        return self._status

    @property
    def now(self) -> NodeStatus:
        """The complete status."""
        view = self._log.view
        return dataclasses.replace(
            self._status,
            log_length=view.length,
            generation=view.generation_number,
            leaving=self.leaving,
            leave_reason=self.leave_reason if self.leaving else "",
            resting=self._resting if self._clock_s() < self._rest_until_s else "",
        )

    def say(self, **changes: object) -> None:
        """Change fields of the status."""
        with self._lock:
            self._status = dataclasses.replace(self._status, **changes)  # type: ignore[arg-type]

    def rest(self, why: str, seconds: float) -> None:
        """Take no part in the run for so many seconds."""
        with self._lock:
            self._resting, self._rest_until_s = why, self._clock_s() + seconds

    def give_up(self, generation: int) -> None:
        """State that this generation is broken; an older number changes nothing."""
        with self._lock:
            if generation > self._status.broken:
                self._status = dataclasses.replace(self._status, broken=generation)
