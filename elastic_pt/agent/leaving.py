"""When this node leaves the run in good order, and how long it may take. Agent process.

    signal (main thread) ───────────────┐
    notice (thread of notices.watch) ───┴─► Node.request_leave, and an alarm at the end of the time there is

A signal asks for good. A notice asks for as long as it is in force: if it is withdrawn in time, the node stays.
"""

import math
import signal
import time
from types import FrameType
from typing import Final

import structlog
from torch.distributed.elastic.multiprocessing.api import SignalException

from elastic_pt.membership.node import Node
from elastic_pt.notices.notice import CheckpointNow, Decision, Leave, Stay
from elastic_pt.notices.signals import ENDING_SIGNALS, LEAVE_SIGNALS, leave_reason

_TIME_MIN_S: Final = 1.0
"""What a node may take even if its machine should be gone already: it may be there for a moment longer."""

log = structlog.get_logger("elastic_pt.agent.leaving")


class Leaving:
    """Has the node leave. `signalled` runs on the main thread, `heed` on the thread of the notices."""

    def __init__(self, node: Node, leave_timeout_s: float) -> None:
        self._node = node
        self._leave_timeout_s = leave_timeout_s
        # No lock: a signal handler must not wait for one.
        self._asked_deadline_s = math.inf
        self._notice_deadline_s = math.inf
        self._to_end = False
        """Whether a signal has come that ends the agent when it comes again."""

    def listen(self) -> None:
        """Handle this process's signals from now on. Main thread."""
        for number in (*LEAVE_SIGNALS, signal.SIGALRM):
            signal.signal(number, self.signalled)

    def signalled(self, number: int, _: FrameType | None) -> None:
        """Signal handler: the first one asks to leave, a second one or the alarm ends the agent."""
        ends = number in ENDING_SIGNALS
        if number == signal.SIGALRM or (ends and self._to_end):
            if self._node.leaving:
                raise SignalException(f"signal {number}", signal.Signals(number))
            # The alarm of a notice that has just been withdrawn.
            return
        self._to_end = self._to_end or ends
        self.ask(leave_reason(number), self._leave_timeout_s)

    def ask(self, reason: str, within_s: float) -> None:
        """Leave for good, within so many seconds. Any thread."""
        self._asked_deadline_s = min(self._asked_deadline_s, time.monotonic() + within_s)
        self._node.request_leave(reason)
        self._set_alarm()

    def heed(self, decision: Decision) -> None:
        """Do what the notices in force mean."""
        match decision:
            case Leave(notice):
                latest_s = time.monotonic() + self._leave_timeout_s
                self._notice_deadline_s = min(notice.deadline_s, latest_s)
                self._node.request_leave(str(notice))
                self._set_alarm()
            case CheckpointNow(notice):
                # Commits come every `checkpoint.every_steps`. Nothing here can ask for one in between.
                log.warning("machine_at_risk", source=notice.source, detail=notice.detail)
                self._stay()
            case Stay():
                self._stay()

    def _stay(self) -> None:
        if self._notice_deadline_s == math.inf:
            return
        self._notice_deadline_s = math.inf
        if self._asked_deadline_s == math.inf:
            log.warning("leave_cancelled", in_time=self._node.cancel_leave())
        if self._asked_deadline_s != math.inf:
            # A signal may have come meanwhile.
            self._node.request_leave()
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Have SIGALRM come at the earlier deadline. The other thread may set it at the same time, so look again."""
        deadline_s = -math.inf
        while deadline_s != (earlier_s := min(self._asked_deadline_s, self._notice_deadline_s)):
            deadline_s = earlier_s
            left_s = max(_TIME_MIN_S, deadline_s - time.monotonic())
            signal.setitimer(signal.ITIMER_REAL, 0.0 if deadline_s == math.inf else left_s)
