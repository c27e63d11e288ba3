"""The dependencies of a participant: the log, the bucket, a clock, and functions of the rest of its agent."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from elastic_pt.membership.decision.mirrors import Mirrors
from elastic_pt.membership.decision.status import Held, Idle, Unusable
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store


class BoundStore(Protocol):
    """A store for one generation's workers, already listening."""

    @property
    def port(self) -> int:
        """The port at which it listens."""


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InMemoryStates(Protocol):
    """What this node holds in memory for the next generation, and gives to its peers."""

    @property
    def held(self) -> tuple[Held, ...]:
        """Which rows of which states are here."""

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """Copies that this node's workers could not read."""

    @property
    def routes(self) -> Mapping[str, Answer]:
        """What peers may ask over HTTP, by path."""


class NothingInMemory:
    """Where no state is kept: stock torchrun, and tests of the membership alone."""

    @property
    def held(self) -> tuple[Held, ...]:
        """Nothing."""
        return ()

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """None."""
        return ()

    @property
    def routes(self) -> Mapping[str, Answer]:
        """Nothing can be asked."""
        return {}


@dataclass(frozen=True)
class Resources:
    """The dependencies of a participant."""

    log: RunLog
    hints: Store
    """The run directory with a short deadline, for the lobby and the pulse: nothing depends on their answers."""
    clock_s: Callable[[], float]
    """This machine's monotonic clock."""
    bind_store: Callable[[], BoundStore]
    """Creates a new store for one generation, at this node's address."""
    choose_resume: Callable[[RunView], Checkpoint | None]
    """Returns the checkpoint from which a new generation resumes."""
    on_drain: Callable[[str], None]
    """Asks this node's workers to stop all workers after the same step."""
    choose_mirrors: Callable[[Sequence[str]], Mirrors] = lambda _: ()
    """Chooses who copies whose state in memory, from the members' zones in rank order."""
    platform: Mapping[str, str] = field(default_factory=dict)
    """The platform of this node (docs/glossary.md). Empty with native numerics and with stock torchrun."""
    states: InMemoryStates = field(default_factory=NothingInMemory)
    on_checkpoint: Callable[[int], None] = lambda _: None
    """Asks this node's workers for a checkpoint after the same step on all workers, for the request of that index."""
    on_leave: Callable[[float], None] = lambda _: None
    """Asks this node to leave in good order, within so many seconds (0: as configured). Called again until it leaves."""
    on_decision: Callable[[Idle], None] = lambda _: None
    """Learns why this node has no workers, if it has none. Called in each turn."""
    fenced_url: str = ""
    """The run directory's URL if this agent has checked that its store is fenced; a GENERATION records it."""
