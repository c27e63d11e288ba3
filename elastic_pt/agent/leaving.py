"""When this node leaves the run in good order, and how long it may take. Agent process.

    signal (main thread) ───────────────┐
    notice (thread of notices.watch) ───┴─► Node.request_leave, and an alarm at the deadline

A signal cannot be taken back. A notice counts as long as it is in force: if it is withdrawn in time, the node stays.
If nothing can be saved before a notice's deadline (`estimates.plan_leave`), the alarm comes at once.
"""

import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import structlog
from torch.distributed.elastic.multiprocessing.api import SignalException

from elastic_pt.agent.estimates import Times, Way, plan_leave
from elastic_pt.errors import FencedError, StoreError
from elastic_pt.membership.node import Node
from elastic_pt.notices.notice import CheckpointNow, Decision, Leave, Notice, Stay
from elastic_pt.notices.signals import ENDING_SIGNALS, LEAVE_SIGNALS, leave_reason
from elastic_pt.runlog.control import carried_out
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Request, Verb

_TIME_MIN_S: Final = 1.0
"""Minimum time to leave, also after the deadline of a notice: the machine may exist a moment longer."""
_TELL_S: Final = 0.1
"""Time to tell the other nodes why this node ends, if it does not try to leave in good order."""

log = structlog.get_logger("elastic_pt.agent.leaving")


class Leaving:
    """Makes the node leave. `signalled` runs on the main thread, `heed` on the notices thread."""

    def __init__(
        self,
        node: Node,
        leave_timeout_s: float,
        times: Callable[[], Times],
        at_risk: Callable[[Notice], None],
    ) -> None:
        """`times()`: what this node has measured. `at_risk(notice)` has a checkpoint made soon and returns at once."""
        self._node = node
        self._leave_timeout_s = leave_timeout_s
        self._times = times
        self._at_risk = at_risk
        # No lock: a signal handler must not wait for one.
        self._asked_deadline_s = math.inf
        self._notice_deadline_s = math.inf
        self._time_min_s = _TIME_MIN_S
        self._to_end = False
        """Whether one of `ENDING_SIGNALS` has arrived: the next one ends the agent."""

    def listen(self) -> None:
        """Handle this process's signals from now on. Main thread."""
        for number in (*LEAVE_SIGNALS, signal.SIGALRM):
            signal.signal(number, self.signalled)

    def signalled(self, number: int, _: FrameType | None) -> None:
        """Signal handler: the first signal asks to leave, a second one or the alarm ends the agent."""
        ends = number in ENDING_SIGNALS
        if number == signal.SIGALRM or (ends and self._to_end):
            if self._node.leaving:
                raise SignalException(f"signal {number}", signal.Signals(number))
            # This is the alarm of a notice that has just been withdrawn.
            return
        self._to_end = self._to_end or ends
        self.ask(leave_reason(number), self._leave_timeout_s)

    def ask(self, reason: str, within_s: float) -> None:
        """Leave within `within_s` seconds; this is not taken back. Any thread."""
        self._asked_deadline_s = min(self._asked_deadline_s, time.monotonic() + within_s)
        self._node.request_leave(reason)
        self._set_alarm()

    def drained(self, within_s: float) -> None:
        """An operator asks this node to leave, within so many seconds (0: as configured). Called again until it leaves."""
        reason = str(self._drain_request() or "")
        if not self._node.leaving:
            log.info("drained", reason=reason, seconds=within_s)
        self.ask(reason, within_s or self._leave_timeout_s)

    def answer_drain(self, run_log: RunLog) -> None:
        """This node has left. Append that to the log, if an operator asked for it there."""
        request = self._drain_request()
        if request is None:
            return
        number = self._node.view.generation_number
        try:
            run_log.append(lambda view: carried_out(view, request), generation=number)
        except FencedError as error:
            log.info("append_fenced", kind="Control", reason=str(error))
        except StoreError as error:
            # The next agent of this name leaves, too.
            log.warning("drain_not_answered", cause=str(error))

    def _drain_request(self) -> Request | None:
        return self._node.view.request(Verb.DRAIN, self._node.member.node)

    def heed(self, decision: Decision) -> None:
        """Act on the decision about the notices in force."""
        match decision:
            case Leave(notice):
                self._leave(notice, time.monotonic())
            case CheckpointNow(notice):
                log.warning("machine_at_risk", source=notice.source, detail=notice.detail)
                self._stay()
                self._at_risk(notice)
            case Stay():
                self._stay()

    def _leave(self, notice: Notice, now_s: float) -> None:
        deadline_s = min(notice.deadline_s, now_s + self._leave_timeout_s)
        left_s = max(0.0, deadline_s - now_s)
        times = self._times()
        plan = plan_leave(
            left_s, times, alone=self._node.alone, mirrors_leave=self._node.mirrors_leave
        )
        log.warning(
            "leave_planned",
            source=notice.source,
            lead_s=round(notice.lead_s, 3),
            within_s=round(left_s, 3),
            way=plan.way,
            reason=plan.reason,
            **{name: value and round(value, 3) for name, value in vars(times).items()},
        )
        at_once = plan.way is Way.AT_ONCE
        self._time_min_s = _TELL_S if at_once else _TIME_MIN_S
        self._notice_deadline_s = now_s if at_once else deadline_s
        self._node.request_leave(str(notice))
        self._set_alarm()

    def _stay(self) -> None:
        if self._notice_deadline_s == math.inf:
            return
        self._notice_deadline_s, self._time_min_s = math.inf, _TIME_MIN_S
        if self._asked_deadline_s == math.inf:
            log.warning("leave_cancelled", in_time=self._node.cancel_leave())
        if self._asked_deadline_s != math.inf:
            # A signal may have arrived since the check above.
            self._node.request_leave()
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Set SIGALRM for the earlier deadline. The other thread may set it at the same time, so check again."""
        deadline_s = -math.inf
        while deadline_s != (earlier_s := min(self._asked_deadline_s, self._notice_deadline_s)):
            deadline_s = earlier_s
            left_s = max(self._time_min_s, deadline_s - time.monotonic())
            signal.setitimer(signal.ITIMER_REAL, 0.0 if deadline_s == math.inf else left_s)
