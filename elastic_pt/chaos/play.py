"""Plays a scenario: starts its nodes, lets its faults strike, and keeps what an oracle needs to judge it.

    processes that ask ─┐
    timers ─────────────┼─► one loop ─► strike, heal, replace ─► all agents have ended ─► Played
    agents that end ────┘

The loop is the only thread that disturbs anything. A process that stands at a moment waits until its fault has struck.
"""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from elastic_pt.chaos.arena import Arena, Life
from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.kinds import Need, NothingToStrike, Strike
from elastic_pt.chaos.moments import Agenda
from elastic_pt.chaos.pressure import waited_s
from elastic_pt.chaos.scenario import Draw, FaultSpec, Scenario
from elastic_pt.chaos.scrape import Counters
from elastic_pt.config import Config
from elastic_pt.errors import StoreError
from elastic_pt.failpoints import GO, Failpoint, Reached
from elastic_pt.report.status import judge

_POLL_S: Final = 0.02
_LOOK_S: Final = 0.25
_ENDS: Final = ("agent_failed", "agent_crashed", "agent_left", "agent_stopped")
"""Events of agents that end by themselves."""


@dataclass(frozen=True)
class Happening:
    """Something to tell while the run goes on, and in its report."""

    at_s: float
    """Seconds since the nodes were started."""
    what: str
    """`fault`, `healed`, `started`, `ended`, `generation`, `stop`, or `failed`; `step` and `reference` are told and not kept."""
    text: str
    node: str = ""
    """Whom it concerns; several names are joined by `+`."""
    members: tuple[str, ...] = ()
    """Of a `generation`, by rank."""
    number: int = 0
    """Of a `generation`, of the `fault` that strikes or has `healed`, or of a `step`: its number."""


@dataclass
class Struck:
    """A fault that has struck."""

    number: int
    spec: FaultSpec
    nodes: tuple[str, ...]
    at_s: float
    """Seconds since the nodes were started."""
    time_s: float
    """Unix time."""
    generation: int
    """The newest generation then; 0 before the first."""
    step: int
    """Steps that were done when the newest computation of a step had begun."""
    members: tuple[str, ...] = ()
    """Of the newest generation then."""
    ends_agent: bool = False
    """Whether the agents of its nodes may end through it."""
    healed_s: float | None = None
    """When it ended, for one that lasts."""

    @property
    def over_at_s(self) -> float:
        """Unix time at which it was over; that of its strike if it does not last."""
        if self.healed_s is None:
            return self.time_s + (self.spec.for_s or 0.0)
        return self.time_s + self.healed_s - self.at_s


@dataclass(frozen=True)
class Progress:
    """A worker was about to compute a step."""

    time_s: float
    """Unix time."""
    step: int
    """Steps that were done."""


@dataclass(frozen=True)
class Waited:
    """How long processes of this machine had waited for a processor."""

    time_s: float
    """Unix time."""
    waited_s: float
    """See `pressure.waited_s`."""


@dataclass
class Played:
    """A scenario that was played. The nodes have ended, their bucket is still there."""

    scenario: Scenario
    seed: int
    config: Config
    directory: Path
    struck: list[Struck] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    missed: list[FaultSpec] = field(default_factory=list)
    """Faults whose moment never came."""
    without_effect: list[str] = field(default_factory=list)
    """Faults that struck and touched nothing, each with what was expected, such as a request that met it."""
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    """Of the agents that were not killed from outside."""
    lives: list[Life] = field(default_factory=list)
    """All agents that were started, in order."""
    seconds: float = 0.0
    timed_out: bool = False
    progress: list[Progress] = field(default_factory=list)
    """In order; of workers that begin the same step one after another, the first, and those that are new."""
    waited: list[Waited] = field(default_factory=list)
    """In order; empty if the kernel does not tell."""
    counters: Counters = field(default_factory=Counters)
    """What the agents' metrics showed last."""
    leftovers: tuple[str, ...] = ()
    """What was left on this machine when all agents had ended; empty if they had not."""
    state: tuple[str, str] = ("", "")
    """What `elastic-pt status` would say at the end, and why; empty if nobody answers."""

    @property
    def quiet_at_s(self) -> float:
        """Unix time at which the last fault had struck, or had ended if it lasts; 0 if none has struck."""
        return max((each.over_at_s for each in self.struck), default=0.0)


@dataclass(frozen=True)
class _Asking:
    """A process that stands at a point, and waits for an answer."""

    node: str
    reached: Reached
    answer: "Future[str]"


@dataclass(frozen=True)
class _Lasting:
    """A deed that every process of a node does each time it comes to a point, until the fault ends."""

    number: int
    point: Failpoint
    nodes: tuple[str, ...]
    deed: str


