"""What a kind of faults is: what it does to a run, what it needs, and how the run must tell of it.

strike(arena, strike)   the fault, in the thread of the run, while the process that reached the moment stands still
deed                    or: what that process itself does (`failpoints`), exactly there
heal(arena, strike)     undoes it, for faults that last (`for_s`)
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from elastic_pt.runlog.records import CauseKind, Verb

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena


class NothingToStrike(Exception):
    """A fault meets nothing that it could strike: no checkpoint yet, no other node. The text says what is missing."""


class Need(StrEnum):
    """What a fault needs of the machine."""

    NETWORK = "network"
    """Each node on a network of its own, which takes root on Linux."""
    BUCKET = "bucket"
    """An S3 server behind a proxy."""
    DISK = "disk"
    """Each node on a small disk of its own, which takes root on Linux."""


@dataclass(frozen=True)
class Range:
    """The values that a parameter may have."""

    least: float
    most: float
    whole: bool = False
    above: bool = False
    """Whether `least` itself is too little."""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.whole and not float(value).is_integer():
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        if self.above:
            return f"{kind} above {self.least:g}, at most {self.most:g}"
        return f"{kind} from {self.least:g} to {self.most:g}"


_SHARE: Final = Range(0, 1, above=True)
_SECONDS: Final = Range(0, 86_400, above=True)

RANGES: Final[Mapping[str, Range]] = {
    "code": Range(1, 255, whole=True),
    "count": Range(1, 16, whole=True),
    "checkpoints": Range(1, 16, whole=True),
    "bytes_per_s": Range(1, 1e9, whole=True),
    "seconds": _SECONDS,
    "lead_s": Range(0, 86_400),
    "delay_s": _SECONDS,
    "jitter_s": Range(0, 86_400),
    "share": _SHARE,
    "lost": _SHARE,
    "duplicated": _SHARE,
    "flipped": _SHARE,
}
"""What each parameter of a kind may be. A name means the same for every kind that has it."""


@dataclass(frozen=True)
class Strike:
    """One fault as it strikes."""

    number: int
    """Of the fault in its scenario, from 1."""
    nodes: tuple[str, ...]
    """Whom it strikes."""
    pid: int
    """The process that stands at the moment; 0 if a time told it."""
    parameters: Mapping[str, float]
    choices: random.Random
    others: tuple[str, ...] = ()
    """Members that it does not strike; before the first generation, nodes that run."""


@dataclass(frozen=True)
class Evidence:
    """How a run tells of a fault: of each that is not empty, any one is enough. `evidence` looks for it."""

    causes: frozenset[CauseKind] = frozenset()
    """A GENERATION has such a cause, which names a struck node."""
    events: frozenset[str] = frozenset()
    """An agent of a struck node has written such an event, or one of its workers."""
    metrics: frozenset[str] = frozenset()
    """Such a sample (`elastic_pt_notices_total`, `elastic_pt_worker_failures_total{cause="signal"}`) of a struck node has
    risen. What `causes` name is looked for in `elastic_pt_changes_total` anyway."""
    answers: frozenset[Verb] = frozenset()
    """An agent has appended that such a request of an operator is carried out."""
    names_node: bool = True
    """Whether cause, event and sample are those of a struck node; if not, of any."""
    at_start: bool = False
    """Whether it is noticed only if something starts: workers while it lasts, or an agent after it, if it does not last."""
    may: frozenset[CauseKind] = frozenset()
    """Further causes that it may have. A cause that no fault has, or may have, is an objection."""
    silent: str = ""
    """Why nothing tells of it, as a clause; empty if something does."""


Action = Callable[["Arena", Strike], None]


@dataclass(frozen=True)
class Kind:
    """A kind of faults."""

    name: str
    meaning: str
    strike: Action | None = None
    deed: str = ""
    """What the process at the moment does itself, as in `ELASTIC_PT_FAILPOINTS`; `{name}` is a parameter."""
    repeats: bool = False
    """Whether every process of a struck node does the deed each time it comes to the point, until the fault ends."""
    heal: Action | None = None
    needs: frozenset[Need] = frozenset()
    evidence: Evidence = Evidence()
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Names and defaults."""
    met: Callable[["Arena", Strike], int] | None = None
    """How many requests or packets it has struck so far; with none it had no effect."""
    ends_node: bool = False
    """Whether the agents of the struck nodes may end through it."""
    on_nodes: bool = True
    """Whether it strikes nodes that run; if not, the bucket, what is stored, or the run as a whole."""
    starts_nodes: bool = False
    """Whether it starts `count` nodes that were never started before: they are the struck ones."""

    @property
    def lasts(self) -> bool:
        """Whether it ends by itself, after `for_s`."""
        return self.repeats or self.heal is not None


LOST: Final = Evidence(causes=frozenset({CauseKind.LOST}))
LEFT: Final = Evidence(causes=frozenset({CauseKind.LEFT}))
SILENT: Final = Evidence(
    causes=frozenset({CauseKind.LOST, CauseKind.GAVE_UP}),
    may=frozenset({CauseKind.PARKED, CauseKind.FAILED}),
)
"""The struck nodes do not answer for a while. If they answer again at once, members gave up and nobody is lost. Workers
that wait for them may fail in a collective."""
TROUBLE: Final = frozenset(
    {CauseKind.FAILED, CauseKind.UNUSABLE, CauseKind.LOST, CauseKind.GAVE_UP}
)
"""What becomes of nodes that cannot read or write."""
NO_START: Final = Evidence(
    events=frozenset({"workers_not_started", "worker_failed", "no_snapshots"}),
    at_start=True,
    may=TROUBLE,
)
"""A struck node cannot write, or open a file: its workers do not start, or do without snapshots."""
FAILURES: Final = "elastic_pt_worker_failures_total"


def failed(cause: str) -> Evidence:
    """A worker of the struck node has ended, by its agent for this cause."""
    return Evidence(
        causes=frozenset({CauseKind.FAILED}),
        events=frozenset({"worker_failed"}),
        metrics=frozenset({f'{FAILURES}{{cause="{cause}"}}'}),
    )


def each(act: Callable[["Arena", str], None]) -> Action:
    """The same for each struck node."""

    def strike(arena: "Arena", strike: Strike) -> None:
        for node in strike.nodes:
            act(arena, node)

    return strike
