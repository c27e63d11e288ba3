"""Faults of the network between nodes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import LOST, Action, Kind, Need, Strike

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena
    from elastic_pt.fleet.network import Network


def _network(act: Callable[["Network", Sequence[str], Strike], None]) -> Action:
    """What is done to the network of the struck nodes."""

    def strike(arena: "Arena", strike: Strike) -> None:
        assert arena.network is not None
        act(arena.network, strike.nodes, strike)

    return strike


def _heal(network: "Network", _: Sequence[str], __: Strike) -> None:
    network.heal()


def _link_down(network: "Network", nodes: Sequence[str], _: Strike) -> None:
    for node in nodes:
        network.link_down(node)


def _partition(network: "Network", nodes: Sequence[str], _: Strike) -> None:
    network.split(nodes, [each for each in network.nodes if each not in nodes])


def _one_way(network: "Network", nodes: Sequence[str], strike: Strike) -> None:
    for node in nodes:
        others = [each for each in network.nodes if each != node]
        network.block(node, from_=strike.choices.choice(others))


def _halves(network: "Network", _: Sequence[str], __: Strike) -> None:
    half = len(network.nodes) // 2
    network.split(network.nodes[:half], network.nodes[half:])


OF_NETWORK: Final = (
    Kind(
        "link_down",
        "a node's link is down: no packet passes, and no connection is reset",
        strike=_network(_link_down),
        heal=_network(_heal),
        needs=frozenset({Need.NETWORK}),
        evidence=LOST,
    ),
    Kind(
        "partition",
        "the struck nodes and all others cannot reach each other; all reach the bucket",
        strike=_network(_partition),
        heal=_network(_heal),
        needs=frozenset({Need.NETWORK}),
    ),
    Kind(
        "halves",
        "the first half of the nodes and the other half cannot reach each other; all reach the bucket",
        strike=_network(_halves),
        heal=_network(_heal),
        needs=frozenset({Need.NETWORK}),
    ),
    Kind(
        "one_way",
        "packets of one other node do not arrive at the struck node",
        strike=_network(_one_way),
        heal=_network(_heal),
        needs=frozenset({Need.NETWORK}),
    ),
)
