"""Who may be taken in, and how many: live nodes that agree, within the bounds on nodes and slots."""

from collections.abc import Sequence
from typing import Final

from elastic_pt.membership.assessment import View
from elastic_pt.membership.status import Limits, Phase, difference, incarnations, is_lost
from elastic_pt.runlog.records import Cause, CauseKind, Member

SPARE_SILENCE_SHARE: Final = 0.4
"""A newcomer that was silent for this share of the timeout is not taken in, ..."""
SPARE_INTERVALS: Final = 1.5
"""... unless that is less than so many of the intervals at which it is asked."""


def newcomers(
    view: View, limits: Limits, now_s: float, stay: Sequence[Member] = ()
) -> list[Member]:
    """Live nodes outside the generation that wait, do not rest, can reach all who stay, and agree with this node."""
    must_reach = incarnations(stay)
    number = 0 if view.generation is None else view.generation.number
    members = view.generation.incarnations if view.generation else frozenset()
    silence_s = max(
        limits.heartbeat_timeout_s * SPARE_SILENCE_SHARE,
        SPARE_INTERVALS * limits.interval_s(len(members)),
    )
    return sorted(
        (
            peer.status.member
            for incarnation, peer in view.peers.items()
            if peer.status is not None
            and incarnation not in members
            and peer.status.phase is Phase.WAITING
            and peer.status.generation >= number
            and not peer.status.leaving
            and not peer.status.resting
            and peer.status.member.node not in view.barred
            and not must_reach & set(peer.status.unreachable)
            and not difference(view.me.fingerprint, peer.status.fingerprint)
            and peer.reached
            and peer.heard_s is not None
            and not is_lost(peer, now_s, silence_s)
        ),
        key=lambda member: (member.node, member.incarnation),
    )


def admit(candidates: Sequence[Member], limits: Limits) -> tuple[Member, ...]:
    """As many of the candidates, in order, as the bounds on nodes and slots allow."""
    admitted: list[Member] = []
    workers = 0
    for member in candidates:
        fits = limits.slots is None or workers + member.workers <= limits.slots
        if fits and len(admitted) < limits.nodes_max:
            admitted.append(member)
            workers += member.workers
    return tuple(admitted)


def joiners(wanted: Sequence[Member], members: Sequence[Member]) -> list[Cause]:
    """Causes for those who are wanted and were no members."""
    known = incarnations(members)
    return [
        Cause(CauseKind.JOINED, member.node) for member in wanted if member.incarnation not in known
    ]


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
