"""One node's part in the membership: what it knows, decides and does. No thread, socket or clock of its own.

    Message ─► PeerTable ─┐
    log.refresh ─► RunView ├─► assess, decide ──► append GENERATION, RECOVERY, QUARANTINE, STOP
    Pulse, Lobby ─────────┘                 └──► ask for a drain | wait | give the workers up

`Node` drives this in production, over real connections and threads; the simulator drives the same code
over simulated ones. `turn` may block on the bucket. Everything else returns at once.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog

from elastic_pt.errors import ConfigError, FencedError, StoreError
from elastic_pt.membership.admission import newcomers, slots_per_member
from elastic_pt.membership.assessment import Assessment, View, assess
from elastic_pt.membership.budgets import Budgets, Moments, halt, kept_out, quarantines_due
from elastic_pt.membership.contacts import Contacts
from elastic_pt.membership.decide import Decision, Drain, Ended, Halt, Propose, Wait, decide
from elastic_pt.membership.lobby import Lobby
from elastic_pt.membership.peers import Message, PeerTable
from elastic_pt.membership.pulse import Pulse
from elastic_pt.membership.status import (
    Limits,
    NodeStatus,
    Phase,
    difference,
    incarnations,
    is_lost,
)
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    Cause,
    Checkpoint,
    Generation,
    Member,
    Quarantine,
    Recovery,
    Stop,
)

_LOOK_INTERVAL_S: Final = 1.0
_PULSES_PER_TAKEOVER: Final = 4

log = structlog.get_logger("elastic_pt.participant")


class BoundStore(Protocol):
    """A store for one generation's workers, already listening."""

    @property
    def port(self) -> int:
        """Where it listens."""


@dataclass(frozen=True)
class Surroundings:
    """What a participant acts through."""

    log: RunLog
    lobby: Lobby
    pulse: Pulse
    clock_s: Callable[[], float]
    """This machine's monotonic clock."""
    bind_store: Callable[[], BoundStore]
    """Makes a fresh store for one generation, at this node's address."""
    choose_resume: Callable[[RunView], Checkpoint | None]
    """Where a new generation goes on."""
    on_drain: Callable[[str], None]
    """Asks this node's workers to have all workers stop at a step."""
    platform: Mapping[str, str] = field(default_factory=dict)
    """What computes on this node, as far as it decides the bits; a generation records it."""


