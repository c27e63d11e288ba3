"""A node's own status, the facts about a peer, and the operator's limits. No decisions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, FiniteFloat

from elastic_pt.config import ElasticSection
from elastic_pt.runlog.records import Cause, Incarnation, Member, Number, Seconds, Text

MESH_NODES_MAX: Final = 32
"""Up to this many members, every member asks every other one. If there are more, members ask the leaders."""
LEADERS: Final = 2
"""The number of leaders: the first members in rank order that answer. All others ask them."""
_FULL_PACE_NODES: Final = 512
_INTERVALS_OF_SILENCE: Final = 3.5
"""The proof of life of a healthy member is up to two intervals old. The rest is a margin for late messages."""


_Ranks = Annotated[int, Field(ge=0, le=99_999)]
_NAMES_MAX: Final = 256
_PEERS_MAX: Final = 4096
_HELD_MAX: Final = 1024
"""Most entries of lists in a status of another node, far above what any node says."""


class NodePhase(StrEnum):
    """What a node is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"


class Idle(StrEnum):
    """Why a node has no workers, for the account of its time."""

    AGREES = "agrees"
    """The nodes agree on the next generation, will admit this one, or wait until one that they need has rested."""
    STARTS = "starts"
    """It is a member of a generation and is about to start its workers."""
    DRAINS = "drains"
    """Its workers have stopped as planned and those of others not yet, or it leaves."""
    BELOW_MINIMUM = "below minimum"
    """There are fewer nodes than `elastic.nodes_min`, also with those that rest."""
    PAUSED = "paused"
    """An operator has paused the run."""
    SPARE = "spare"
    """Others train, and it will not be a member now."""


@dataclass(frozen=True)
class StartTimes:
    """The times of this node's workers up to the first step of `generation`, on the agent's clock."""

    generation: Number
    start_s: Seconds
    group_s: Seconds
    restore_s: Seconds
    step_s: Seconds


@dataclass(frozen=True)
class Held:
    """Rows of one step that a node holds in memory: those of some workers of a generation."""

    generation: Number
    step: Number
    first_rank: _Ranks
    end_rank: _Ranks
    world_size: _Ranks
    """Workers of that generation: the state is whole once all their rows are held somewhere."""
    age_s: Seconds = 0.0
    """Seconds since these rows were complete here."""


@dataclass(frozen=True, order=True)
class Unusable:
    """One copy of a worker's rows in memory that could not be read: none may be resumed from."""

    generation: Number
    step: Number
    rank: Annotated[int, Field(ge=-1, le=99_999)]
    """-1: the rows of all workers do not fit together, so no copy of the state counts."""
    holder: Text
    """The incarnation of the node that holds the copy; empty with rank -1."""


@dataclass(frozen=True)
class NodeStatus:
    """A node's report about itself in every heartbeat."""

    member: Member
    phase: NodePhase
    generation: Number
    """The newest generation it knows."""
    log_length: Number
    """Number of log records that it has read. A peer that has read fewer reads the rest."""
    spent: Number
    """The newest generation of which it has started and ended its workers; 0 if none."""
    failure: Cause | None
    """Why those workers ended; None after a planned stop."""
    fingerprint: Annotated[Mapping[Text, Text], Field(max_length=_NAMES_MAX)]
    """Values that must be equal on all nodes, by name. Nodes that differ in one never train together."""
    unreachable: Annotated[tuple[Incarnation, ...], Field(max_length=_PEERS_MAX)] = ()
    """Incarnations that should answer this node but do not."""
    broken: Number = 0
    """The newest generation that it found broken itself."""
    leaving: bool = False
    """It has been asked to leave the run in good order."""
    leave_reason: Text = ""
    """Why it leaves, such as the notice of its platform; empty if nothing more is known."""
    resting: Text = ""
    """Why it does not take part for some seconds: its own workers failed repeatedly."""
    step: Number = 0
    loss: FiniteFloat | None = None
    step_age_s: Seconds | None = None
    """Seconds since its workers reported `step`; None before their first report."""
    start_times: StartTimes | None = None
    metrics_url: Text = ""
    held: Annotated[tuple[Held, ...], Field(max_length=_HELD_MAX)] = ()
    """What it can give to a new generation, its own workers' rows first."""
    unusable: Annotated[tuple[Unusable, ...], Field(max_length=_HELD_MAX)] = ()
    """Copies that its workers could not read."""

    @classmethod
    def first(
        cls, member: Member, fingerprint: Mapping[str, str], metrics_url: str = ""
    ) -> "NodeStatus":
        """The status of a node that has just started and has read nothing."""
        return cls(
            member=member,
            phase=NodePhase.WAITING,
            generation=0,
            log_length=0,
            spent=0,
            failure=None,
            fingerprint=fingerprint,
            metrics_url=metrics_url,
        )


@dataclass(frozen=True)
class Peer:
    """This node's facts about another one. Times are this node's monotonic clock."""

    status: NodeStatus | None
    """The newest status received; None before the first."""
    watched_since_s: float | None
    """Since when this node expects answers; None while it expects none."""
    heard_s: float | None
    """When the newest message that the peer is known to have received was sent: a proof that both directions work."""
    refused: bool
    """Its address refuses connections, or another incarnation answers there."""
    reached: bool = False
    """Whether a connection to its address has ever been established."""
    spoke_s: float | None = None
    """When its last message arrived. This is not a proof of life: the message may have been delayed for long."""


@dataclass(frozen=True)
class Limits:
    """The operator's limits: the `[elastic]` section of the configuration, and the slots of a step."""

    elastic: ElasticSection
    slots: int | None
    """V, the most workers that a step can use; None when unknown (stock torchrun)."""

    def interval_s(self, nodes: int) -> float:
        """Seconds between two messages to a peer. Longer with many nodes, because a leader receives from all."""
        return self.elastic.heartbeat_interval_s * max(1.0, nodes / _FULL_PACE_NODES)

    def silence_s(self, nodes: int) -> float:
        """Seconds without a proof of life after which a member counts as silent, with this many members."""
        return max(self.elastic.heartbeat_timeout_s, _INTERVALS_OF_SILENCE * self.interval_s(nodes))


def is_lost(peer: Peer | None, now_s: float, timeout_s: float) -> bool:
    """Whether a peer that should answer counts as gone: its address refuses, or it was silent for `timeout_s`."""
    if peer is None or peer.refused or peer.watched_since_s is None:
        return peer is not None and peer.refused
    last_s = max(peer.watched_since_s, peer.heard_s or peer.watched_since_s)
    return now_s - last_s > timeout_s


def incarnations(members: Iterable[Member]) -> frozenset[str]:
    """The incarnations of these members, as a set for look-ups."""
    return frozenset(member.incarnation for member in members)


def is_news(said: NodeStatus, before: NodeStatus) -> bool:
    """Whether a status differs in more than step, its age and loss, which change too often to wake every peer.

    So does what is held while workers run. Once they have stopped, peers wait for it.
    """
    unchanged = replace(
        said,
        step=before.step,
        loss=before.loss,
        step_age_s=before.step_age_s,
        held=before.held,
    )
    if unchanged != before:
        return True
    return said.phase is NodePhase.SETTLING and _rows(said) != _rows(before)


def _rows(status: NodeStatus) -> list[Held]:
    """What is held, without the ages: these differ in each message."""
    return [replace(each, age_s=0.0) for each in status.held]


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first field in which two nodes differ, in words; empty if they agree."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name} = {theirs.get(name)!r}, where the run has {mine.get(name)!r}"
    return ""
