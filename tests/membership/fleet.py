"""Several participants of one run. The test moves their clock and delivers their messages."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from elastic_pt.membership.decision.mirrors import Mirrors
from elastic_pt.membership.decision.status import Limits, NodePhase, StartTimes
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.resources import (
    BoundStore,
    InMemoryStates,
    NothingInMemory,
    Resources,
)
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    Cause,
    Checkpoint,
    Generation,
)
from tests.membership.bucket import WatchedStore
from tests.membership.world import LIMITS, waiting

TICK_S = 0.2


@dataclasses.dataclass(frozen=True)
class Port:
    """The port at which a generation's store would listen."""

    port: int


@dataclasses.dataclass
class Fleet:
    """Nodes of one run. `pass_time` delivers their messages and gives each its turns."""

    bucket: WatchedStore
    limits: Limits = LIMITS
    nodes: dict[str, Participant] = dataclasses.field(default_factory=dict)
    dead: set[str] = dataclasses.field(default_factory=set)
    """Nodes with addresses that refuse connections."""
    off: set[str] = dataclasses.field(default_factory=set)
    """Nodes on lost machines: their addresses neither refuse nor answer."""
    cut: set[frozenset[str]] = dataclasses.field(default_factory=set)
    drains: list[str] = dataclasses.field(default_factory=list)
    checkpoints: list[int] = dataclasses.field(default_factory=list)
    """Requests for checkpoints that were passed on to workers."""
    leaves: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    """Nodes that were asked to leave through the log, and within how many seconds."""
    now_s: float = 0.0
    bound: int = 0
    """Stores that were bound for generations."""
    choose_resume: Callable[[RunView], Checkpoint | None] = lambda _: None
    platform: dict[str, str] = dataclasses.field(default_factory=dict)
    """The platform of the nodes that are started next."""
    zones: dict[str, str] = dataclasses.field(default_factory=dict)
    """The zones of the nodes that are started next, by name."""
    choose_mirrors: dict[str, Callable[[Sequence[str]], Mirrors]] = dataclasses.field(
        default_factory=dict
    )
    """How the nodes that are started next choose mirrors, by name."""
    states: dict[str, InMemoryStates] = dataclasses.field(default_factory=dict)
    """What the nodes that are started next hold in memory, by name."""
    fenced_url: str = ""
    """The `fenced_url` of the nodes that are started next."""

    def start(self, *names: str, **changes: object) -> None:
        """Start nodes; `changes` are fields of their status."""
        for name in names:
            log = RunLog(self.bucket, writer=name)
            log.refresh()
            status = waiting(name, generation=0, log_length=0, **changes)
            member = dataclasses.replace(status.member, zone=self.zones.get(name, ""))
            self.nodes[name] = Participant(
                dataclasses.replace(status, member=member),
                self.limits,
                Resources(
                    log=log,
                    hints=self.bucket,
                    clock_s=self.clock_s,
                    bind_store=self._bind_store,
                    choose_resume=lambda view: self.choose_resume(view),
                    on_drain=self.drains.append,
                    on_checkpoint=self.checkpoints.append,
                    on_leave=functools.partial(self._leave, name),
                    choose_mirrors=self.choose_mirrors.get(name, lambda _: ()),
                    states=self.states.get(name, NothingInMemory()),
                    platform=self.platform,
                    fenced_url=self.fenced_url,
                ),
            )

    def clock_s(self) -> float:
        """The clock of all nodes."""
        return self.now_s

    def _leave(self, name: str, seconds: float) -> None:
        self.leaves.append((name, seconds))
        self.nodes[name].me.leaving = True

    def _bind_store(self) -> BoundStore:
        self.bound += 1
        return Port(5000 + self.bound)

    def pass_time(self, seconds: float) -> None:
        """Make all nodes ask, answer and take turns."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S / 2
            self.talk()
            self.now_s += TICK_S / 2
            for node in self.alive():
                node.turn()

    def alive(self) -> list[Participant]:
        """Nodes that are neither dead nor off."""
        return [node for name, node in self.nodes.items() if name not in self.dead | self.off]

    def talk(self) -> None:
        """Each node asks its targets, and they answer."""
        for node in self.alive():
            for target in node.contacts.targets:
                name, mine = target.node, node.member
                lives = self.nodes[name].member.incarnation == target.incarnation
                if name in self.dead or not lives:
                    node.table.refused(target.incarnation)
                elif name not in self.off and frozenset((name, mine.node)) not in self.cut:
                    other = self.nodes[name]
                    node.table.reached(target.incarnation)
                    other.received(node.message_to(target.incarnation, asks=True))
                    node.received(other.message_to(mine.incarnation, asks=False))

    @property
    def log(self) -> RunView:
        """The view of the log."""
        return RunLog(self.bucket, writer="test").refresh()

    def records(self) -> list[object]:
        """All records."""
        return [record.body for record in RunLog(self.bucket, writer="test").records()]

    def run(self) -> Generation:
        """Start the workers of the newest generation on each member that has not started them."""
        generation = self.log.generation
        assert generation is not None
        for each in generation.members:
            if each.node not in self.dead | self.off:
                self.nodes[each.node].me.say(phase=NodePhase.RUNNING, step=0)
        self.pass_time(2 * TICK_S)
        return generation

    def step(self, step: int, *names: str) -> None:
        """The workers of these nodes have done a step of the newest generation."""
        times = StartTimes(self.log.generation_number, 0.0, 0.0, 0.0, 0.0)
        for name in names:
            self.nodes[name].me.say(step=step, start_times=times)

    def spend(self, number: int, *names: str, failure: Cause | None = None) -> None:
        """The workers of these nodes are gone."""
        for name in names:
            self.nodes[name].me.say(phase=NodePhase.WAITING, spent=number, failure=failure)

    def form(self, *names: str) -> Generation:
        """A first generation of these nodes, with workers."""
        self.start(*names)
        self.pass_time(4.0)
        return self.run()


def names(generation: Generation | None) -> list[str]:
    """The members' names."""
    return [] if generation is None else [each.node for each in generation.members]
