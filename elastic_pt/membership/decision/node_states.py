"""How many nodes of a run are in which state, as one member sees it. Pure, for metrics."""

from enum import StrEnum

from elastic_pt.membership.decision.status import incarnations, is_lost
from elastic_pt.membership.decision.view import View


class NodeState(StrEnum):
    """What a node is to the run."""

    ACTIVE = "active"
    """A member that trains, or starts."""
    JOINING = "joining"
    """Alive, and may be a member of the next generation."""
    DRAINING = "draining"
    """A member that wants to leave."""
    RESTING = "resting"
    """Takes no part for some seconds, because its own workers failed repeatedly."""
    QUARANTINED = "quarantined"
    """Kept out for some seconds, because it broke the run too often."""
    LOST = "lost"
    """A member that is gone. The next generation is without it."""


def node_states(view: View, now_s: float, silence_s: float) -> dict[NodeState, int]:
    """The number of nodes in each state; empty for a node that is no member, because it watches only some of them.

    A peer counts as gone after `silence_s` without a sign of life.
    """
    found, generation = view.found, view.generation
    joining = [each for each in view.newcomers if each.member.node not in view.barred]
    counts = dict.fromkeys(NodeState, 0)
    counts[NodeState.JOINING] = len(joining)
    counts[NodeState.QUARANTINED] = len(view.barred)
    if generation is None:
        counts[NodeState.JOINING] += 1
        return counts
    if view.stop is not None:
        return dict.fromkeys(NodeState, 0)
    if found is None:
        return {}
    alive = incarnations(found.alive)
    draining = incarnations(found.leaving) & alive
    resting = (incarnations(found.resting) & alive) - draining
    outside = [
        peer
        for incarnation, peer in view.peers.items()
        if incarnation not in generation.incarnations and not is_lost(peer, now_s, silence_s)
    ]
    counts[NodeState.ACTIVE] = len(alive - draining - resting)
    counts[NodeState.DRAINING] = len(draining)
    counts[NodeState.RESTING] = len(resting) + sum(
        each.status is not None and bool(each.status.resting) for each in outside
    )
    counts[NodeState.LOST] = len(found.dead) + len(found.silent) + len(found.deaf)
    return counts
