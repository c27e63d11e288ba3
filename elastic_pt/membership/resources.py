"""What a participant works with: the log, the bucket, a clock, and what it asks of the rest of its agent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store


class BoundStore(Protocol):
    """A store for one generation's workers, already listening."""

    @property
    def port(self) -> int:
        """Where it listens."""


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
    on_checkpoint: Callable[[int], None] = lambda _: None
    """Tells this node's workers that all workers should checkpoint after the same step, for the request of that index."""
    on_leave: Callable[[float], None] = lambda _: None
    """Has this node leave in good order, within so many seconds (0: as configured). Called again until it leaves."""
    fenced_url: str = ""
    """The run directory's URL if this agent knows that its store is fenced; a GENERATION records it."""