class Player:
    """Plays one scenario once."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        config: Config,
        directory: Path,
        *,
        network: bool,
        bucket: Bucket | None = None,
        arena: type[Arena] = Arena,
        tell: Callable[[Happening], None] = lambda happening: None,
    ) -> None:
        """`network`: whether the nodes have networks of their own. `bucket`: where the run is, if it is in one. `arena`:
        how nodes are started. `tell` hears of all that happens, as it happens.
        """
        self.played = Played(scenario, seed, config, directory)
        self._draw = Draw(seed)
        self._tell = tell
        self._asking: queue.Queue[_Asking] = queue.Queue()
        self._agenda = Agenda(scenario.faults, self._draw)
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._lasting: list[_Lasting] = []
        self._unhealed: dict[int, tuple[float, Struck, Strike]] = {}
        """By number of the fault: when it is to be healed."""
        self._workers: set[int] = set()
        """The processes that have begun a step."""
        self._replaced: set[str] = set()
        self._ended: set[str] = set()
        points = {each.at.point for each in scenario.faults if each.at.point is not None}
        self._arena = arena(
            config,
            directory,
            [f"node-{number}" for number in range(scenario.nodes + scenario.newcomers)],
            points=sorted({*points, Failpoint.STEP_FORWARD}, key=lambda point: point.label),
            decide=self._decide,
            network=network,
            bucket=bucket,
            seed=seed,
            disks=Need.DISK in needs_of(scenario),
        )

    def play(self) -> Played:
        """From the start of the nodes to the end of the last one, or to the scenario's longest time."""
        played, scenario = self.played, self.played.scenario
        with self._arena as arena:
            played.counters, played.lives = arena.counters, arena.lives
            self._began_s = time.monotonic()
            for node in arena.nodes[: scenario.nodes]:
                arena.start(node)
            look_s = 0.0
            while not self._over():
                self._answer_one()
                self._run_timers()
                if (now_s := time.monotonic()) - look_s > _LOOK_S:
                    look_s = now_s
                    self._look()
                    arena.look()
                    self._replace()
                if self._now_s() > scenario.longest_s:
                    played.timed_out = True
                    self._happened("failed", f"not over after {scenario.longest_s:g} s")
                    break
            for _, struck, strike in list(self._unhealed.values()):
                self._heal(struck, strike)
            self._look()
            arena.look()
            played.seconds = self._now_s()
            played.exit_codes = arena.exit_codes()
            played.missed = list(self._agenda.pending.values())
            played.state = self._state()
            if not played.timed_out:
                played.leftovers = arena.leftovers(self._ended_by_themselves())
        return played

    def _state(self) -> tuple[str, str]:
        run = self._arena.run
        try:
            state, why = judge(run.view(), run.statuses(), 0, self.played.config.elastic.nodes_min)
        except StoreError as error:
            return "", str(error)
        return str(state), why

    def _ended_by_themselves(self) -> list[str]:
        """Nodes whose agent was ended neither by a signal nor at a point of its code."""
        told = {
            node: any(self._arena.run.events(node, name) for name in _ENDS)
            for node in self.played.exit_codes
        }
        return [
            node
            for node, code in self.played.exit_codes.items()
            if code == 0 or (code is not None and code > 0 and told[node])
        ]

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _happened(
        self,
        what: str,
        text: str,
        node: str = "",
        *,
        members: tuple[str, ...] = (),
        number: int = 0,
    ) -> None:
        happening = Happening(self._now_s(), what, text, node, members, number)
        self.played.happenings.append(happening)
        self._tell(happening)

    def _over(self) -> bool:
        """Whether nothing runs any more, and nothing will."""
        if self._arena.running():
            return False
        if self._stopped:
            return True
        # A pool starts all anew, until the run has stopped.
        pool = self.played.scenario.replace_after_s is not None
        return not pool and not self._timers and not self._agenda.waits_for_a_time()

    @property
    def _stopped(self) -> bool:
        return any(each.what == "stop" for each in self.played.happenings)

    # Moments

    def _decide(self, node: str, reached: Reached) -> str:
        """Called in the thread of one process that asks; the loop answers."""
        if reached.point == Failpoint.STEP_FORWARD.label and reached.step is not None:
            self._agenda.begins(reached.step, self._now_s())
            progress = self.played.progress
            # A new worker may begin with the step that an earlier one has begun last.
            if (
                not progress
                or progress[-1].step != reached.step
                or reached.pid not in self._workers
            ):
                progress.append(Progress(time.time(), reached.step))
            self._workers.add(reached.pid)
            # In the thread of one process that asks: the others do not wait for it.
            time.sleep(self.played.scenario.step_s)
        for each in self._lasting:
            if each.point.label == reached.point and node in each.nodes:
                return each.deed
        if not self._agenda.may_strike_at(reached):
            return GO
        asking = _Asking(node, reached, Future())
        self._asking.put(asking)
        return asking.answer.result()

    def _answer_one(self) -> None:
        try:
            asking = self._asking.get(timeout=_POLL_S)
        except queue.Empty:
            return
        answer = GO
        try:
            self._look()
            for number, fault in self._agenda.due_at(asking.reached):
                nodes = self._whom(number, fault, asking.node)
                if fault.of.starts_nodes or asking.node in nodes:
                    answer = self._strike(number, fault, nodes, asking.reached.pid)
        finally:
            asking.answer.set_result(answer)

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        for number, fault in self._agenda.due_by(self._now_s()):
            self._look()
            nodes = self._whom(number, fault, "")
            # A pool starts a node anew: the fault waits for it.
            pool = self.played.scenario.replace_after_s is not None and not self._stopped
            if not (pool and self._strikes_nobody(fault, nodes)):
                self._strike(number, fault, nodes, 0)
        for due_s, struck, strike in list(self._unhealed.values()):
            if due_s <= now_s:
                self._heal(struck, strike)
        due = [each for each in self._timers if each[0] <= now_s]
        self._timers = [each for each in self._timers if each[0] > now_s]
        for _, act in due:
            act()

    def _whom(self, number: int, fault: FaultSpec, here: str) -> tuple[str, ...]:
        if fault.of.starts_nodes:
            return self._arena.unstarted(fault.starts)
        return self._agenda.whom(number, fault, self._arena.running(), here)

    # Acts

    def _strike(self, number: int, fault: FaultSpec, nodes: tuple[str, ...], pid: int) -> str:
        """Let a fault strike. Returns what the process at the moment has to do."""
        kind = fault.of
        struck = Struck(
            number,
            fault,
            nodes,
            self._now_s(),
            time.time(),
            0 if self._agenda.generation is None else self._agenda.generation.number,
            self._agenda.step,
            members=()
            if self._agenda.generation is None
            else tuple(each.node for each in self._agenda.generation.members),
            ends_agent=kind.ends_node or (bool(kind.deed) and self._arena.is_agent(pid)),
        )
        self._agenda.struck(number, struck.at_s)
        self.played.struck.append(struck)
        self._happened("fault", str(fault), "+".join(nodes), number=number)
        ranked = self._agenda.ranked(self._arena.running())
        others = tuple(each for each in ranked if each not in nodes)
        strike = Strike(number, nodes, pid, fault.parameters, self._draw.for_fault(number), others)
        try:
            if self._strikes_nobody(fault, nodes):
                raise NothingToStrike("none of its nodes runs")
            if kind.strike is not None:
                kind.strike(self._arena, strike)
        except NothingToStrike as error:
            self.played.without_effect.append(f"{fault}: {error}")
            return GO
        deed = kind.deed.format(**{key: f"{value:g}" for key, value in fault.parameters.items()})
        if kind.repeats and fault.at.point is not None:
            self._lasting.append(_Lasting(number, fault.at.point, nodes, deed))
        if fault.for_s is not None:
            self._unhealed[number] = (time.monotonic() + fault.for_s, struck, strike)
        return deed or GO

    def _strikes_nobody(self, fault: FaultSpec, nodes: tuple[str, ...]) -> bool:
        """Whether it is a fault of nodes that run, and none of its own runs."""
        kind = fault.of
        running = set(self._arena.running())
        return kind.on_nodes and not kind.starts_nodes and not running & set(nodes)

    def _heal(self, struck: Struck, strike: Strike) -> None:
        del self._unhealed[struck.number]
        met = struck.spec.of.met
        if met is not None and not met(self._arena, strike):
            self.played.without_effect.append(f"{struck.spec}: expected traffic that meets it")
        heal = struck.spec.of.heal
        if heal is not None:
            heal(self._arena, strike)
        self._lasting = [each for each in self._lasting if each.number != struck.number]
        struck.healed_s = self._now_s()
        self._happened("healed", struck.spec.kind, "+".join(struck.nodes), number=struck.number)

    def _replace(self) -> None:
        """Start ended nodes anew, if the scenario has a pool and the run is not over."""
        after_s = self.played.scenario.replace_after_s
        if after_s is None or self._stopped:
            return
        for node in self._arena.gone() - self._replaced:
            self._replaced.add(node)

            def start(node: str = node) -> None:
                self._replaced.discard(node)
                self._happened("started", "a new machine", node)
                self._arena.start(node)

            self._timers.append((time.monotonic() + after_s, start))

    def _look(self) -> None:
        """See which agents have ended, and what the log has that is new."""
        self._tell(Happening(self._now_s(), "step", "", number=max(0, self._agenda.step)))
        if (seconds := waited_s()) is not None:
            self.played.waited.append(Waited(time.time(), seconds))
        gone = self._arena.gone()
        for node in sorted(gone - self._ended):
            code = self._arena.exit_codes().get(node)
            text = "killed" if code is None or code < 0 else f"exit code {code}"
            self._happened("ended", text, node)
        self._ended = gone
        try:
            view = self._arena.run.view()
        except StoreError:
            return
        if view.generation is not None and view.generation != self._agenda.generation:
            self._agenda.generation = view.generation
            members, number = (
                tuple(each.node for each in view.generation.members),
                view.generation.number,
            )
            text = f"generation {number}: {', '.join(members)}; {view.generation.reason}"
            self._happened("generation", text, members=members, number=number)
        if view.stop is not None and not self._stopped:
            self._happened("stop", f"step {view.stop.step}: {view.stop.reason}")


def needs_of(scenario: Scenario) -> frozenset[Need]:
    """What a machine must have to play a scenario."""
    needs = [each.of.needs for each in scenario.faults]
    bucket = [frozenset({Need.BUCKET})] if scenario.store == "bucket" else []
    return frozenset().union(*needs, *bucket)
