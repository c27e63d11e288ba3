"""What one node should do now: a pure decision from the facts that it has, with its reason.

    View, Limits, now_s ──► decide ──► Propose | Halt | Paused | Drain | Save | Wait | Ended

docs/membership.md has the table of all decisions. Every agent decides from its own view. Views differ, so
several nodes may propose at once; the log accepts one proposal. A node takes part by the phase in its heartbeats:

    WAITING   no workers; ready to be a member (`spent`: the newest generation that it has spent)
    RUNNING   workers of `generation` are up
    SETTLING  workers have stopped on purpose; their last state is being mirrored and uploaded

A generation is broken when a member is gone, cannot be reached by another one, or has spent it without a drain. It
is over, in good order, when all its members have spent it. Three rules prevent that two halves of a split network
replace each other's generations:

    ask again     a generation starts only with nodes that have answered since the failure was detected. So must a
                  node that is parked because others cannot reach it: if it is gone, it is lost, not parked
    larger side   a side with fewer than half of the members (or half of them, without the first one) waits
                  while the log or the pulse changes, and for `takeover_s` after that
    park          of two members that cannot reach each other, one waits, even if it can reach all others
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from elastic_pt.membership.decision.admission import admit, joiners
from elastic_pt.membership.decision.assessment import Assessment
from elastic_pt.membership.decision.causes import leaves, losses, rest_of
from elastic_pt.membership.decision.settled import is_ahead, needed
from elastic_pt.membership.decision.status import (
    Idle,
    Limits,
    NodePhase,
    incarnations,
    is_lost,
)
from elastic_pt.membership.decision.view import View
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member, Request, Verb

_SUSPENDING: Final = (Verb.PAUSE, Verb.STOP)


@dataclass(frozen=True)
class Propose:
    """Append a GENERATION of these members."""

    members: tuple[Member, ...]
    reason: str
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class Halt:
    """Append STOP: another attempt would fail in the same way."""

    reason: str


@dataclass(frozen=True)
class Paused:
    """Append CONTROL: the pause that was asked for has been reached."""

    request: Request
    reason: str


@dataclass(frozen=True)
class Drain:
    """Ask all workers to checkpoint and stop after the same step, so that the members can change."""

    reason: str


@dataclass(frozen=True)
class Save:
    """Have all workers checkpoint after the same step and go on."""

    request: int
    """Index of the CONTROL record that asked for it."""
    reason: str


@dataclass(frozen=True)
class Wait:
    """Do nothing now."""

    reason: str
    broken: bool = False
    """Whether the generation of this node is broken: its workers must end."""
    asking: bool = False
    """Whether the next answer of a peer may end the wait."""
    watching: bool = False
    """Whether no generation trains, and this node is the first that waits: it watches the log and tells people."""
    idle: Idle = field(default=Idle.AGREES, compare=False)
    """Why this node has no workers, if it has none. Not compared: the node acts in the same way."""


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    reason: str


Decision = Propose | Halt | Paused | Drain | Save | Wait | Ended


def decide(view: View, limits: Limits, now_s: float) -> Decision:
    """What this node should do now. Pure; agent process."""
    if view.stop is not None:
        return Ended(view.stop.reason)
    if view.generation is not None and view.found is not None:
        return _decide_as_member(view, view.generation, view.found, limits, now_s)
    return _decide_as_newcomer(view, limits, now_s)


def idle_of(decision: Decision, *, leaving: bool) -> Idle:
    """Why this node has no workers, if it has none."""
    if leaving:
        return Idle.DRAINS
    match decision:
        case Wait():
            return decision.idle
        case Paused():
            return Idle.PAUSED
    return Idle.AGREES


def _decide_as_member(
    view: View, generation: Generation, found: Assessment, limits: Limits, now_s: float
) -> Decision:
    if found.broken or found.over:
        return _decide_next_world(view, generation, found, limits, now_s)
    if _leads(view, found) and view.me.phase is NodePhase.RUNNING:
        reasons = [str(each) for each in view.requests if each.verb in _SUSPENDING]
        reasons += [str(leaves(view, member)) for member in found.leaving]
        waiting = _can_join(view, found.alive, view.barred)
        wanted = admit([*generation.members, *waiting], limits)
        joining = joiners(wanted, generation.members)
        settled = now_s - view.newcomers_changed_s >= limits.elastic.join_window_s
        if joining and (settled or len(wanted) == limits.elastic.nodes_max):
            reasons += [str(cause) for cause in joining]
        if reasons:
            return Drain("; ".join(reasons))
        if (wish := view.asked(Verb.CHECKPOINT)) is not None:
            return Save(wish.index, str(wish))
    stopping = any(
        peer.status is not None
        and peer.status.spent >= generation.number
        and generation.rank_of(peer.status.member.incarnation) is not None
        for peer in view.peers.values()
    )
    stopped = view.me.spent >= generation.number
    return Wait(
        "waiting for all members to stop" if stopping else "training",
        idle=Idle.DRAINS if stopped else Idle.STARTS,
    )


def _leads(view: View, found: Assessment) -> bool:
    """Whether this node is the first member that stays, or all leave."""
    leaving = incarnations(found.leaving)
    stay = (each.incarnation for each in found.alive if each.incarnation not in leaving)
    return next(stay, "") in (view.me.member.incarnation, "")


def _decide_paused(request: Request, *, reached: bool, leads: bool, broken: bool) -> Decision:
    """No generation may begin. One node says so once all workers have stopped, and watches the log for the others."""
    reason = f"paused {request.origin}"
    if reached and leads and not request.done:
        return Paused(request, reason)
    return Wait(reason, broken=broken, watching=leads, idle=Idle.PAUSED)


def _decide_next_world(
    view: View, generation: Generation, found: Assessment, limits: Limits, now_s: float
) -> Decision:
    """The newest generation is broken or over: which nodes form the next one, and who proposes it."""
    nodes_min, takeover_s = limits.elastic.nodes_min, limits.elastic.takeover_s
    parked = park(found.broken_links, generation.members)
    leave = _may_leave(view, generation, found, parked)
    going = incarnations(leave) | set(parked) | incarnations(found.resting)
    stay = [member for member in found.alive if member.incarnation not in going]
    allowed = [member for member in stay if member.node not in view.barred]
    # Prefer a node that fails often to a stopped run.
    barred = []
    if len(allowed) >= nodes_min:
        barred = [member for member in stay if member.node in view.barred]
        stay = allowed
    wanted = admit([*stay, *_can_join(view, stay, view.barred)], limits)
    if len(wanted) < nodes_min:
        wanted = admit([*stay, *_can_join(view, stay, ())], limits)
    causes = (
        *losses(view, found, parked, generation, now_s),
        *found.failures,
        *(leaves(view, member) for member in leave),
        *(Cause(CauseKind.BARRED, member.node, view.barred[member.node]) for member in barred),
        *joiners(wanted, generation.members),
    )
    if not causes:
        causes = tuple(
            Cause(CauseKind.GAVE_UP, member.node, "for a while it could not reach the others")
            for member in found.gave_up
        )
    reason = "; ".join(str(cause) for cause in causes) or "resumed"
    since_s = view.broken_since_s if view.broken_since_s is not None else now_s
    quiet_s = max(0.0, min(now_s, view.quiet_until_s) - max(view.quiet_since_s, since_s))
    others_first = not _is_larger_side([*stay, *barred, *found.resting], found, generation)
    too_few = len(wanted) < nodes_min
    may_end = not others_first or (not too_few and quiet_s >= takeover_s)
    if view.halt and found.failures and may_end:
        return Halt(view.halt)
    stop, pause = view.asked(Verb.STOP), view.asked(Verb.PAUSE)
    if not too_few and _owes_commit(view, generation, found, wanted):
        stop = pause = None
    if stop is not None and (not others_first or quiet_s >= takeover_s):
        return Halt(f"stopped {stop.origin}")
    if pause is not None:
        leads = _leads(view, found)
        return _decide_paused(pause, reached=found.over, leads=leads, broken=found.broken)
    if too_few:
        resting = [said for each in found.resting if (said := rest_of(view, each))]
        paused = f"paused: {len(wanted)} of at least {nodes_min} nodes"
        why = "; ".join((paused, *(resting or [reason])))
        # A node that rests comes back by itself: the run waits for its next try, not for more nodes.
        enough = len(wanted) + len(found.resting) >= nodes_min
        idle = Idle.AGREES if enough else Idle.BELOW_MINIMUM
        return Wait(why, broken=True, idle=idle, watching=_leads(view, found))
    if others_first and quiet_s < takeover_s:
        return Wait(
            f"cut off with {len(found.alive)} of {len(generation.members)} members: "
            f"the others go first; {reason}",
            broken=True,
        )
    mine = view.me.member.incarnation
    position = next((n for n, each in enumerate(wanted) if each.incarnation == mine), len(wanted))
    # The proposer's view may differ, so that it waits for another node. Each next node in order proposes after a
    # longer timeout. The factor 2 leaves every other period to the other side of a split.
    if position == len(wanted) or quiet_s < (2 * position + others_first) * takeover_s:
        return Wait(f"{wanted[0].node} leads: {reason}", broken=True)
    # Another member may have noticed the end of a parked node before this one did. Its answer shows that it lives.
    here = set(parked) - set(view.me.unreachable)
    asked = [*wanted, *(each for each in found.alive if each.incarnation in here)]
    unconfirmed = [member.node for member in asked if not _answered(view, member, since_s)]
    if found.broken and unconfirmed:
        return Wait(
            f"asking whether {', '.join(unconfirmed)} can continue; {reason}",
            broken=True,
            asking=True,
        )
    return Propose(wanted, reason, causes)


def _owes_commit(
    view: View, generation: Generation, found: Assessment, wanted: Sequence[Member]
) -> bool:
    """Whether a pause or a stop must wait for one more generation, which commits a step: both promise a commit.

    The workers may have stopped for another reason before the request, or a member was lost before the commit.
    """
    pause = view.asked(Verb.PAUSE)
    if pause is not None and pause.done:
        return False
    # Another attempt would most likely fail in the same way.
    before = {each.kind for each in generation.causes} - {CauseKind.DAMAGED}
    if any(each.kind in before for each in found.failures):
        return False
    return is_ahead(generation, wanted, view.statuses_of(wanted), view.committed_step)


def _may_leave(
    view: View, generation: Generation, found: Assessment, parked: Sequence[str]
) -> list[Member]:
    """The members that leave now. One that the others need to resume from the newest state leaves later."""
    leaving = incarnations(found.leaving)
    out = leaving | set(parked) | incarnations(found.resting)
    alive = [member for member in found.alive if member.incarnation in leaving]
    stay = [member for member in found.alive if member.incarnation not in out]
    statuses = view.statuses_of(found.alive)
    kept = incarnations(needed(generation, stay, alive, statuses, view.committed_step))
    return [member for member in found.leaving if member.incarnation not in kept]


def park(broken_links: Sequence[tuple[str, str]], order: Sequence[Member]) -> tuple[str, ...]:
    """Incarnations that must wait, so that the others can all reach each other.

    The member with the most broken links is parked first; of equals, the one that ranks last. This is cheap, gives
    the same result on every node that knows the same links, and parks the smaller side of a split network.
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
    """Whether a side has more than half of the members that may be alive, or half of them with the first one."""
    out, inside = incarnations([*found.dead, *found.leaving]), incarnations(side)
    voters = [each.incarnation for each in generation.members if each.incarnation not in out]
    here = [incarnation for incarnation in voters if incarnation in inside]
    if 2 * len(here) == len(voters):
        return not voters or voters[0] in inside
    return 2 * len(here) > len(voters)


