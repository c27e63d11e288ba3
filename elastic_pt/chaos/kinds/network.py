"""Faults of the network between nodes."""

from collections.abc import Callable
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final

from elastic_pt.chaos.kinds.kind import (
    SILENT,
    Action,
    Evidence,
    Kind,
    Need,
    NothingToStrike,
    Strike,
)
from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena
    from elastic_pt.fleet.network import Network


def _on_network(
    act: Callable[["Network", Strike], None], count: Callable[["Network", Strike], int]
) -> Action:
    """The strike of a fault that does this to the network. It makes the same choices each time it is done."""

    def strike(arena: "Arena", strike: Strike) -> None:
        begin = strike.choices.getstate()

        def do(network: "Network") -> None:
            strike.choices.setstate(begin)
            act(network, strike)

        arena.disturb_network(strike.number, do, lambda network: count(network, strike))

    return strike


def network_kind(
    name: str,
    meaning: str,
    act: Callable[["Network", Strike], None],
    count: Callable[["Network", Strike], int],
    **more: Any,
) -> Kind:
    """A fault that does this to the network for a while. `count` tells how many packets it has met; `more` as of `Kind`."""
    return Kind(
        name,
        meaning,
        strike=_on_network(act, count),
        heal=lambda arena, strike: arena.heal_network(strike.number),
        met=lambda arena, strike: arena.packets_met(strike.number),
        needs=frozenset({Need.NETWORK}),
        **more,
    )


def _link_down(network: "Network", strike: Strike) -> None:
    for node in strike.nodes:
        network.link_down(node)


def _unsent(network: "Network", strike: Strike) -> int:
    return sum(network.unsent(node) for node in strike.nodes)


def _partition(network: "Network", strike: Strike) -> None:
    others = [each for each in network.nodes if each not in strike.nodes]
    if not others:
        raise NothingToStrike("no other node to cut them off from")
    network.split(strike.nodes, others)


def _one_way(network: "Network", strike: Strike) -> None:
    if not strike.others:
        raise NothingToStrike("no other node whose packets could be lost")
    for node in strike.nodes:
        network.block(node, from_=strike.choices.choice(strike.others))


def _halves(network: "Network", _: Strike) -> None:
    half = len(network.nodes) // 2
    network.split(network.nodes[:half], network.nodes[half:])


def rejected(network: "Network", strike: Strike) -> int:
    """How many packets between a struck node and another one were dropped, or answered by a reset."""
    pairs = permutations(network.nodes, 2)
    return sum(
        network.rejected(node, from_=other)
        for node, other in pairs
        if {node, other} & set(strike.nodes)
    )


CUT: Final = Evidence(
    causes=frozenset({CauseKind.LOST, CauseKind.PARKED, CauseKind.GAVE_UP}),
    may=frozenset({CauseKind.FAILED}),
    names_node=False,
)
"""Two nodes that live cannot reach each other: the members blame one of the two."""

OF_NETWORK: Final = (
    network_kind(
        "link_down",
        "a node's link is down: no packet passes, and no connection is reset",
        _link_down,
        _unsent,
        evidence=SILENT,
    ),
    network_kind(
        "partition",
        "the struck nodes and all others cannot reach each other; all reach the bucket",
        _partition,
        rejected,
        evidence=SILENT,
    ),
    network_kind(
        "halves",
        "the first half of the nodes and the other half cannot reach each other; all reach the bucket",
        _halves,
        lambda network, _: sum(
            network.rejected(node, from_=other) for node, other in permutations(network.nodes, 2)
        ),
        evidence=CUT,
    ),
    network_kind(
        "one_way",
        "packets of one other node do not arrive at the struck node",
        _one_way,
        rejected,
        evidence=CUT,
    ),
)
