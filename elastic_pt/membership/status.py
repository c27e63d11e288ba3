"""What a node says of itself, what others know of it, and the operator's bounds. No decisions in here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from elastic_pt.runlog.records import Cause, Member

MESH_NODES_MAX: Final = 32
"""Up to here every member asks every other one; in larger worlds members ask the first two."""
LEADERS: Final = 2
"""In a large world, members that everyone asks: the leader and who follows it."""
_FULL_PACE_NODES: Final = 512
_INTERVALS_OF_SILENCE: Final = 3.5
"""Proof of life is up to two intervals old when all is well; the rest is for messages that are late."""


class Phase(StrEnum):
    """What a node is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"


@dataclass(frozen=True)
class StartTimes:
    """How long this node's workers took to the first step of `generation`, on the agent's clock."""

    generation: int
    start_s: float
    group_s: float
    restore_s: float
    step_s: float


@dataclass(frozen=True)
class NodeStatus:
    """What a node says of itself in every heartbeat."""

    member: Member
    phase: Phase
    generation: int
    """The newest generation it knows."""
    log_length: int
    """Records of the log it knows; a peer that knows fewer reads on."""
    spent: int
    """The newest generation whose workers it had and has no more; 0 if none."""
    failure: Cause | None
    """Why it spent that generation; None when it stopped as planned."""
    fingerprint: Mapping[str, str]
    """What nodes must agree on, by name; nodes that differ in one never train together."""
    unreachable: tuple[str, ...] = ()
    """Incarnations that should answer this node and do not."""
    broken: int = 0
    """The newest generation that it has given up because of something it saw itself."""
    leaving: bool = False
    """It wants to go, in good order."""
    resting: str = ""
    """Why it takes no part for a while: its own workers kept failing, and it gives the trouble time to pass."""
    step: int = 0
    loss: float | None = None
    start_times: StartTimes | None = None
    metrics_url: str = ""


@dataclass(frozen=True)
class Peer:
    """What this node knows of another one. Times are this node's monotonic clock."""

    status: NodeStatus | None
    """Its newest words; None if it never spoke."""
    watched_since_s: float | None
    """Since when it should answer this node; None while nobody expects that it does."""
    heard_s: float | None
    """When the newest message was sent that the peer is known to have received: proof of both directions."""
    refused: bool
    """Its address refuses connections, or another incarnation answers there."""
    reached: bool = False
    """Connecting to its address has worked."""
    spoke_s: float | None = None
    """When it last said something. No proof of life: it may have been long on its way."""


@dataclass(frozen=True)
class Limits:
    """The operator's bounds."""

    nodes_min: int
    nodes_max: int
    slots: int | None
    """V, the most workers a step can use; None when unknown (stock torchrun)."""
    heartbeat_timeout_s: float
    join_window_s: float
    takeover_s: float
    """How long log and pulse must stand still before somebody else's generation is taken over."""
    heartbeat_interval_s: float = 0.2

    def interval_s(self, nodes: int) -> float:
        """Seconds between two messages to a peer: longer where one node hears hundreds."""
        return self.heartbeat_interval_s * max(1.0, nodes / _FULL_PACE_NODES)

    def silence_s(self, nodes: int) -> float:
        """Seconds without proof of life after which a node of such a world counts as silent."""
        return max(self.heartbeat_timeout_s, _INTERVALS_OF_SILENCE * self.interval_s(nodes))


def is_lost(peer: Peer | None, now_s: float, timeout_s: float) -> bool:
    """Whether a node that should answer counts as gone."""
    if peer is None or peer.refused or peer.watched_since_s is None:
        return peer is not None and peer.refused
    last_s = max(peer.watched_since_s, peer.heard_s or peer.watched_since_s)
    return now_s - last_s > timeout_s


def incarnations(members: Iterable[Member]) -> frozenset[str]:
    """What tells members apart, to look them up by."""
    return frozenset(member.incarnation for member in members)


def is_news(said: NodeStatus, before: NodeStatus) -> bool:
    """Whether a node says something new, other than how far it has come: a thousand nodes do a step each second."""
    return replace(said, step=before.step, loss=before.loss) != before


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first field in which two nodes differ, in words; empty if they agree."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name} = {theirs.get(name)!r}, where the run has {mine.get(name)!r}"
    return ""