def _answered(view: View, member: Member, since_s: float) -> bool:
    """Whether a node is known to have received a message that was sent since then."""
    if member.incarnation == view.me.member.incarnation:
        return True
    peer = view.peers.get(member.incarnation)
    return peer is not None and peer.heard_s is not None and peer.heard_s >= since_s


def _can_join(view: View, stay: Sequence[Member], barred: Collection[str]) -> list[Member]:
    """Newcomers that can reach every node of `stay` and are not barred."""
    must_reach = incarnations(stay)
    return [
        each.member
        for each in view.newcomers
        if each.member.node not in barred and not must_reach & set(each.unreachable)
    ]


def _decide_as_newcomer(view: View, limits: Limits, now_s: float) -> Decision:
    members = () if view.generation is None else view.generation.members
    if view.me.resting:
        return Wait(f"rests: {view.me.resting}", idle=Idle.SPARE)
    timeout_s = limits.silence_s(len(members))
    reachable = [
        member
        for member in members
        if not is_lost(view.peers.get(member.incarnation), now_s, timeout_s)
    ]
    if reachable:
        if view.me.member.node in view.barred:
            return Wait(f"kept out: {view.barred[view.me.member.node]}", idle=Idle.SPARE)
        missing = [member.node for member in members if member.incarnation in view.me.unreachable]
        if missing:
            return Wait(f"parked: no link to {', '.join(missing)}", idle=Idle.SPARE)
        if (pause := view.asked(Verb.PAUSE)) is not None:
            return Wait(f"paused {pause.origin}", idle=Idle.PAUSED)
        admitted = view.me.member in admit([*members, view.me.member], limits)
        return Wait(
            f"asked {reachable[0].node} to be admitted",
            idle=Idle.AGREES if admitted else Idle.SPARE,
        )
    if members:
        refused = all(
            peer is not None and peer.refused
            for peer in (view.peers.get(member.incarnation) for member in members)
        )
        # A refused connection most likely means that the process is gone. A silent member may still train.
        needed_s = limits.elastic.takeover_s / (2 if refused else 1)
        if min(now_s, view.quiet_until_s) - view.quiet_since_s < needed_s:
            return Wait("no member answers: watching whether the run continues without this node")
    if view.me.leaving:
        return Wait("leaving")
    return _decide_first_world(view, limits, now_s)


