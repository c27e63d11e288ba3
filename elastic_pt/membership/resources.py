"""What a participant works with: the log, the bucket, a clock, and what it asks of the rest of its agent."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from elastic_pt.membership.decision.status import Held
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store


class BoundStore(Protocol):
    """A store for one generation's workers, already listening."""

    @property
    def port(self) -> int:
        """Where it listens."""


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InMemoryStates(Protocol):
    """What this node holds in memory for the next generation, and gives to its peers."""

    @property
    def held(self) -> tuple[Held, ...]:
        """Which rows of which states are here."""

    @property
    def unusable(self) -> tuple[tuple[int, int], ...]:
        """Generation and step of states that this node could not read."""

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
    def unusable(self) -> tuple[tuple[int, int], ...]:
        """None."""
        return ()

    @property
    def routes(self) -> Mapping[str, Answer]:
        """Nothing can be asked."""
        return {}


@dataclass(frozen=True)
class Resources:
    """What a participant works with."""

    log: RunLog
    hints: Store
    """The run directory with a short deadline, for the lobby and the pulse: nothing depends on their answers."""
    clock_s: Callable[[], float]
    """This machine's monotonic clock."""
    bind_store: Callable[[], BoundStore]
    """Makes a fresh store for one generation, at this node's address."""
    choose_resume: Callable[[RunView], Checkpoint | None]
    """The checkpoint from which a new generation goes on."""
    on_drain: Callable[[str], None]
    """Tells this node's workers that all workers should stop after the same step."""
    platform: Mapping[str, str] = field(default_factory=dict)
    """What computes on this node, as far as it decides the bits. Empty where no bits are promised."""
    states: InMemoryStates = field(default_factory=NothingInMemory)
    fenced_url: str = ""
    """The run directory's URL if this agent knows that its store is fenced; a GENERATION records it."""
