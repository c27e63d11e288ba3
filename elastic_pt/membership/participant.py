"""One node's part in the membership: its messages, view, decisions and actions. No thread and no socket.

    received ──► PeerTable ─┐
    turn:  read the log ────┼──► View ──► decide ──► Appender: GENERATION, STOP, RECOVERY, CONTROL | on_… | nothing
           PulseWatch ──────┘

In production, the membership thread of `Node` drives this over real connections. The simulator drives the same
code over simulated connections. `turn` and `step_pulse` may block on the bucket. Everything else returns at once.
"""

from typing import Final

import structlog

from elastic_pt.errors import ConfigError
from elastic_pt.membership.appender import Appender
from elastic_pt.membership.contacts import Contacts
from elastic_pt.membership.decision.admission import newcomers, refusal
from elastic_pt.membership.decision.assessment import Assessment, assess
from elastic_pt.membership.decision.budgets import halt, kept_out
from elastic_pt.membership.decision.decide import (
    Decision,
    Drain,
    Ended,
    Halt,
    Paused,
    Propose,
    Save,
    Wait,
    decide,
    idle_of,
)
from elastic_pt.membership.decision.memory import Memory
from elastic_pt.membership.decision.node_states import NodeState, node_states
from elastic_pt.membership.decision.progress import frontier_step
from elastic_pt.membership.decision.shortage import Shortage
from elastic_pt.membership.decision.status import (
    Idle,
    Limits,
    NodeStatus,
    incarnations,
)
from elastic_pt.membership.decision.view import View
from elastic_pt.membership.known_nodes import KnownNodes
from elastic_pt.membership.lobby import Lobby
from elastic_pt.membership.own_status import OwnStatus
from elastic_pt.membership.peers import Message, PeerTable
from elastic_pt.membership.pulse import Pulse, PulseWatch
from elastic_pt.membership.resources import InMemoryStates, Resources
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation, Member, Verb

_READ_INTERVAL_S: Final = 1.0
"""Seconds between two reads of the log while no member answers this node."""

log = structlog.get_logger("elastic_pt.participant")


