"""Faults of the network between nodes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import LOST, Action, Kind, Need, NothingToStrike, Strike

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena
    from elastic_pt.fleet.network import Network


def on_network(act: Callable[["Network", Strike], None]) -> Action:
    """The strike of a fault that does this to the network. It makes the same choices each time it is done."""

    def strike(arena: "Arena", strike: Strike) -> None:
        begin = strike.choices.getstate()

        def do(network: "Network") -> None:
            strike.choices.setstate(begin)
            act(network, strike)

        arena.disturb_network(strike.number, do)

    return strike


def heal_network(arena: "Arena", strike: Strike) -> None:
    """The end of such a fault. Others that still last go on."""
    arena.heal_network(strike.number)


def _link_down(network: "Network", strike: Strike) -> None:
    for node in strike.nodes:
        network.link_down(node)


def _partition(network: "Network", strike: Strike) -> None:
    others = [each for each in network.nodes if each not in strike.nodes]
    if not others:
        raise NothingToStrike("no other node to cut them off from")
    network.split(strike.nodes, others)


def _one_way(network: "Network", strike: Strike) -> None:
    for node in strike.nodes:
        others = [each for each in network.nodes if each != node]
        if not others:
            raise NothingToStrike("no other node whose packets could be lost")
        network.block(node, from_=strike.choices.choice(others))


def _halves(network: "Network", _: Strike) -> None:
    half = len(network.nodes) // 2
    network.split(network.nodes[:half], network.nodes[half:])


OF_NETWORK: Final = (
    Kind(
        "link_down",
        "a node's link is down: no packet passes, and no connection is reset",
        strike=on_network(_link_down),
        heal=heal_network,
        needs=frozenset({Need.NETWORK}),
        evidence=LOST,
    ),
    Kind(
        "partition",
        "the struck nodes and all others cannot reach each other; all reach the bucket",
        strike=on_network(_partition),
        heal=heal_network,
        needs=frozenset({Need.NETWORK}),
    ),
    Kind(
        "halves",
        "the first half of the nodes and the other half cannot reach each other; all reach the bucket",
        strike=on_network(_halves),
        heal=heal_network,
        needs=frozenset({Need.NETWORK}),
    ),
    Kind(
        "one_way",
        "packets of one other node do not arrive at the struck node",
        strike=on_network(_one_way),
        heal=heal_network,
        needs=frozenset({Need.NETWORK}),
    ),
)
