"""Who should train: a pure decision over what one node sees.

    facts (View, Limits, now_s)  ──► decide ──►  Propose | Drain | Wait | Ended, each with its reason

Every agent runs this over its own view; views differ, so several may propose at once, and the log lets
one of them through. A node takes part by what it says of itself in heartbeats:

    WAITING   no workers; ready to be a member (`spent` says which generation it has used up)
    RUNNING   workers of `generation` are up
    SETTLING  workers have stopped on purpose; their checkpoint is on its way to the bucket

A generation is broken once a member is lost or has spent it without being asked to. It is over, in good
order, once all its members have spent it. Liveness is the observer's own monotonic clock over answers
it got; no clock of another machine is ever looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from elastic_pt.elastic.records import Generation, Member, Stop

SPARE_SILENCE_SHARE: Final = 0.4
"""A newcomer calls the members on its own; one silent for this share of the timeout is not taken in."""


class Phase(StrEnum):
    """What a node is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"


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
    failure: str
    """Why it spent that generation; empty when it stopped as planned."""
    fingerprint: str
    """SHA-256 over everything nodes must agree on; nodes with another one never train together."""
    step: int = 0
    loss: float | None = None
    metrics_url: str = ""


@dataclass(frozen=True)
class Peer:
    """What this node knows of another one. Times are this node's monotonic clock."""

    status: NodeStatus | None
    """Its newest words; None if it never spoke."""
    watched_since_s: float
    heard_s: float | None
    refused: bool
    """Its address refuses connections, or another incarnation answers there."""


@dataclass(frozen=True)
class Limits:
    """The operator's bounds."""

    nodes_min: int
    nodes_max: int
    slots: int | None
    """V, the most workers a step can use; None when unknown (stock torchrun)."""
    heartbeat_timeout_s: float
    join_window_s: float


@dataclass(frozen=True)
class View:
    """The facts that one node decides from."""

    me: NodeStatus
    generation: Generation | None
    stop: Stop | None
    peers: Mapping[str, Peer] = field(default_factory=dict)
    """By incarnation."""
    newcomers_changed_s: float = 0.0
    """When the set of nodes that could join last changed."""


@dataclass(frozen=True)
class Propose:
    """Append a GENERATION of these members."""

    members: tuple[Member, ...]
    reason: str


@dataclass(frozen=True)
class Drain:
    """Have all workers checkpoint and stop after the same step, so that the world can change."""

    reason: str


@dataclass(frozen=True)
class Wait:
    """Nothing to do now. `broken` says that this node's workers have no future."""

    reason: str
    broken: bool = False


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    reason: str


Decision = Propose | Drain | Wait | Ended


def is_lost(peer: Peer | None, now_s: float, timeout_s: float) -> bool:
    """Whether a node that should answer counts as gone."""
    if peer is None:
        return False
    last_s = peer.watched_since_s if peer.heard_s is None else peer.heard_s
    return peer.refused or now_s - last_s > timeout_s


def spans(total: int, parts: int) -> list[int]:
    """`total` things over `parts` takers, as evenly as it goes, the first takers get the remainder."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def slots_per_member(members: Sequence[Member], slots: int | None) -> tuple[int, ...]:
    """Slots of each member's workers: worker r of W computes slots r, r + W, r + 2W, ..."""
    if slots is None:
        return ()
    per_worker = spans(slots, sum(member.workers for member in members))
    counts, first = [], 0
    for member in members:
        counts.append(sum(per_worker[first : first + member.workers]))
        first += member.workers
    return tuple(counts)


def decide(view: View, limits: Limits, now_s: float) -> Decision:
    """What this node should do now. Pure; agent process."""
    if view.stop is not None:
        return Ended(view.stop.reason)
    if (
        view.generation is not None
        and view.generation.rank_of(view.me.member.incarnation) is not None
    ):
        return _decide_as_member(view, view.generation, limits, now_s)
    return _decide_as_newcomer(view, limits, now_s)


