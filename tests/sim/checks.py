"""What must hold whatever happens. The witness sees everything; the agents do not know of it.

Each check runs at the event that could break it, so a violation is found at once: when an object changes,
when an append returns, when a step is done, when a message is taken in, and (for what must not last) on
every tick of a tenth of a second.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from elastic_pt.membership.decision.status import Limits
from elastic_pt.membership.peers import Message
from elastic_pt.runlog.log import RunView, fold, record_key
from elastic_pt.runlog.records import (
    COMPLETED,
    ORIGIN,
    CauseKind,
    Commit,
    Control,
    Generation,
    Record,
    Recovery,
    Stop,
    Verb,
)
from tests.sim.damage import DamageWitness
from tests.sim.memory_checks import MemoryWitness
from tests.sim.training import World
from tests.sim.violation import Violation

if TYPE_CHECKING:
    from tests.sim.agent import AgentProcess, Operator
    from tests.sim.simulation import Simulation

_KILL_S: Final = 0.5
"""What an agent that can run may take to end its workers once it knows that it must."""


_PAUSE_S: Final = 3.5
"""What a run may take to notice that it is paused, beyond the step at which it stops: two seconds, and slow requests."""
_CLOCK_GRAIN_S: Final = 1e-6
_FAILURES_WINDOW_S: Final = 4.0
_FAILURES_MAX: Final = 5
"""Failures of one node without a new step within that window, at the most."""


def detection_bound_s(limits: Limits) -> float:
    """How long workers may go on after their generation was superseded, while rank 0's agent can run and reach the bucket.

    A member that proposes has given its workers up before; the others cannot make a step without them. So
    only newcomers can supersede a generation that trains. They act after `takeover_s` without a pulse; its
    rank 0 beats the pulse every `takeover_s / 4`, and looks at the log at least every second time. To that come slow
    requests and the time to kill.
    """
    return limits.elastic.takeover_s / 2 + 2.0


class Attempt:
    """One append of one agent: its records are in the log exactly if it believes so."""

    def __init__(
        self, witness: "Witness", process: "AgentProcess | Operator", generation: int
    ) -> None:
        self._witness = witness
        self.process = process
        self.generation = generation
        self.began_s = witness.simulation.scheduler.now_s
        self._nonces: list[str] = []

    def tries(self, record: Record) -> None:
        """A record is about to be created; the ones before it are believed not to be in the log."""
        self.lost()
        self._nonces.append(record.nonce)
        self._witness.attempts[record.nonce] = self

    def lost(self) -> None:
        """The agent believes that none of its records is in the log."""
        for nonce in self._nonces:
            if nonce in self._witness.nonces:
                raise Violation(
                    "an append knows its outcome",
                    f"{self.process.name} believes that it lost, but record {self._witness.nonces[nonce]} is its own",
                )

    def won(self) -> None:
        """The agent believes that its last record is in the log."""
        if not self._nonces or self._nonces[-1] not in self._witness.nonces:
            raise Violation(
                "an append knows its outcome",
                f"{self.process.name} believes that its record is in the log, and it is not",
            )
        for nonce in self._nonces[:-1]:
            if nonce in self._witness.nonces:
                raise Violation(
                    "an append knows its outcome", f"{self.process.name} has appended twice"
                )


@dataclass
class Witness:
    """See the module."""

    simulation: "Simulation"
    view: RunView = field(default_factory=RunView)
    """The log, as it is."""
    records: list[Record] = field(default_factory=list)
    nonces: dict[str, int] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    superseded_s: dict[int, float] = field(default_factory=dict)
    """When a generation was replaced (or the run ended), by its number."""
    stores: dict[tuple[str, int], int] = field(default_factory=dict)
    last_step_s: dict[int, float] = field(default_factory=dict)
    """When a generation did its newest step."""
    first_step_s: dict[int, float] = field(default_factory=dict)
    paused_s: float | None = None
    """Since when the run is paused; None while it is not."""
    expected_stop: Callable[[Stop], bool] = lambda stop: False
    memory: MemoryWitness = field(init=False)
    damage: DamageWitness = field(default_factory=DamageWitness)
    _words: dict[tuple[str, str], tuple[int, Message]] = field(default_factory=dict)
    _doomed_since_s: dict[str, float] = field(default_factory=dict)
    _failed_s: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = MemoryWitness(self.simulation)

    # ---- the log -----------------------------------------------------------------------------------

    def changed(self, key: str, old: bytes | None, new: bytes | None) -> None:
        """An object has changed."""
        if not key.startswith("log/"):
            return
        if old is not None:
            raise Violation("a record never changes", f"{key} was overwritten or removed")
        assert new is not None
        self._appended(Record.from_bytes(new, key=key), key)

    def _appended(self, record: Record, key: str) -> None:
        head = self.records[-1] if self.records else None
        if key != record_key(len(self.records)) or record.index != len(self.records):
            raise Violation("one lineage", f"{key} is not the next record")
        if record.previous != (ORIGIN if head is None else head.sha256):
            raise Violation("one lineage", f"{key} does not follow from the record before it")
        attempt = self.attempts[record.nonce]
        self._check_fence(record, attempt)
        now_s = self.simulation.scheduler.now_s
        before = self.view
        self.records.append(record)
        self.nonces[record.nonce] = record.index
        self.view = fold(before, record)
        match record.body:
            case Generation():
                self._check_generation(record.body, before, attempt)
                self.superseded_s[before.generation_number] = now_s
            case Commit():
                self._check_commit(record.body, before)
            case Stop():
                self._check_stop(record.body, before)
                self.superseded_s[before.generation_number] = now_s
            case Control(request=request) if not request.done:
                if request.verb is Verb.PAUSE:
                    self.paused_s = now_s
                elif request.verb is Verb.RESUME:
                    self.paused_s = None
            case _:
                pass
        self.simulation.appended(record)

    def _check_fence(self, record: Record, attempt: Attempt) -> None:
        current, body = self.view.generation_number, record.body
        if self.view.stop is not None:
            raise Violation("nothing follows STOP", f"{record.kind} of {attempt.process.name}")
        if isinstance(body, Control):
            return
        if isinstance(body, Generation):
            if self.paused_s is not None and not self._makes_promised_commit(body):
                raise Violation("no generation begins in a pause", f"GENERATION {body.number}")
            if body.number != current + 1:
                raise Violation(
                    "no fenced writer appends", f"GENERATION {body.number} behind {current}"
                )
            return
        acting = attempt.generation
        if isinstance(body, Recovery):
            acting = body.number
        if acting != current or attempt.generation != current:
            raise Violation(
                "no fenced writer appends",
                f"{record.kind} on behalf of generation {acting} behind GENERATION {current}",
            )

    def _makes_promised_commit(self, generation: Generation) -> bool:
        """Before a pause is done: a generation that has newer steps in memory than the bucket has."""
        pause, committed = self.view.request(Verb.PAUSE), self.view.checkpoints
        return (
            pause is not None
            and not pause.done
            and generation.memory is not None
            and generation.memory.step > (committed[0].step if committed else 0)
        )

    def _check_generation(self, generation: Generation, before: RunView, attempt: Attempt) -> None:
        address = (generation.store_address, generation.store_port)
        if address in self.stores:
            raise Violation(
                "a store is never used again",
                f"generation {generation.number} has the store of {self.stores[address]}",
            )
        self.stores[address] = generation.number
        newest = before.checkpoints[0] if before.checkpoints else None
        if generation.resume != newest:
            raise Violation(
                "a generation goes on where the log is",
                f"generation {generation.number} resumes from "
                f"{generation.resume and generation.resume.step}, committed is {newest and newest.step}",
            )
        incarnations = [each.incarnation for each in generation.members]
        if len(set(incarnations)) < len(incarnations):
            raise Violation("members are distinct", str(incarnations))
        noticed_s = attempt.began_s - generation.agree_s / attempt.process.clock_rate
        self.memory.begins(generation, before, noticed_s)
        self.damage.begins(generation)
        if any(each in self.simulation.strangers for each in incarnations):
            raise Violation("a node that differs is never taken in", str(incarnations))
        if before.generation is not None:
            self._check_succession(generation, before.generation, attempt)

    def _check_succession(
        self, generation: Generation, before: Generation, attempt: Attempt
    ) -> None:
        """The world changes hands only where it may."""
        simulation, proposer = self.simulation, attempt.process
        now_s = simulation.scheduler.now_s
        limits = simulation.habits.limits
        stay = [each for each in generation.members if before.rank_of(each.incarnation) is not None]
        if before.rank_of(proposer.incarnation) is None:
            last_s = self.last_step_s.get(before.number, float("-inf"))
            rank0 = simulation.agents.get(before.members[0].incarnation)
            well = rank0 is not None and simulation.well_since_s(rank0, now_s) < (
                now_s - limits.elastic.takeover_s - 1.0
            )
            if now_s - last_s < 1.0 and well:
                raise Violation(
                    "a generation that trains is not taken over",
                    f"{proposer.name} replaces generation {before.number}, which did a step "
                    f"{now_s - last_s:.2f} s ago",
                )
            return
        chosen = {
            cause.node
            for cause in generation.causes
            if cause.kind in (CauseKind.BARRED, CauseKind.LEFT)
        }
        excluded = simulation.largest_well_side(
            [
                each
                for each in before.members
                if each not in generation.members
                and each.node not in chosen
                # A node that rests lets the others go on.
                and not simulation.agents[each.incarnation].rested
                # A node that waits for the bucket and has not read the newest GENERATION cannot train.
                and simulation.agents[each.incarnation].log.view.generation_number >= before.number
            ],
            now_s - limits.silence_s(len(before.members)) - limits.elastic.takeover_s,
        )
        if 2 * len(excluded) > len(before.members):
            raise Violation(
                "the larger side goes on",
                f"generation {generation.number} keeps {[each.node for each in stay]} and leaves "
                f"{[each.node for each in excluded]} behind",
            )
        # Ask again: every member was alive after the trouble was noticed. (A world that has stopped as planned
        # goes on at once. A node that is lost meanwhile is noticed in the next one.)
        if proposer.participant.broken < before.number:
            return
        noticed_s = attempt.began_s - generation.agree_s / proposer.clock_rate - _CLOCK_GRAIN_S
        for member in stay:
            agent = simulation.agents[member.incarnation]
            if agent.dead and simulation.died_s[member.incarnation] < noticed_s:
                raise Violation(
                    "only nodes that answer are members",
                    f"generation {generation.number} names {agent.name}, which died before",
                )

    def _check_commit(self, commit: Commit, before: RunView) -> None:
        step = commit.newest.step
        if before.commit is not None and step <= before.commit.newest.step:
            raise Violation(
                "committed steps are one sequence",
                f"step {step} is committed after {before.commit.newest.step}",
            )
        self.memory.commits(commit.newest)

    def _check_stop(self, stop: Stop, before: RunView) -> None:
        last_step = self.simulation.training.plan.steps
        done = before.commit is not None and before.commit.newest.step >= last_step
        if stop.reason == COMPLETED and done:
            return
        if not self.expected_stop(stop):
            raise Violation("no run ends while a fit node exists", stop.reason)

    def appending(self, process: "AgentProcess | Operator", generation: int) -> Attempt:
        """An agent begins to append on behalf of a generation."""
        return Attempt(self, process, generation)

    def damaged(self, process: "AgentProcess", error: Exception) -> None:
        """An agent finds the log damaged."""
        raise Violation("one lineage", f"{process.name} reads: {error}")

    # ---- workers -----------------------------------------------------------------------------------

    def starts(self, process: "AgentProcess", generation: Generation) -> None:
        """An agent starts workers."""

    def stepped(self, world: World) -> None:
        """A generation has done a step."""
        number = world.generation.number
        now_s = self.last_step_s[number] = self.simulation.scheduler.now_s
        self.first_step_s.setdefault(number, now_s)
        self._check_pause(world, now_s)
        since_s = self.superseded_s.get(number)
        if since_s is None:
            return
        rank0 = self.simulation.agents[world.generation.members[0].incarnation]
        known_s = max(since_s, self.simulation.well_since_s(rank0, now_s))
        bound_s = detection_bound_s(self.simulation.habits.limits)
        if now_s - known_s > bound_s:
            raise Violation(
                "no node trains on in a superseded generation",
                f"generation {number} did step {world.step} {now_s - since_s:.1f} s after it was replaced",
            )

    def _check_pause(self, world: World, now_s: float) -> None:
        if self.paused_s is None or world.step <= world.drain_at:
            return
        simulation, number = self.simulation, world.generation.number
        rank0 = simulation.agents[world.generation.members[0].incarnation]
        # A request that was sent during a trouble may hold the agent up for long after it.
        well_s = simulation.untroubled_since_s(rank0) + simulation.habits.store_deadline_s
        known_s = max(self.paused_s, self.first_step_s[number], well_s)
        if now_s - known_s > _PAUSE_S:
            raise Violation(
                "a paused run does not train",
                f"generation {number} did step {world.step} {now_s - self.paused_s:.1f} s after the pause",
            )

    def failed(self, process: "AgentProcess", failures: int) -> None:
        """A node's own workers have failed so many times in a row without a new step."""
        now_s = self.simulation.scheduler.now_s
        times_s = self._failed_s.setdefault(process.incarnation, [])
        # Whatever made a step in between has begun a new account.
        times_s[:] = [*times_s[len(times_s) - (failures - 1) :], now_s]
        lately = sum(now_s - each < _FAILURES_WINDOW_S for each in times_s)
        if lately > _FAILURES_MAX:
            raise Violation(
                "a failing node rests",
                f"{process.name}: {lately} failures within {_FAILURES_WINDOW_S:g} s",
            )

    def gave_up(self, process: "AgentProcess") -> None:
        """A node has left because its own workers kept failing."""
        others = [
            agent
            for agent in self.simulation.agents.values()
            if agent is not process and self.simulation.died_s.get(agent.incarnation) is None
        ]
        if not others:
            raise Violation("no node leaves a run that needs it", process.name)

    def tick(self) -> None:
        """What must not last."""
        now_s = self.simulation.scheduler.now_s
        for agent in self.simulation.agents.values():
            workers, generation = agent.workers, agent.generation
            doomed = (
                not agent.dead
                and not agent.paused
                and workers is not None
                and workers.up
                and generation is not None
                and (
                    agent.log.view.generation_number > generation.number
                    or agent.participant.broken >= generation.number
                )
            )
            if not doomed:
                self._doomed_since_s.pop(agent.incarnation, None)
            elif now_s - self._doomed_since_s.setdefault(agent.incarnation, now_s) > _KILL_S:
                raise Violation(
                    "workers without a future are ended",
                    f"{agent.name} keeps those of generation {generation and generation.number}",
                )

    # ---- messages ----------------------------------------------------------------------------------

    def heard(self, process: "AgentProcess", message: Message) -> None:
        """An agent has taken a message in."""
        sender = message.status.member.incarnation
        pair = (process.incarnation, sender)
        newest = self._words.get(pair)
        if newest is None or message.count > newest[0]:
            newest = self._words[pair] = (message.count, message)
        peer = process.participant.table.peers.get(sender)
        if peer is not None and peer.status is not None and peer.status != newest[1].status:
            raise Violation(
                "words are never taken back", f"{process.name} believes old words of {sender}"
            )
