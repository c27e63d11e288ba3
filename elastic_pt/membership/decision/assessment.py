"""The state of the members of the newest generation, as one of them sees it.

    own status, peers, generation ──► assess ──► Assessment: which are alive, gone, cut off, failed, leaving

Liveness comes from this node's own monotonic clock and the answers that it received. The clock of another
machine is never read.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from elastic_pt.membership.decision.status import (
    MESH_NODES_MAX,
    Limits,
    NodeStatus,
    Peer,
    incarnations,
    is_lost,
)
from elastic_pt.runlog.records import Cause, Generation, Member

LINK_GRACE_SHARE: Final = 0.25
"""A link must be down for the timeout and this share of it before one of its ends is parked. Until then the other
members may still detect that the node itself is gone."""
LINK_FRESH_SHARE: Final = 0.5
"""If a member reports that it cannot reach another one, this is a broken link only if the other one has a proof of life
within this share of the timeout. Otherwise the other one may itself be gone."""


@dataclass(frozen=True)
class Assessment:
    """The state of the members of the newest generation, as one of them sees it."""

    alive: tuple[Member, ...]
    """Members that are not gone, in rank order, this node included. Some of them may leave or rest."""
    dead: tuple[Member, ...]
    """Their address refuses connections: they are gone for certain."""
    silent: tuple[Member, ...]
    """They do not answer, and no other member reports that it reaches them."""
    deaf: tuple[Member, ...]
    """They answer, but have not read the newest generation's record in time: they have lost the bucket."""
    broken_links: tuple[tuple[str, str], ...]
    """Pairs of live members (by incarnation) of which one cannot reach the other."""
    failures: tuple[Cause, ...]
    """Why members spent the generation, if that was not planned."""
    gave_up: tuple[Member, ...]
    """Members that report that the generation is broken."""
    leaving: tuple[Member, ...]
    """Members that want to leave, and members that have left in good order."""
    resting: tuple[Member, ...]
    """Members that do not take part for some seconds, because their own workers failed repeatedly."""
    over: bool
    """Whether all live members have stopped their workers."""

    @property
    def broken(self) -> bool:
        """Whether the generation's workers must end."""
        return bool(
            self.dead
            or self.silent
            or self.deaf
            or self.broken_links
            or self.failures
            or self.gave_up
        )


def assess(
    me: NodeStatus,
    generation: Generation,
    peers: Mapping[str, Peer],
    read_s: float,
    limits: Limits,
    now_s: float,
) -> Assessment:
    """The state of the members, of which `me` is one. `read_s` is when this node read the generation's record. Pure."""
    mine = me.member.incarnation
    timeout_s = limits.silence_s(len(generation.members))
    # With many members this node does not ask most of them, so it knows nothing of them: they count as alive.
    in_table = peers.keys() & generation.incarnations - {mine}
    ranks = sorted(generation.rank_of(incarnation) or 0 for incarnation in in_table)
    known = [
        (member, peers[member.incarnation])
        for member in (generation.members[rank] for rank in ranks)
    ]
    dead, left, mute, stale = [], [], [], set()
    for member, peer in known:
        said = peer.status
        lost = is_lost(peer, now_s, timeout_s)
        if said is not None and said.leaving and said.spent >= generation.number and lost:
            left.append(member)
        elif peer.refused:
            dead.append(member)
        else:
            if lost:
                mute.append(member)
            if is_lost(peer, now_s, timeout_s * LINK_FRESH_SHARE):
                stale.add(member.incarnation)
    absent = incarnations([*dead, *left])
    unheard = incarnations(mute)
    unwatched = {member.incarnation for member, peer in known if peer.watched_since_s is None}
    statuses = {mine: me} | {
        member.incarnation: peer.status
        for member, peer in known
        if peer.status is not None and member.incarnation not in absent
    }
    # If this node expects no answer from a member, the status that it has of it may be old.
    speakers = {each: said for each, said in statuses.items() if each not in unheard | unwatched}
    links = _reported_links(speakers, generation, stale | absent)
    heard_elsewhere = _heard_by_others(mine, generation, statuses, absent | unheard)
    silent, deaf = [], []
    for member, peer in known:
        incarnation, said = member.incarnation, statuses.get(member.incarnation)
        if incarnation in absent:
            continue
        behind = said is not None and said.generation < generation.number
        if behind and (peer.heard_s or 0.0) - read_s > limits.elastic.takeover_s:
            deaf.append(member)
        elif incarnation in unheard and incarnation not in heard_elsewhere:
            silent.append(member)
        elif incarnation in unheard and is_lost(peer, now_s, timeout_s * (1 + LINK_GRACE_SHARE)):
            links.add((min(mine, incarnation), max(mine, incarnation)))

    gone = absent | incarnations([*silent, *deaf])
    alive = generation.members
    if gone:
        alive = tuple(member for member in alive if member.incarnation not in gone)
    said_alive = {each: said for each, said in statuses.items() if each not in gone}
    spent = [
        said
        for _, said in sorted(said_alive.items(), key=lambda each: generation.rank_of(each[0]) or 0)
        if said.spent >= generation.number
    ]
    leaving = incarnations(left) | {each for each, said in said_alive.items() if said.leaving}
    gave_up = {each for each, said in said_alive.items() if said.broken >= generation.number}

    def in_rank_order(chosen: Collection[str]) -> tuple[Member, ...]:
        ranks = sorted(generation.rank_of(each) or 0 for each in chosen)
        return tuple(generation.members[rank] for rank in ranks)

    return Assessment(
        alive=alive,
        dead=tuple(dead),
        silent=tuple(silent),
        deaf=tuple(deaf),
        broken_links=tuple(sorted(link for link in links if not gone & set(link))),
        failures=tuple(said.failure for said in spent if said.failure is not None),
        gave_up=in_rank_order(gave_up),
        leaving=in_rank_order(leaving),
        resting=in_rank_order({each for each, said in said_alive.items() if said.resting}),
        over=len(spent) == len(alive),
    )


def _reported_links(
    statuses: Mapping[str, NodeStatus], generation: Generation, ignored: Collection[str]
) -> set[tuple[str, str]]:
    """Pairs of members of which one reports that it cannot reach the other, unless the other is `ignored`."""
    return {
        (min(speaker, other), max(speaker, other))
        for speaker, said in statuses.items()
        for other in said.unreachable
        if other != speaker and generation.rank_of(other) is not None and other not in ignored
    }


def _heard_by_others(
    mine: str,
    generation: Generation,
    statuses: Mapping[str, NodeStatus],
    lost: Collection[str],
) -> set[str]:
    """Members that another answering member reaches. Known only with few members, where all ask each other."""
    if len(generation.members) > MESH_NODES_MAX:
        return set()
    found: set[str] = set()
    for speaker, said in statuses.items():
        knows = said.generation >= generation.number
        if speaker != mine and speaker not in lost and knows:
            found |= generation.incarnations - set(said.unreachable) - {speaker}
    return found
