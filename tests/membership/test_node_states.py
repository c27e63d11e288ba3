"""The number of nodes in each state, from the facts of one node's turn."""

from elastic_pt.membership.decision.node_states import NodeState, node_states
from elastic_pt.membership.decision.status import Peer
from elastic_pt.runlog.records import Stop
from tests.membership.world import (
    LIMITS,
    NOW_S,
    generation,
    lives,
    peer,
    refusing,
    silent,
    status,
    view_of,
    waiting,
)

ME = status("a")
NO_PEERS: dict[str, Peer] = {}


def shown(**facts: object) -> dict[str, int]:
    """The states that have nodes."""
    view = view_of(ME, **facts)  # type: ignore[arg-type]
    found = node_states(view, NOW_S, LIMITS.elastic.heartbeat_timeout_s)
    return {str(state): count for state, count in found.items() if count}


def test_each_member_is_in_one_state() -> None:
    """A member trains, leaves, rests or is lost; every way of being gone is the same to an operator."""
    # Otherwise a link is down, not the node.
    nobody_hears = {"unreachable": lives("e")}
    peers = {
        "b": peer(status("b", leaving=True, **nobody_hears)),
        "c": peer(status("c", resting="failed twice", **nobody_hears)),
        "d": refusing(status("d")),
        "e": silent(status("e")),
        "f": peer(status("f", leaving=True, resting="failed twice", **nobody_hears)),
    }
    found = shown(peers=peers, of=generation("a", "b", "c", "d", "e", "f", "g"))
    assert found == {"active": 2, "draining": 2, "resting": 1, "lost": 2}


def test_nodes_outside_the_generation_are_counted() -> None:
    """Newcomers, resting ones and those that are kept out are no members, but somebody pays for them."""
    peers = {
        "b": peer(waiting("b")),
        "c": peer(waiting("c")),
        "d": peer(waiting("d", resting="failed twice")),
        "e": refusing(waiting("e", resting="failed twice")),
    }
    found = shown(peers=peers, of=generation("a"), barred={"c": "kept out"})
    assert found == {"active": 1, "joining": 1, "resting": 1, "quarantined": 1}


def test_before_the_first_generation_and_after_the_end() -> None:
    """Nodes that look for each other join; after the end none is active; a node that is no member does not count."""
    assert shown(peers={"b": peer(waiting("b"))}, of=None) == {"joining": 2}
    assert shown(peers=NO_PEERS, of=generation("a"), stop=Stop("completed", 9)) == {}
    outside = node_states(view_of(ME, NO_PEERS, of=generation("b")), NOW_S, 2.0)
    assert outside == {}
    assert set(node_states(view_of(ME, NO_PEERS, of=generation("a")), NOW_S, 2.0)) == set(NodeState)