class Participant:
    """One node's part. Agent process; `turn` and `step_pulse` from one thread each, the rest from any."""

    def __init__(self, first: NodeStatus, limits: Limits, resources: Resources) -> None:
        self._limits = limits
        self._resources = resources
        self._clock_s = resources.clock_s
        self.log = resources.log
        self.me = OwnStatus(first, resources)
        self.table = PeerTable(resources.clock_s)
        self.contacts = Contacts(
            self.table, Lobby(resources.hints, resources.clock_s), limits, resources.clock_s
        )
        self.known = KnownNodes(self.me, self.table, resources.log, limits, resources.clock_s)
        self.memory = Memory(resources.clock_s())
        self.appender = Appender(self.me, self.table, self.memory, limits, resources)
        self._pulse = PulseWatch(
            self.me,
            resources.log,
            Pulse(resources.hints, first.member.incarnation),
            self.memory,
            limits.elastic.takeover_s,
            resources.clock_s,
        )
        self.decision: Decision = Wait("starting")
        self.refusal: ConfigError | None = None
        """Why the members refuse this node; None if they do not."""
        self._asked_since_s: float | None = None
        """`memory.broken_since_s` of the generation for which the peers were asked last; None before that."""
        self._log_read_s = float("-inf")
        self.view: View | None = None
        """The facts of the last turn; None before the first."""
        self._shortage = Shortage()

    @property
    def member(self) -> Member:
        """This node as a member, for its messages."""
        return self.me.stated.member

    @property
    def broken(self) -> int:
        """The newest generation that this node has found broken."""
        return self.me.stated.broken

    @property
    def states(self) -> InMemoryStates:
        """What this node holds in memory."""
        return self._resources.states

    def begin(self, member: Member) -> None:
        """Take part from now on. `member` has the port at which this node listens."""
        self.me.say(member=member)
        self.memory.begin(self._clock_s())

    # ---- messages ----------------------------------------------------------------------------------

    def message_to(self, incarnation: str, *, asks: bool) -> Message:
        """The next message to a peer."""
        me, generation = self.me.now, self.log.view.generation
        peer = self.table.peers.get(incarnation)
        refused = ""
        if peer is not None and peer.status is not None:
            refused = refusal(me, peer.status, generation)
        return self.table.message_to(incarnation, me, asks=asks, refusal=refused)

    def received(self, message: Message) -> bool:
        """Store a peer's message. True if it is a reason for a turn."""
        if message.status.member.incarnation == self.member.incarnation:
            # This node is connected to itself: an earlier incarnation had the same address and port.
            return False
        refused = bool(message.refusal) and self._may_refuse(message.status.member)
        if refused:
            self.refusal = ConfigError(
                f"{message.status.member.node} refuses this node: {message.refusal}; "
                "expected the same on all nodes (docs/upgrading.md)"
            )
        news = self.table.received(message)
        asking = isinstance(self.decision, Wait) and self.decision.asking
        return news or asking or refused

    def _may_refuse(self, sender: Member) -> bool:
        """Whether that node may refuse this one, as far as this one has read the log: see `admission.refusal`."""
        generation = self.log.view.generation
        if generation is None:
            return True
        outside = generation.rank_of(self.member.incarnation) is None
        return outside and generation.rank_of(sender.incarnation) is not None

    def wants_answers(self) -> bool:
        """Whether to ask all peers now, because the generation was found broken or over. True once per generation."""
        asked_s, self._asked_since_s = self._asked_since_s, self.memory.broken_since_s
        return self._asked_since_s is not None and self._asked_since_s != asked_s

    def interval_s(self) -> float:
        """Seconds between two messages to a peer."""
        return self._limits.interval_s(self.known.world)

    def node_states(self) -> dict[NodeState, int]:
        """The number of nodes by state, as of the last turn."""
        if self.view is None:
            return {}
        return node_states(self.view, self._clock_s(), self.known.silence_s())

    def read_at_s(self, generation: int) -> float:
        """When this node first read that generation's record; now if it has not."""
        read_s = self.memory.read_at_s(generation)
        return self._clock_s() if read_s is None else read_s

    def noticed_at_s(self, generation: int) -> float:
        """When this node noticed that a generation is broken, over or replaced; now if it is none of these."""
        newest = self.log.view.generation_number
        if newest > generation:
            return self.read_at_s(newest)
        noticed_s = self.memory.broken_since_s
        return self._clock_s() if noticed_s is None else noticed_s

    # ---- one turn ----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Read, decide, act. May block on the bucket.

        Raises `StoreError` when the bucket does not answer, and `ConfigError` when the run has changed to another
        platform since this agent was started.
        """
        self._choose_contacts()
        self._read_log()
        self.appender.require_platform(self.log.view)
        self._obey_drain()
        decision = self._decide()
        if isinstance(decision, Propose | Halt | Paused):
            # Another node may have acted already, or this node itself in a turn that never got the bucket's
            # answer. The log has priority over the messages of peers.
            self._refresh()
            decision = self._decide()
        if decision != self.decision:
            log.info("decision", kind=type(decision).__name__.lower(), reason=decision.reason)
        self.decision = decision
        idle = idle_of(decision, leaving=self.me.leaving)
        self._resources.on_decision(idle)
        self.memory.decided(self._clock_s(), too_few=idle is Idle.BELOW_MINIMUM)
        if (seconds := self._shortage.due_s(decision, self._clock_s())) is not None:
            log.warning("below_minimum", seconds=round(seconds), reason=decision.reason)
        self._act(decision)

    def _choose_contacts(self) -> None:
        unreachable = self.contacts.aim(self.log.view, self.member)
        if unreachable != self.me.stated.unreachable:
            self.me.say(unreachable=unreachable)

    def _read_log(self) -> None:
        """Read new records if a peer or the pulse's thread has found some, and regularly while cut off."""
        peers = list(self.table.peers.values())
        known = max((peer.status.log_length for peer in peers if peer.status), default=0)
        now_s = self._clock_s()
        watching = isinstance(self.decision, Wait) and self.decision.watching
        due = (self._cut_off() or watching) and now_s - self._log_read_s >= _READ_INTERVAL_S
        if self._pulse.log_has_grown or due:
            self._log_read_s, self._pulse.log_has_grown = now_s, False
            self._refresh()
        elif known > self.log.view.length:
            self._refresh(known)
        else:
            return
        self._choose_contacts()

    def _obey_drain(self) -> None:
        """Leave if an operator asks this node to. Repeated until it does."""
        request = self.log.view.request(Verb.DRAIN, self.member.node)
        if request is not None and not self.me.leaving:
            self._resources.on_leave(request.seconds)

    def _decide(self) -> Decision:
        now_s = self._clock_s()
        self.view = self._look(now_s)
        return decide(self.view, self._limits, now_s)

    def _act(self, decision: Decision) -> None:
        match decision:
            case Propose():
                self.appender.propose(decision)
            case Halt():
                self.appender.halt(decision)
            case Paused():
                self.appender.answer(decision.request)
            case Save():
                # Repeated like the drain below, until the checkpoint is committed.
                self._resources.on_checkpoint(decision.request)
                self.appender.report_recovery()
            case Drain():
                # Repeated in each turn: workers that connect later need the request, too.
                self._resources.on_drain(decision.reason)
            case Wait() | Ended():
                self.appender.report_recovery()

    # ---- the view ----------------------------------------------------------------------------------

    def _look(self, now_s: float) -> View:
        """The facts of this turn. Stores the facts that later turns need."""
        run, me, peers, memory = self.log.view, self.me.now, dict(self.table.peers), self.memory
        memory.log_read(run, now_s)
        generation, found, must_halt = run.generation, None, ""
        if (
            generation is not None
            and generation.rank_of(me.member.incarnation) is not None
            and run.stop is None
        ):
            read_s = self.read_at_s(generation.number)
            found = assess(me, generation, peers, read_s, self._limits, now_s)
            self._note_broken(generation, found, now_s)
            must_halt = self._must_halt(run, generation, found, now_s)
        else:
            memory.broken_since_s = None
        failures = () if found is None else found.failures
        barred = kept_out(run, memory.moments, failures, self._limits.elastic, now_s)
        waiting = newcomers(me, generation, peers, self._limits, now_s)
        free = (each.member for each in waiting if each.member.node not in barred)
        memory.newcomers_seen(incarnations(free), peers, now_s)
        return View(
            me=me,
            generation=generation,
            stop=run.stop,
            found=found,
            peers=peers,
            newcomers=waiting,
            newcomers_changed_s=memory.newcomers_changed_s,
            broken_since_s=memory.broken_since_s,
            quiet_since_s=memory.quiet_since_s,
            quiet_until_s=memory.quiet_until_s,
            barred=barred,
            halt=must_halt,
            requests=run.requests,
            committed_step=run.committed_step,
        )

    def _note_broken(self, generation: Generation, found: Assessment, now_s: float) -> None:
        """Store when the generation was found broken or over. Kept once this node has stated it as broken."""
        memory, given_up = self.memory, self.broken >= generation.number
        paused = found.over and self.log.view.request(Verb.PAUSE) is not None
        if not given_up and not paused:
            memory.broken_since_s = None
        if (found.broken or found.over) and memory.broken_since_s is None:
            memory.broke(now_s)
            # The peers are told and asked first. The log is read before anything is appended, so not now.
            self._log_read_s = now_s
        if found.broken and not given_up:
            self.me.give_up(generation.number)

    def _must_halt(
        self, run: RunView, generation: Generation, found: Assessment, now_s: float
    ) -> str:
        """Why the run must end, by its failures; empty if it need not."""
        if not found.failures:
            return ""
        failed = {cause.node for cause in found.failures}
        others = len(generation.members) - len(found.dead) - len(failed)
        if others < self._limits.elastic.nodes_min:
            # Without the nodes that failed, the run cannot continue.
            others = 0
        noticed_s = self.memory.broken_since_s
        return halt(
            run,
            self.memory.moments,
            found.failures,
            others,
            frontier_step(generation, self.appender.reached_step(generation)),
            self._limits.elastic,
            now_s if noticed_s is None else noticed_s,
        )

    # ---- the bucket --------------------------------------------------------------------------------

    def step_pulse(self) -> None:
        """Write or read the pulse, whichever is due. Blocks on the bucket; never raises `StoreError`."""
        self._pulse.step(cut_off=self._cut_off())

    def depart(self) -> None:
        """Remove this node's card from the lobby, so that no other node tries to reach it."""
        self.contacts.leave_lobby()

    def _cut_off(self) -> bool:
        """Whether no member answers this node, so that it must watch the bucket."""
        broken = isinstance(self.decision, Wait) and self.decision.broken
        return self.contacts.no_member_answers or broken

    def _refresh(self, length: int | None = None) -> None:
        self.memory.log_read(self.log.refresh(length), self._clock_s())
