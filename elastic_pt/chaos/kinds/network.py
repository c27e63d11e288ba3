"""Faults of the network between nodes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

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


def network_kind(
    name: str, meaning: str, act: Callable[["Network", Strike], None], **more: Any
) -> Kind:
    """A fault that does this to the network for a while; `more` as of `Kind`."""
    return Kind(
        name,
        meaning,
        strike=on_network(act),
        heal=heal_network,
        needs=frozenset({Need.NETWORK}),
        **more,
    )


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
    network_kind(
        "link_down",
        "a node's link is down: no packet passes, and no connection is reset",
        _link_down,
        evidence=LOST,
    ),
    network_kind(
        "partition",
        "the struck nodes and all others cannot reach each other; all reach the bucket",
        _partition,
    ),
    network_kind(
        "halves",
        "the first half of the nodes and the other half cannot reach each other; all reach the bucket",
        _halves,
    ),
    network_kind(
        "one_way",
        "packets of one other node do not arrive at the struck node",
        _one_way,
    ),
)