def _decide_first_world(view: View, limits: Limits, now_s: float) -> Decision:
    """No member is left, or there was none: the waiting nodes form a generation."""
    elastic = limits.elastic
    everyone = sorted(
        [view.me.member, *_can_join(view, (), ())],
        key=lambda member: (member.node, member.incarnation),
    )
    if (stop := view.asked(Verb.STOP)) is not None:
        return Halt(f"stopped {stop.origin}")
    if (pause := view.asked(Verb.PAUSE)) is not None:
        leads = everyone[0].incarnation == view.me.member.incarnation
        return _decide_paused(pause, reached=True, leads=leads, broken=False)
    allowed = [member for member in everyone if member.node not in view.barred]
    candidates = everyone if len(admit(allowed, limits)) < elastic.nodes_min else allowed
    known = incarnations(candidates)
    links = {
        (min(speaker, other), max(speaker, other))
        for speaker, said in ((member.incarnation, view.status_of(member)) for member in candidates)
        if said is not None
        for other in said.unreachable
        if other in known and other != speaker
    }
    parked = park(sorted(links), candidates)
    wanted = admit([each for each in candidates if each.incarnation not in parked], limits)
    if len(wanted) < elastic.nodes_min:
        why = f"waiting for nodes: {len(wanted)} of at least {elastic.nodes_min}"
        first = everyone[0].incarnation == view.me.member.incarnation
        return Wait(why, watching=first, idle=Idle.BELOW_MINIMUM)
    if wanted[0].incarnation != view.me.member.incarnation:
        return Wait(f"{wanted[0].node} leads")
    full = len(wanted) == elastic.nodes_max or len(wanted) < len(candidates)
    if not full and now_s - view.newcomers_changed_s < elastic.join_window_s:
        return Wait("waiting for more nodes to arrive")
    return Propose(wanted, "started" if view.generation is None else "resumed by new nodes")
