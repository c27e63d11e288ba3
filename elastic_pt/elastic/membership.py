"""Who should train: a pure decision over what one node sees.

    facts (View, Limits, now_s) ──► assess ──► Assessment: who is gone, cut off, failed, leaving
                                └─► decide ──► Propose | Halt | Drain | Wait | Ended, each with its reason

Every agent runs this over its own view; views differ, so several may propose at once, and the log lets
one of them through. A node takes part by what it says of itself in heartbeats:

    WAITING   no workers; ready to be a member (`spent` says which generation it has used up)
    RUNNING   workers of `generation` are up
    SETTLING  workers have stopped on purpose; their checkpoint is on its way to the bucket

A generation is broken once a member is gone, cannot be reached by another one, or has spent it without
being asked to. It is over, in good order, once all its members have spent it. Three rules keep two halves
of a torn network from undoing each other's work:

    asked again   a world is formed only of nodes that answered after the trouble was noticed
    larger side   who sees fewer than half of the members (or half, without the first) lets the others go
                  first, for as long as the log or the pulse moves, and `takeover_s` beyond
    park          of two members that cannot reach each other one waits, whatever else they can reach

Liveness is the observer's own monotonic clock over answers it got; no clock of another machine is ever
looked at.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Final

from elastic_pt.elastic.records import Cause, CauseKind, Generation, Member, Stop

SPARE_SILENCE_SHARE: Final = 0.4
"""A newcomer that was silent for this share of the timeout is not taken in."""
LINK_GRACE_SHARE: Final = 0.25
"""How much longer than the timeout a link must be down before one of its ends is parked: until then the
others may still find that the node itself is gone."""
LINK_FRESH_SHARE: Final = 0.5
"""That a member cannot reach another one counts as a broken link where the other one has been heard within
this share of the timeout; where it has not, it may itself be gone."""
MESH_NODES_MAX: Final = 32
"""Up to here every member asks every other one; in larger worlds members ask the first two."""
LEADERS: Final = 2
"""In a large world, members that everyone asks: the leader and who follows it."""

_FULL_PACE_NODES: Final = 256
_INTERVALS_OF_SILENCE: Final = 2.5


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
class Propose:
    """Append a GENERATION of these members."""

    members: tuple[Member, ...]
    reason: str
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class Halt:
    """Append STOP: going on would repeat the same failure for ever."""

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
    asking: bool = False
    """Whether the next answer of a peer may change that."""


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    reason: str


Decision = Propose | Halt | Drain | Wait | Ended


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


def is_lost(peer: Peer | None, now_s: float, timeout_s: float) -> bool:
    """Whether a node that should answer counts as gone."""
    if peer is None or peer.refused or peer.watched_since_s is None:
        return peer is not None and peer.refused
    last_s = max(peer.watched_since_s, peer.heard_s or peer.watched_since_s)
    return now_s - last_s > timeout_s


def incarnations(members: Iterable[Member]) -> frozenset[str]:
    """What tells members apart, to look them up by."""
    return frozenset(member.incarnation for member in members)


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


def whom_to_ask(
    order: Sequence[Member], me: str, peers: Mapping[str, Peer], now_s: float, timeout_s: float
) -> list[Member]:
    """Which of the nodes in `order` this one keeps asking.

    All of them in a small world. In a large one the first two that answer, so that a star forms whose
    centre is never alone; the two themselves watch everyone, by the messages that everyone sends them.
    """
    others = (member for member in order if member.incarnation != me)
    if len(order) <= MESH_NODES_MAX:
        return list(others)
    lost = {each for each, peer in peers.items() if is_lost(peer, now_s, timeout_s)}
    # With the first ones gone, ask twice as many each time: a whole rack may have gone with them.
    count = max(LEADERS, sum(member.incarnation in lost for member in order) if lost else 0)
    return list(islice((each for each in others if each.incarnation not in lost), count))


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first field in which two nodes differ, in words; empty if they agree."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name} = {theirs.get(name)!r}, where the run has {mine.get(name)!r}"
    return ""


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
    words = {mine: view.me} | {
        member.incarnation: peer.status
        for member, peer in known
        if peer.status is not None and member.incarnation not in absent
    }
    links = {
        (min(speaker, other), max(speaker, other))
        for speaker, said in words.items()
        if speaker not in unheard
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


def decide(view: View, limits: Limits, now_s: float, found: Assessment | None = None) -> Decision:
    """What this node should do now; `found` is what `assess` says, if it has been asked. Pure; agent process."""
    if view.stop is not None:
        return Ended(view.stop.reason)
    generation = view.generation
    if generation is not None and generation.rank_of(view.me.member.incarnation) is not None:
        found = found or assess(view, generation, limits, now_s)
        return _decide_as_member(view, generation, found, limits, now_s)
    return _decide_as_newcomer(view, limits, now_s)


def _decide_as_member(
    view: View, generation: Generation, found: Assessment, limits: Limits, now_s: float
) -> Decision:
    if found.broken or found.over:
        return _decide_next_world(view, generation, found, limits, now_s)
    leaving = incarnations(found.leaving)
    leads = next(
        (each.incarnation for each in found.alive if each.incarnation not in leaving), ""
    ) in (view.me.member.incarnation, "")
    if leads and view.me.phase is Phase.RUNNING:
        reasons = [f"{member.node} leaves" for member in found.leaving]
        waiting = newcomers(view, limits, now_s, found.alive)
        wanted = _admit([*generation.members, *waiting], limits)
        joining = _joiners(wanted, generation.members)
        settled = now_s - view.newcomers_changed_s >= limits.join_window_s
        if joining and (settled or len(wanted) == limits.nodes_max):
            reasons += [str(cause) for cause in joining]
        if reasons:
            return Drain("; ".join(reasons))
    stopping = any(
        peer.status is not None and peer.status.spent >= generation.number
        for peer in view.peers.values()
        if peer.status is not None
        and generation.rank_of(peer.status.member.incarnation) is not None
    )
    return Wait("waiting for all members to stop" if stopping else "training")


def _decide_next_world(
    view: View, generation: Generation, found: Assessment, limits: Limits, now_s: float
) -> Decision:
    """The newest generation is broken or over: who goes on?"""
    parked = park(found.broken_links, generation.members)
    going = incarnations(found.leaving) | set(parked)
    stay = [member for member in found.alive if member.incarnation not in going]
    allowed = [member for member in stay if member.node not in view.barred]
    # Rather a node that fails often than a run that stands still.
    barred = []
    if len(allowed) >= limits.nodes_min:
        barred = [member for member in stay if member.node in view.barred]
        stay = allowed
    wanted = _admit([*stay, *newcomers(view, limits, now_s, stay)], limits)
    if len(wanted) < limits.nodes_min:
        free = replace(view, barred={})
        wanted = _admit([*stay, *newcomers(free, limits, now_s, stay)], limits)
    causes = (
        *_losses(view, found, parked, generation, now_s),
        *found.failures,
        *(Cause(CauseKind.LEFT, member.node) for member in found.leaving),
        *(Cause(CauseKind.BARRED, member.node, view.barred[member.node]) for member in barred),
        *_joiners(wanted, generation.members),
    )
    if not causes:
        causes = tuple(
            Cause(CauseKind.GAVE_UP, member.node, "for a while it could not reach the others")
            for member in found.gave_up
        )
    reason = "; ".join(str(cause) for cause in causes) or "resumed"
    if len(wanted) < limits.nodes_min:
        return Wait(
            f"paused: {len(wanted)} of at least {limits.nodes_min} nodes; {reason}", broken=True
        )
    since_s = view.broken_since_s if view.broken_since_s is not None else now_s
    quiet_s = max(0.0, min(now_s, view.quiet_until_s) - max(view.quiet_since_s, since_s))
    others_first = not _is_larger_side([*stay, *barred], found, generation)
    if others_first and quiet_s < limits.takeover_s:
        return Wait(
            f"cut off with {len(found.alive)} of {len(generation.members)} members: "
            f"the others go first; {reason}",
            broken=True,
        )
    if view.halt and found.failures:
        return Halt(view.halt)
    mine = view.me.member.incarnation
    turn = next((n for n, each in enumerate(wanted) if each.incarnation == mine), len(wanted))
    # Who leads may see things differently, and wait for somebody else: the next in order has a try then,
    # the two sides by turns.
    if turn == len(wanted) or quiet_s < (2 * turn + others_first) * limits.takeover_s:
        return Wait(f"{wanted[0].node} leads: {reason}", broken=True)
    unconfirmed = [member.node for member in wanted if not _answered(view, member, since_s)]
    if found.broken and unconfirmed:
        return Wait(
            f"asking whether {', '.join(unconfirmed)} can go on; {reason}", broken=True, asking=True
        )
    return Propose(wanted, reason, causes)


def _losses(
    view: View,
    found: Assessment,
    parked: Sequence[str],
    generation: Generation,
    now_s: float,
) -> list[Cause]:
    """Causes for the members that do not go on through no decision of their own."""
    noticed_s = view.broken_since_s if view.broken_since_s is not None else now_s

    def sign_of_life_s(member: Member) -> float:
        peer = view.peers.get(member.incarnation)
        return noticed_s if peer is None or peer.heard_s is None else peer.heard_s

    causes = []
    dead, silent, deaf = (incarnations(each) for each in (found.dead, found.silent, found.deaf))
    for member in generation.members:
        silence_s = max(0.0, noticed_s - sign_of_life_s(member))
        if member.incarnation in dead:
            detail = "its address refuses connections"
            causes.append(Cause(CauseKind.LOST, member.node, detail, detect_s=silence_s))
        elif member.incarnation in silent or member.incarnation in deaf:
            detail = f"silent for {silence_s:.1f} s"
            if member.incarnation in deaf:
                detail = "it does not read the log"
            causes.append(Cause(CauseKind.LOST, member.node, detail, detect_s=silence_s))
        elif member.incarnation in parked:
            others = {each for link in found.broken_links for each in link}
            names = [
                each.node
                for each in generation.members
                if each.incarnation in others
                and each is not member
                and _linked(found.broken_links, each.incarnation, member.incarnation)
            ]
            detail = f"no link to {', '.join(names)}"
            causes.append(Cause(CauseKind.PARKED, member.node, detail, detect_s=silence_s))
    return causes


def _linked(links: Sequence[tuple[str, str]], one: str, other: str) -> bool:
    return (min(one, other), max(one, other)) in links


def park(broken_links: Sequence[tuple[str, str]], order: Sequence[Member]) -> tuple[str, ...]:
    """Incarnations that must wait so that those who go on can all reach each other.

    The one with the most broken links first, of equals the one that ranks last: cheap, the same on
    every node, and with two sides torn apart it is the smaller side.
    """
    rank = {member.incarnation: index for index, member in enumerate(order)}
    left, parked = list(broken_links), []
    while left:
        ends = [end for link in left for end in link]
        worst = max(set(ends), key=lambda end: (ends.count(end), rank.get(end, len(rank)), end))
        parked.append(worst)
        left = [link for link in left if worst not in link]
    return tuple(sorted(parked))


def _is_larger_side(side: Sequence[Member], found: Assessment, generation: Generation) -> bool:
    """Whether a side has more than half of the members that may be alive, or is the first half."""
    out, inside = incarnations([*found.dead, *found.leaving]), incarnations(side)
    voters = [each.incarnation for each in generation.members if each.incarnation not in out]
    here = [incarnation for incarnation in voters if incarnation in inside]
    if 2 * len(here) == len(voters):
        return not voters or voters[0] in inside
    return 2 * len(here) > len(voters)


def _answered(view: View, member: Member, since_s: float) -> bool:
    """Whether a node is known to have received something that was sent since then."""
    if member.incarnation == view.me.member.incarnation:
        return True
    peer = view.peers.get(member.incarnation)
    return peer is not None and peer.heard_s is not None and peer.heard_s >= since_s


def _decide_as_newcomer(view: View, limits: Limits, now_s: float) -> Decision:
    members = () if view.generation is None else view.generation.members
    timeout_s = limits.silence_s(len(members))
    reachable = [
        member
        for member in members
        if not is_lost(view.peers.get(member.incarnation), now_s, timeout_s)
    ]
    if reachable:
        if view.me.member.node in view.barred:
            return Wait(f"kept out: {view.barred[view.me.member.node]}")
        missing = [member.node for member in members if member.incarnation in view.me.unreachable]
        if missing:
            return Wait(f"parked: no link to {', '.join(missing)}")
        return Wait(f"asked {reachable[0].node} to be taken in")
    if members:
        refused = all(
            peer is not None and peer.refused
            for peer in (view.peers.get(member.incarnation) for member in members)
        )
        # Who refuses is most likely gone; who is silent may train on behind a torn network.
        needed_s = limits.takeover_s / 2 if refused else limits.takeover_s
        if min(now_s, view.quiet_until_s) - view.quiet_since_s < needed_s:
            return Wait("no member answers: watching whether the run goes on without this node")
    if view.me.leaving:
        return Wait("leaving")
    return _decide_first_world(view, limits, now_s)


def _decide_first_world(view: View, limits: Limits, now_s: float) -> Decision:
    """No member is left, or there never was one: those who wait form a world."""
    everyone = sorted(
        [view.me.member, *newcomers(replace(view, barred={}), limits, now_s)],
        key=lambda member: (member.node, member.incarnation),
    )
    allowed = [member for member in everyone if member.node not in view.barred]
    candidates = everyone if len(_admit(allowed, limits)) < limits.nodes_min else allowed
    known = incarnations(candidates)
    links = {
        (min(speaker, other), max(speaker, other))
        for speaker, said in (
            (member.incarnation, _status_of(view, member)) for member in candidates
        )
        if said is not None
        for other in said.unreachable
        if other in known and other != speaker
    }
    parked = park(sorted(links), candidates)
    wanted = _admit([each for each in candidates if each.incarnation not in parked], limits)
    if len(wanted) < limits.nodes_min:
        return Wait(f"waiting for nodes: {len(wanted)} of at least {limits.nodes_min}")
    if wanted[0].incarnation != view.me.member.incarnation:
        return Wait(f"{wanted[0].node} leads")
    full = len(wanted) == limits.nodes_max or len(wanted) < len(candidates)
    if not full and now_s - view.newcomers_changed_s < limits.join_window_s:
        return Wait("waiting for more nodes to arrive")
    return Propose(wanted, "started" if view.generation is None else "resumed by new nodes")


def _status_of(view: View, member: Member) -> NodeStatus | None:
    if member.incarnation == view.me.member.incarnation:
        return view.me
    peer = view.peers.get(member.incarnation)
    return None if peer is None else peer.status


def newcomers(
    view: View, limits: Limits, now_s: float, stay: Sequence[Member] = ()
) -> list[Member]:
    """Live nodes outside the generation that wait, can reach all who stay, and agree with this node."""
    must_reach = incarnations(stay)
    number = 0 if view.generation is None else view.generation.number
    members = view.generation.incarnations if view.generation else frozenset()
    silence_s = limits.heartbeat_timeout_s * SPARE_SILENCE_SHARE
    return sorted(
        (
            peer.status.member
            for incarnation, peer in view.peers.items()
            if peer.status is not None
            and incarnation not in members
            and peer.status.phase is Phase.WAITING
            and peer.status.generation >= number
            and not peer.status.leaving
            and peer.status.member.node not in view.barred
            and not must_reach & set(peer.status.unreachable)
            and not difference(view.me.fingerprint, peer.status.fingerprint)
            and peer.reached
            and peer.heard_s is not None
            and not is_lost(peer, now_s, silence_s)
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


def _joiners(wanted: Sequence[Member], members: Sequence[Member]) -> list[Cause]:
    known = incarnations(members)
    return [
        Cause(CauseKind.JOINED, member.node) for member in wanted if member.incarnation not in known
    ]
