"""Appends a node's decisions to the run's log: GENERATION (with QUARANTINE), STOP, RECOVERY, and CONTROL."""

from dataclasses import replace

import structlog

from elastic_pt import __version__
from elastic_pt.errors import FencedError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.decision.admission import slots_per_member
from elastic_pt.membership.decision.budgets import quarantines_due, restarts_of
from elastic_pt.membership.decision.decide import Halt, Propose
from elastic_pt.membership.decision.memory import Memory
from elastic_pt.membership.decision.progress import frontier_step, reached_step
from elastic_pt.membership.decision.resume import newest_in_memory, why_not_memory
from elastic_pt.membership.decision.status import Limits, NodeStatus, StartTimes
from elastic_pt.membership.own_status import OwnStatus
from elastic_pt.membership.peers import PeerTable
from elastic_pt.membership.resources import BoundStore, Resources
from elastic_pt.runlog.control import carried_out
from elastic_pt.runlog.identity import require_platform_since_start
from elastic_pt.runlog.ignored import ignored_next
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation, Quarantine, Recovery, Request, Stop

log = structlog.get_logger("elastic_pt.participant")


class Appender:
    """Appends for one node. Agent process; called from the thread of `Participant.turn`, may block on the bucket."""

    def __init__(
        self,
        me: OwnStatus,
        table: PeerTable,
        memory: Memory,
        limits: Limits,
        resources: Resources,
    ) -> None:
        self._me = me
        self._table = table
        self._memory = memory
        self._limits = limits
        self._resources = resources
        self._log = resources.log
        self._clock_s = resources.clock_s
        self._waived_generation = resources.log.view.waived_generation
        """The state when this node's platform was compared with the run's, just before."""
        self.stores: dict[int, BoundStore] = {}
        """The store that this node bound for the generation that it proposed last, by the generation's number."""
        self._noticed_s: dict[int, float] = {}
        """When the generation before that one was found broken or over, by the number of the new one."""

    def require_platform(self, view: RunView) -> None:
        """Raise `ConfigError` if the run has changed to another platform since this agent was started."""
        require_platform_since_start(
            self._resources.hints.url, view, self._resources.platform, self._waived_generation
        )

    def propose(self, proposal: Propose) -> None:
        """Bind the next generation's store, then append its GENERATION. The log may accept another node's instead."""
        before = self._log.view
        number = before.generation_number + 1
        resume = self._resources.choose_resume(before)
        if self._log.view.generation_number >= number:
            # Quarantining an unusable checkpoint has read the log to its end: another node has proposed already.
            self._read()
            return
        committed_step = 0 if resume is None else resume.step
        facts = before.generation, proposal.members, self._statuses(), committed_step
        memory = newest_in_memory(*facts)
        resume_step = committed_step if memory is None else memory.step
        reached = self.reached_step(before.generation)
        reached = None if reached is None else max(reached, resume_step)
        store = self._resources.bind_store()
        noticed_s = self._memory.broken_since_s
        generation = Generation(
            number=number,
            members=proposal.members,
            slots=slots_per_member(proposal.members, self._limits.slots),
            store_address=self._me.stated.member.address,
            store_port=store.port,
            resume=resume,
            reason=proposal.reason,
            causes=proposal.causes,
            frontier_step=max(frontier_step(before.generation, reached), resume_step),
            reached_step=reached,
            below_minimum_s=0.0 if noticed_s is None else self._memory.below_minimum_s,
            platform=self._resources.platform,
            fenced_url=self._resources.fenced_url or before.fenced_url,
            release=__version__,
            memory=memory,
            mirrors=self._resources.choose_mirrors([each.zone for each in proposal.members]),
            why_not_memory=why_not_memory(*facts) if memory is None else "",
            ignored=ignored_next(
                () if before.generation is None else before.generation.ignored,
                [span for cause in proposal.causes for span in cause.damage],
                resume_step,
            ),
        )
        generation = replace(generation, restarts=restarts_of(before, generation))

        def make(view: RunView) -> Generation:
            self.require_platform(view)
            # The old generation may commit until the new one is in the log. The new one must resume from that commit.
            if view.commit != before.commit:
                raise FencedError(
                    f"a newer checkpoint was committed than the one that generation {number} would start from"
                )
            # Not before: a read of the log may have waited for the bucket.
            agree_s = 0.0 if noticed_s is None else self._clock_s() - noticed_s
            return replace(generation, agree_s=agree_s)

        try:
            self.stores = {number: store}
            self._noticed_s = {} if noticed_s is None else {number: noticed_s}
            failpoint(Failpoint.GENERATION_CHOSEN)
            self._log.append(make, generation=number - 1)
            failpoint(Failpoint.GENERATION_APPENDED)
            self._read()
        except FencedError as error:
            self.stores = {}
            log.info("proposal_lost", number=number, reason=str(error))
            self._read()
            return
        log.info(
            "generation",
            number=number,
            members=[each.node for each in proposal.members],
            resume_step=generation.resume_step,
            restored_from=generation.restored_from,
            why_not_memory=generation.why_not_memory,
            reason=proposal.reason,
        )
        for each in generation.ignored:
            if before.generation is None or each not in before.generation.ignored:
                log.warning(
                    "data_left_out",
                    source=each.span.source,
                    # A key with `token` in it would be redacted.
                    span=list(each.span.tokens),
                    file=each.span.file,
                    first_step=each.first_step,
                )
        self._append_quarantines(number)

    def halt(self, decision: Halt) -> None:
        """Append STOP."""
        view = self._log.view
        steps = [each.step for each in view.checkpoints[:1]]
        stop = Stop(decision.reason, max(steps, default=0))
        if self._append(stop, view.generation_number):
            log.error("stop", reason=stop.reason, step=stop.step)

    def answer(self, request: Request) -> None:
        """Append CONTROL: what an operator asked for is done."""
        log.info("request_done", request=str(request))
        try:
            number = self._log.view.generation_number
            self._log.append(lambda view: carried_out(view, request), generation=number)
        except FencedError as error:
            log.info("append_fenced", kind="Control", reason=str(error))
        self._read()

    def report_recovery(self) -> None:
        """As the first member: append RECOVERY when all members have reported the times of the generation's start."""
        view = self._log.view
        generation, number, me = view.generation, view.generation_number, self._me.stated
        told = view.recovery is not None and view.recovery.number >= number
        if generation is None or told or view.stop is not None or me.broken >= number:
            return
        if generation.rank_of(me.member.incarnation) != 0:
            return
        times = self._start_times(generation, me)
        if len(times) < len(generation.members) or any(each.generation != number for each in times):
            return
        # Members wait for each other between the phases, so each phase ends when the slowest member ends it.
        ends = [
            max(each.start_s for each in times),
            max(each.start_s + each.group_s for each in times),
            max(each.start_s + each.group_s + each.restore_s for each in times),
            max(each.start_s + each.group_s + each.restore_s + each.step_s for each in times),
        ]
        recovery = Recovery(
            number=number,
            start_s=ends[0],
            group_s=ends[1] - ends[0],
            restore_s=ends[2] - ends[1],
            step_s=ends[3] - ends[2],
            total_s=self._agreed_after_s(generation) + ends[3],
        )
        self._append(recovery, number)

    def reached_step(self, generation: Generation | None) -> int | None:
        """The newest step that this generation is known to have done, by its members or else by the pulse; None if unknown."""
        if generation is None:
            return 0
        reached = reached_step(generation, self._statuses())
        return self._memory.pulse_step(generation.number) if reached is None else reached

    def _statuses(self) -> dict[str, NodeStatus]:
        """The newest status of each node, this one included, by incarnation."""
        known = {
            incarnation: peer.status
            for incarnation, peer in dict(self._table.peers).items()
            if peer.status is not None
        }
        me = self._me.now
        return known | {me.member.incarnation: me}

    def _start_times(self, generation: Generation, me: NodeStatus) -> list[StartTimes]:
        statuses = self._statuses() | {me.member.incarnation: me}
        told = [statuses.get(each.incarnation) for each in generation.members]
        return [each.start_times for each in told if each is not None and each.start_times]

    def _agreed_after_s(self, generation: Generation) -> float:
        """Seconds from detection until the record was read; for another node's record, until that node made it."""
        noticed_s = self._noticed_s.get(generation.number)
        if noticed_s is None:
            return generation.agree_s
        read_s = self._memory.read_at_s(generation.number)
        return (self._clock_s() if read_s is None else read_s) - noticed_s

    def _append_quarantines(self, number: int) -> None:
        """Append a QUARANTINE for each node that has exceeded its budget with the new generation's causes."""
        due = quarantines_due(
            self._log.view, self._memory.moments, self._limits.elastic, self._clock_s()
        )
        for each in due:
            if self._append(each, number):
                log.warning(
                    "node_kept_out", kept_out=each.node, seconds=each.seconds, reason=each.why
                )

    def _append(self, body: Recovery | Quarantine | Stop, number: int) -> bool:
        """Append the record; False if the log no longer allows it, because another node was faster."""
        try:
            self._log.append(lambda _: body, generation=number)
            return True
        except FencedError as error:
            log.info("append_fenced", kind=type(body).__name__, reason=str(error))
            return False
        finally:
            self._read()

    def _read(self) -> None:
        self._memory.log_read(self._log.view, self._clock_s())
