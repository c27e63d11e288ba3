"""What became of the members of the newest generation, as one of them sees it.

    facts (View, Limits, now_s) ──► assess ──► Assessment: who is gone, cut off, failed, leaving

Liveness is the observer's own monotonic clock over answers it got; no clock of another machine is ever
looked at.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from elastic_pt.membership.status import (
    MESH_NODES_MAX,
    Limits,
    NodeStatus,
    Peer,
    incarnations,
    is_lost,
)
from elastic_pt.runlog.records import Cause, Generation, Member, Stop

LINK_GRACE_SHARE: Final = 0.25
"""How much longer than the timeout a link must be down before one of its ends is parked: until then the
others may still find that the node itself is gone."""
LINK_FRESH_SHARE: Final = 0.5
"""That a member cannot reach another one counts as a broken link where the other one has been heard within
this share of the timeout; where it has not, it may itself be gone."""


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
    generation_since_s: float = float("inf")
    """When this node read the newest generation's record."""
    broken_since_s: float | None = None
    """When this node noticed that the newest generation has no future."""
    quiet_since_s: float = 0.0
    """Since when neither the log nor the pulse has moved."""
    quiet_until_s: float = math.inf
    """When that was last seen to be so."""
    barred: Mapping[str, str] = field(default_factory=dict)
    """Nodes in quarantine, by name, and why."""
    halt: str = ""
    """Why the run must end, if its history says so."""


@dataclass(frozen=True)
class Assessment:
    """What became of the members of the newest generation, as one of them sees it."""

    alive: tuple[Member, ...]
    """In rank order, this node included, whether they are still wanted or not."""
    dead: tuple[Member, ...]
    """Nobody answers at their address any more: they are gone for certain."""
    silent: tuple[Member, ...]
    """They should answer and do not, and no other member says that it hears them."""
    deaf: tuple[Member, ...]
    """They answer, but have not read the newest generation's record by now: whoever has lost the bucket can
    train with nobody."""
    broken_links: tuple[tuple[str, str], ...]
    """Pairs of live members (by incarnation) one of which cannot reach the other."""
    failures: tuple[Cause, ...]
    gave_up: tuple[Member, ...]
    """Members that found the generation broken, whatever this node sees."""
    leaving: tuple[Member, ...]
    """Members that want to go, and those that have gone in good order."""
    resting: tuple[Member, ...]
    """Members that take no part for a while, because their own workers kept failing."""
    over: bool
    """All members that are left have stopped their workers."""

    @property
    def broken(self) -> bool:
        """Whether the generation's workers have no future."""
        return bool(
            self.dead
            or self.silent
            or self.deaf
            or self.broken_links
            or self.failures
            or self.gave_up
        )


def assess(view: View, generation: Generation, limits: Limits, now_s: float) -> Assessment:
    """What became of the members. `view.me` is one of them. Pure; agent process."""
    mine = view.me.member.incarnation
    timeout_s = limits.silence_s(len(generation.members))
    # In a large world most members are strangers: nobody here asks them, so nothing here is said of them.
    spoken_of = view.peers.keys() & generation.incarnations - {mine}
    ranks = sorted(generation.rank_of(incarnation) or 0 for incarnation in spoken_of)
    known = [
        (member, view.peers[member.incarnation])
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
    words = {mine: view.me} | {
        member.incarnation: peer.status
        for member, peer in known
        if peer.status is not None and member.incarnation not in absent
    }
    links = {
        (min(speaker, other), max(speaker, other))
        for speaker, said in words.items()
        # What a member said of others is old where nobody waits for its next word.
        if speaker not in unheard and speaker not in unwatched
        for other in said.unreachable
        if other != speaker
        and generation.rank_of(other) is not None
        and other not in stale
        and other not in absent
    }
    heard_elsewhere = _heard_by_others(view, generation, words, absent | unheard)
    silent, deaf = [], []
    for member, peer in known:
        incarnation, said = member.incarnation, words.get(member.incarnation)
        if incarnation in absent:
            continue
        behind = said is not None and said.generation < generation.number
        if behind and (peer.heard_s or 0.0) - view.generation_since_s > limits.takeover_s:
            deaf.append(member)
        elif incarnation in unheard and incarnation not in heard_elsewhere:
            silent.append(member)
        elif incarnation in unheard and is_lost(peer, now_s, timeout_s * (1 + LINK_GRACE_SHARE)):
            links.add((min(mine, incarnation), max(mine, incarnation)))

    gone = absent | incarnations([*silent, *deaf])
    alive = generation.members
    if gone:
        alive = tuple(member for member in alive if member.incarnation not in gone)
    said_alive = {each: said for each, said in words.items() if each not in gone}
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


def _heard_by_others(
    view: View,
    generation: Generation,
    words: Mapping[str, NodeStatus],
    lost: Collection[str],
) -> set[str]:
    """Members that some answering member of a small world (where all ask all) does not call unreachable."""
    if len(generation.members) > MESH_NODES_MAX:
        return set()
    found: set[str] = set()
    for speaker, said in words.items():
        knows = said.generation >= generation.number
        if speaker != view.me.member.incarnation and speaker not in lost and knows:
            found |= generation.incarnations - set(said.unreachable) - {speaker}
    return found