class Participant:
    """See the module. Agent process; `turn` and `feel_pulse` each from one thread, the rest from any."""

    def __init__(
        self, me: NodeStatus, limits: Limits, budgets: Budgets, around: Surroundings
    ) -> None:
        self._limits = limits
        self._budgets = budgets
        self._around = around
        self._log = around.log
        self._clock_s = around.clock_s
        self._status = me
        self._saying = threading.Lock()
        self.leaving = False
        """Whether this node wants to go; apart from the rest because a signal handler sets it."""
        self.table = PeerTable(around.clock_s)
        self.contacts = Contacts(self.table, around.lobby, limits, around.clock_s)
        self.decision: Decision = Wait("starting")
        self.broken = 0
        """The newest generation that this node has given up."""
        self.stores: dict[int, BoundStore] = {}
        """The store that this node bound for a generation it proposed, by the generation's number."""
        self._noticed_s: dict[int, float] = {}
        """When the trouble was noticed that led to a generation which this node proposed, by its number."""
        self.refusal: ConfigError | None = None
        """Why no world will take this node in."""
        self._broken_since_s: float | None = None
        self._asked_since_s: float | None = None
        self._newcomers: frozenset[str] = frozenset()
        self._newcomers_changed_s = self._clock_s()
        self._quiet_since_s = self._clock_s()
        self._quiet_until_s = float("-inf")
        """When the pulse was last looked at."""
        self._felt: bytes | None = None
        self._felt_s = self._beaten_s = self._looked_s = self._glanced_s = float("-inf")
        self._rest = ""
        self._rest_until_s = float("-inf")
        self._grown = False
        """Whether the log was seen to have a record that this node has not read."""
        self._generations_read: dict[int, float] = {}
        self._bars_read: dict[int, float] = {}
        self._length = 0

    # ---- what it says ----------------------------------------------------------------------------

    @property
    def member(self) -> Member:
        """How this node introduces itself."""
        return self._status.member

    @property
    def status(self) -> NodeStatus:
        """What this node says of itself now."""
        view = self._log.view
        return replace(
            self._status,
            log_length=view.length,
            generation=view.generation_number,
            leaving=self.leaving,
            resting=self._rest if self._clock_s() < self._rest_until_s else "",
        )

    def rest(self, why: str, seconds: float) -> None:
        """Take no part for so long: this node's own workers kept failing, and others go on meanwhile."""
        with self._saying:
            self._rest, self._rest_until_s = why, self._clock_s() + seconds

    def others_can_go_on(self) -> bool:
        """Whether enough other nodes are alive and fit, so that the run goes on when this one leaves."""
        now_s, timeout_s = self._clock_s(), self.silence_s()
        fit = [
            peer.status
            for peer in list(self.table.peers.values())
            if peer.status is not None
            and peer.heard_s is not None
            # Nobody asks a former member any more: what it said last is no sign of life.
            and now_s - peer.heard_s <= timeout_s
            and not is_lost(peer, now_s, timeout_s)
            and not (peer.status.leaving or peer.status.resting)
            and not difference(self._status.fingerprint, peer.status.fingerprint)
        ]
        return len(fit) >= self._limits.nodes_min

    def say(self, **changes: object) -> None:
        """Change what this node says of itself."""
        with self._saying:
            self._status = dataclasses.replace(self._status, **changes)  # type: ignore[arg-type]

    def begin(self) -> None:
        """From now on this node takes part: nodes that start together have the join window to meet."""
        self._newcomers_changed_s = self._quiet_since_s = self._clock_s()

    def read_at_s(self, generation: int) -> float:
        """When this node first read that generation's record; now if it has not."""
        return self._generations_read.get(generation, self._clock_s())

    def message_to(self, incarnation: str, *, asks: bool) -> Message:
        """The next message to a peer."""
        return self.table.message_to(
            incarnation, self.status, asks=asks, refusal=self._refusal_of(incarnation)
        )

    def received(self, message: Message) -> bool:
        """Take in what a peer said. True if that is a reason for a turn."""
        if message.status.member.incarnation == self.member.incarnation:
            # An earlier life had this very address, and it was this node that dialled it.
            return False
        if message.refusal:
            self.refusal = ConfigError(
                f"{message.status.member.node} does not take this node in: {message.refusal}"
            )
        news = self.table.received(message)
        hangs_on_it = isinstance(self.decision, Wait) and self.decision.asking
        return news or hangs_on_it or bool(message.refusal)

    def _refusal_of(self, incarnation: str) -> str:
        """Members refuse who differs; where there is no member yet, the node that comes first by name does."""
        peer = self.table.peers.get(incarnation)
        if peer is None or peer.status is None or peer.status.phase is not Phase.WAITING:
            return ""
        generation = self._log.view.generation
        mine, theirs = self.member, peer.status.member
        member = generation is not None and generation.rank_of(mine.incarnation) is not None
        first = (mine.node, mine.incarnation) < (theirs.node, theirs.incarnation)
        if generation is not None and generation.rank_of(incarnation) is not None:
            return ""
        if not member and not (generation is None and first):
            return ""
        return difference(self._status.fingerprint, peer.status.fingerprint)

    # ---- what it does ----------------------------------------------------------------------------

    def turn(self) -> None:
        """Look, decide, act. May block on the bucket; raises `StoreError` when it does not answer."""
        self._aim()
        known = max(
            (peer.status.log_length for peer in list(self.table.peers.values()) if peer.status),
            default=0,
        )
        due = self._must_look() and self._clock_s() - self._looked_s >= _LOOK_INTERVAL_S
        if self._grown or due:
            self._looked_s, self._grown = self._clock_s(), False
            self._refresh()
            self._aim()
        elif known > self._log.view.length:
            self._refresh(known)
            self._aim()
        decision = self._decide()
        if isinstance(decision, Propose | Halt):
            # Someone may have acted already, or this node itself, in a turn that never heard the bucket's
            # answer. What the log says comes before what the peers seem to be.
            self._refresh()
            decision = self._decide()
        if decision != self.decision:
            log.info("decision", kind=type(decision).__name__.lower(), reason=decision.reason)
        self.decision = decision
        self._act(decision)

    def wants_answers(self) -> bool:
        """Whether peers should be asked at once, because a world hangs on who still answers. Once per trouble."""
        asked_s, self._asked_since_s = self._asked_since_s, self._broken_since_s
        return self._broken_since_s is not None and self._broken_since_s != asked_s

    def interval_s(self) -> float:
        """Seconds between two messages to a peer."""
        return self._limits.interval_s(self._world())

    def silence_s(self) -> float:
        """Seconds without proof of life after which a peer counts as silent."""
        return self._limits.silence_s(self._world())

    def depart(self) -> None:
        """Leave nothing behind that would send others looking for this node."""
        self._around.lobby.leave()

    def feel_pulse(self) -> None:
        """Beat or feel the pulse, whichever is due. Blocks on the bucket; never raises `StoreError`."""
        now_s = self._clock_s()
        view = self._log.view
        pause_s = self._limits.takeover_s / _PULSES_PER_TAKEOVER
        generation = view.generation
        trains = (
            generation is not None
            and view.stop is None
            and generation.rank_of(self.member.incarnation) == 0
            and self._status.phase is not Phase.WAITING
            and self.broken < generation.number
        )
        try:
            if trains and generation is not None and now_s - self._beaten_s >= pause_s:
                self._beaten_s = now_s
                self._around.pulse.beat(generation.number)
                if now_s - self._glanced_s >= 2 * pause_s:
                    self._glanced_s = now_s
                    self._glance(view, generation)
            elif self._must_look() and now_s - self._felt_s >= pause_s:
                self._felt_s = now_s
                felt = self._around.pulse.feel()
                if felt != self._felt:
                    self._felt, self._quiet_since_s = felt, self._clock_s()
                # Quiet is what lies between two looks that found the same, and no guess at what came after.
                self._quiet_until_s = now_s
        except StoreError as error:
            # Nobody knows what happens behind a bucket that does not answer: that is no quiet.
            self._quiet_since_s = self._clock_s()
            log.debug("pulse_unreachable", cause=str(error))

    # ---- inside ----------------------------------------------------------------------------------

    def _glance(self, view: RunView, generation: Generation) -> None:
        """See whether newcomers have taken over: no member can tell, only the log can.

        A turn may still hang on a request from when the bucket was away; the workers must end all the same.
        """
        next_record = self._around.pulse.record(view.length)
        self._grown = next_record is not None
        if next_record is not None and isinstance(next_record.body, Generation):
            if self._log.view.length == view.length:
                log.warning("taken_over", generation=next_record.body.number)
            self._give_up(generation.number)

    def _world(self) -> int:
        generation = self._log.view.generation
        return 1 if generation is None else len(generation.members)

    def _must_look(self) -> bool:
        """Whether this node has to watch the bucket, because no member can tell it how the run goes on."""
        cut_off = isinstance(self.decision, Wait) and self.decision.broken
        return self.contacts.no_member_answers or cut_off

    def _refresh(self, length: int | None = None) -> RunView:
        return self._note(self._log.refresh(length))

    def _note(self, view: RunView) -> RunView:
        now_s = self._clock_s()
        if view.length != self._length:
            self._length, self._quiet_since_s = view.length, now_s
        self._read(view, now_s)
        return view

    def _read(self, view: RunView, now_s: float) -> None:
        """Remember when this node first saw what counts for budgets; forget what the view has dropped."""
        read = self._generations_read
        self._generations_read = {
            each.number: read.get(each.number, now_s) for each in view.generations
        }
        bars = self._bars_read
        self._bars_read = {index: bars.get(index, now_s) for index, _ in view.bars}

    def _aim(self) -> None:
        unreachable = self.contacts.aim(self._log.view, self.member)
        if unreachable != self._status.unreachable:
            self.say(unreachable=unreachable)

    def _decide(self) -> Decision:
        now_s, run = self._clock_s(), self._log.view
        self._read(run, now_s)
        peers = dict(self.table.peers)
        generation, me = run.generation, self.status
        view = View(
            me,
            generation,
            run.stop,
            peers,
            quiet_since_s=self._quiet_since_s,
            quiet_until_s=self._quiet_until_s,
            generation_since_s=self._generations_read.get(run.generation_number, float("inf")),
        )
        moments = Moments(self._generations_read, self._bars_read)
        failures: tuple[Cause, ...] = ()
        halting, found = "", None
        inside = generation is not None and generation.rank_of(me.member.incarnation) is not None
        if generation is not None and inside and run.stop is None:
            found = assess(view, generation, self._limits, now_s)
            self._notice(generation, found, now_s)
            failures = found.failures
            proven = incarnations(found.dead)
            others = len(generation.members) - len(proven)
            others -= len({cause.node for cause in failures})
            if others < self._limits.nodes_min:
                # The run cannot be tried without the nodes that failed.
                others = 0
            frontier = self._frontier_step()
            noticed_s = now_s if self._broken_since_s is None else self._broken_since_s
            halting = halt(run, moments, failures, others, frontier, self._budgets, noticed_s)
        else:
            self._broken_since_s = None
        view = replace(
            view,
            broken_since_s=self._broken_since_s,
            barred=kept_out(run, moments, failures, self._budgets, now_s),
            halt=halting,
        )
        waiting = incarnations(newcomers(view, self._limits, now_s))
        if waiting - self._newcomers:
            self._newcomers_changed_s = now_s
        self._newcomers = (self._newcomers | waiting) & peers.keys()
        view = replace(view, newcomers_changed_s=self._newcomers_changed_s)
        return decide(view, self._limits, now_s, found)

    def _notice(self, generation: Generation, found: Assessment, now_s: float) -> None:
        """Keep the moment at which the generation was found broken; there is no way back from there."""
        if self.broken < generation.number:
            self._broken_since_s = None
        if (found.broken or found.over) and self._broken_since_s is None:
            self._broken_since_s = now_s
            # The others are told and asked first; the log is read before anything is done.
            self._looked_s = now_s
        if found.broken and self.broken < generation.number:
            self._give_up(generation.number)

    def _give_up(self, number: int) -> None:
        with self._saying:
            if number > self.broken:
                self.broken = number
                self._status = replace(self._status, broken=number)

    def _act(self, decision: Decision) -> None:
        number = self._log.view.generation_number
        match decision:
            case Propose():
                self._propose(decision, number + 1)
            case Halt():
                self._halt(decision, number)
            case Drain():
                # Said again and again: workers that have not connected yet would miss a single word.
                self._around.on_drain(decision.reason)
            case Wait() | Ended():
                self._report(number)

    def _propose(self, proposal: Propose, number: int) -> None:
        """Bind the generation's store first, then let the log decide. The log has been read in this turn."""
        before = self._log.view
        resume = self._around.choose_resume(before)
        if self._log.view.generation_number >= number:
            # Somebody was faster, as was seen when an unusable checkpoint was put on record.
            self._note(self._log.view)
            return
        store = self._around.bind_store()
        noticed_s = self._broken_since_s
        generation = Generation(
            number=number,
            members=proposal.members,
            slots=slots_per_member(proposal.members, self._limits.slots),
            store_address=self.member.address,
            store_port=store.port,
            resume=resume,
            reason=proposal.reason,
            causes=proposal.causes,
            frontier_step=self._frontier_step(),
            agree_s=0.0 if noticed_s is None else self._clock_s() - noticed_s,
            platform=self._around.platform,
        )

        def make(view: RunView) -> Generation:
            # The old generation may commit until the new one is in the log: nobody goes back behind that.
            if view.commit != before.commit:
                raise FencedError(
                    f"a newer checkpoint than generation {number} starts from is there"
                )
            return generation

        try:
            self.stores = {number: store}
            self._noticed_s = {} if noticed_s is None else {number: noticed_s}
            view = self._note(self._log.append(make, generation=number - 1))
        except FencedError as error:
            self.stores = {}
            log.info("proposal_lost", number=number, reason=str(error))
            self._note(self._log.view)
            return
        log.info(
            "generation",
            number=number,
            members=[each.node for each in proposal.members],
            resume_step=0 if resume is None else resume.step,
            reason=proposal.reason,
        )
        moments = Moments(self._generations_read, self._bars_read)
        for due in quarantines_due(view, moments, self._budgets, self._clock_s()):
            self._append(due, number)
            log.warning("node_kept_out", kept_out=due.node, seconds=due.seconds, reason=due.why)

    def _frontier_step(self) -> int:
        """The newest step that any node is known to have done."""
        peers = list(self.table.peers.values())
        return max([self._status.step, *(peer.status.step for peer in peers if peer.status)])

    def _halt(self, decision: Halt, number: int) -> None:
        steps = [each.step for each in self._log.view.checkpoints[:1]]
        log.error("stop", reason=decision.reason)
        self._append(Stop(decision.reason, max(steps, default=0)), number)

    def _report(self, number: int) -> None:
        """The first member tells how long the newest generation took to start, once all have."""
        view = self._log.view
        generation = view.generation
        told = view.recovery is not None and view.recovery.number >= number
        if generation is None or told or view.stop is not None or self.broken >= number:
            return
        if generation.rank_of(self.member.incarnation) != 0:
            return
        statuses = [
            self._status
            if member.incarnation == self.member.incarnation
            else self._said(member.incarnation)
            for member in generation.members
        ]
        times = [each.start_times for each in statuses if each is not None and each.start_times]
        if len(times) < len(generation.members) or any(each.generation != number for each in times):
            return
        # Members wait for each other between the phases: the last one to end each counts.
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

    def _agreed_after_s(self, generation: Generation) -> float:
        """Seconds from noticing the trouble to the record, its way into the log included if it was this node's."""
        noticed_s = self._noticed_s.get(generation.number)
        if noticed_s is None:
            return generation.agree_s
        return self.read_at_s(generation.number) - noticed_s

    def _said(self, incarnation: str) -> NodeStatus | None:
        peer = self.table.peers.get(incarnation)
        return None if peer is None else peer.status

    def _append(self, body: Recovery | Quarantine | Stop, number: int) -> None:
        try:
            self._log.append(lambda _: body, generation=number)
        except FencedError as error:
            log.info("append_fenced", kind=type(body).__name__, reason=str(error))
        self._note(self._log.view)
