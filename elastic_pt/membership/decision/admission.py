"""Which nodes may become members, and how many: live nodes that agree with this one, within the limits."""

from collections.abc import Mapping, Sequence
from typing import Final

from elastic_pt.membership.decision.status import (
    Limits,
    NodePhase,
    NodeStatus,
    Peer,
    difference,
    incarnations,
    is_lost,
)
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member

SPARE_SILENCE_SHARE: Final = 0.4
"""A newcomer that was silent for this share of the timeout may not join, ..."""
SPARE_INTERVALS: Final = 1.5
"""... unless that is shorter than this many heartbeat intervals."""


def newcomers(
    me: NodeStatus,
    generation: Generation | None,
    peers: Mapping[str, Peer],
    limits: Limits,
    now_s: float,
) -> tuple[NodeStatus, ...]:
    """Live nodes outside the generation that wait, do not rest and agree with this node, in a fixed order."""
    number = 0 if generation is None else generation.number
    members = frozenset() if generation is None else generation.incarnations
    silence_s = max(
        limits.elastic.heartbeat_timeout_s * SPARE_SILENCE_SHARE,
        SPARE_INTERVALS * limits.interval_s(len(members)),
    )
    found = [
        peer.status
        for incarnation, peer in peers.items()
        if peer.status is not None
        and incarnation not in members
        and peer.status.phase is NodePhase.WAITING
        and peer.status.generation >= number
        and not peer.status.leaving
        and not peer.status.resting
        and not difference(me.fingerprint, peer.status.fingerprint)
        and peer.reached
        and peer.heard_s is not None
        and not is_lost(peer, now_s, silence_s)
    ]
    return tuple(sorted(found, key=lambda each: (each.member.node, each.member.incarnation)))


def refusal(me: NodeStatus, applicant: NodeStatus, generation: Generation | None) -> str:
    """Why this node refuses a node that wants to join; empty if it does not.

    Members refuse a node that differs from them. Before the first generation, the first node by name does.
    """
    if applicant.phase is not NodePhase.WAITING:
        return ""
    mine, theirs = me.member, applicant.member
    if generation is None:
        may_refuse = (mine.node, mine.incarnation) < (theirs.node, theirs.incarnation)
    else:
        inside = generation.rank_of(mine.incarnation) is not None
        may_refuse = inside and generation.rank_of(theirs.incarnation) is None
    return difference(me.fingerprint, applicant.fingerprint) if may_refuse else ""


def admit(candidates: Sequence[Member], limits: Limits) -> tuple[Member, ...]:
    """As many of the candidates, in order, as the limits on nodes and slots allow."""
    admitted: list[Member] = []
    workers = 0
    for member in candidates:
        fits = limits.slots is None or workers + member.workers <= limits.slots
        if fits and len(admitted) < limits.elastic.nodes_max:
            admitted.append(member)
            workers += member.workers
    return tuple(admitted)


def joiners(wanted: Sequence[Member], members: Sequence[Member]) -> list[Cause]:
    """A JOINED cause for each wanted node that was no member."""
    known = incarnations(members)
    return [
        Cause(CauseKind.JOINED, member.node) for member in wanted if member.incarnation not in known
    ]


def spans(total: int, parts: int) -> list[int]:
    """`total` divided into `parts` nearly equal integers; the first ones take the remainder."""
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