def _decide_as_member(view: View, generation: Generation, limits: Limits, now_s: float) -> Decision:
    alive: list[Member] = []
    lost: list[Member] = []
    for member in generation.members:
        mine = member.incarnation == view.me.member.incarnation
        gone = not mine and is_lost(
            view.peers.get(member.incarnation), now_s, limits.heartbeat_timeout_s
        )
        (lost if gone else alive).append(member)
    statuses = {view.me.member.incarnation: view.me} | {
        incarnation: peer.status
        for incarnation, peer in view.peers.items()
        if peer.status is not None
    }
    spent = [
        statuses[member.incarnation]
        for member in alive
        if member.incarnation in statuses
        and statuses[member.incarnation].spent >= generation.number
    ]
    failures = [f"{status.member.node}: {status.failure}" for status in spent if status.failure]
    newcomers = _newcomers(view, limits, now_s)
    leads = alive[0].incarnation == view.me.member.incarnation

    if lost or failures or len(spent) == len(alive):
        causes = [f"lost {member.node}" for member in lost] + failures
        wanted = _admit([*alive, *newcomers], limits)
        reason = "; ".join(causes + _join_reasons(wanted, generation.members)) or "resumed"
        if len(wanted) < limits.nodes_min:
            return Wait(
                f"paused: {len(wanted)} of at least {limits.nodes_min} nodes; {reason}", broken=True
            )
        if not leads:
            return Wait(f"{alive[0].node} leads: {reason}", broken=True)
        return Propose(wanted, reason)

    joining = _join_reasons(_admit([*generation.members, *newcomers], limits), generation.members)
    settled_s = now_s - view.newcomers_changed_s
    if joining and leads and view.me.phase is Phase.RUNNING and settled_s >= limits.join_window_s:
        return Drain("; ".join(joining))
    return Wait("training" if not spent else "waiting for all members to stop")


def _decide_as_newcomer(view: View, limits: Limits, now_s: float) -> Decision:
    members = () if view.generation is None else view.generation.members
    for member in members:
        if not is_lost(view.peers.get(member.incarnation), now_s, limits.heartbeat_timeout_s):
            return Wait(f"asked {member.node} to be taken in")
    candidates = sorted(
        [view.me.member, *_newcomers(view, limits, now_s)],
        key=lambda member: (member.node, member.incarnation),
    )
    wanted = _admit(candidates, limits)
    if len(wanted) < limits.nodes_min:
        return Wait(f"waiting for nodes: {len(wanted)} of at least {limits.nodes_min}")
    if wanted[0].incarnation != view.me.member.incarnation:
        return Wait(f"{wanted[0].node} leads")
    full = len(wanted) == limits.nodes_max or len(wanted) < len(candidates)
    if not full and now_s - view.newcomers_changed_s < limits.join_window_s:
        return Wait("waiting for more nodes to arrive")
    return Propose(wanted, "started" if view.generation is None else "resumed by new nodes")


def _newcomers(view: View, limits: Limits, now_s: float) -> list[Member]:
    """Live nodes outside the generation that wait, know the same run, and agree with this node."""
    members = {
        member.incarnation for member in (view.generation.members if view.generation else ())
    }
    return sorted(
        (
            peer.status.member
            for incarnation, peer in view.peers.items()
            if peer.status is not None
            and incarnation not in members
            and peer.status.phase is Phase.WAITING
            and peer.status.fingerprint == view.me.fingerprint
            and not is_lost(peer, now_s, limits.heartbeat_timeout_s * SPARE_SILENCE_SHARE)
        ),
        key=lambda member: (member.node, member.incarnation),
    )


def _admit(candidates: Sequence[Member], limits: Limits) -> tuple[Member, ...]:
    """As many of the candidates, in order, as the bounds on nodes and slots allow."""
    admitted: list[Member] = []
    workers = 0
    for member in candidates:
        fits = limits.slots is None or workers + member.workers <= limits.slots
        if fits and len(admitted) < limits.nodes_max:
            admitted.append(member)
            workers += member.workers
    return tuple(admitted)


def _join_reasons(wanted: Sequence[Member], members: Sequence[Member]) -> list[str]:
    known = {member.incarnation for member in members}
    return [f"{member.node} joins" for member in wanted if member.incarnation not in known]
