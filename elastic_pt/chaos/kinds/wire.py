"""Faults of a node's link that let it work on, badly: delay, loss, little bandwidth, resets, flipped and doubled frames."""

from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import Strike
from elastic_pt.chaos.kinds.network import network_kind
from elastic_pt.fleet.forwarder import Disturbance

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena
    from elastic_pt.fleet.network import Network


def _disturb(network: "Network", strike: Strike) -> None:
    seed = strike.choices.randrange(2**32)
    for node in strike.nodes:
        network.disturb(node, Disturbance(**strike.parameters), seed=seed)


def _limit(network: "Network", strike: Strike) -> None:
    for node in strike.nodes:
        network.limit(node, int(strike.parameters["bytes_per_s"]))


def _reset(network: "Network", strike: Strike) -> None:
    for node in strike.nodes:
        for other in network.nodes:
            if other != node:
                network.reset(node, other)


def _frames(arena: "Arena", strike: Strike) -> int:
    """How many frames were lost, doubled or changed; of a delay all frames."""
    assert arena.network is not None
    what = {"delay_s": "frames", "jitter_s": "frames"}
    names = {what.get(name, name) for name in strike.parameters}
    counts = [arena.network.disturbed(node) for node in strike.nodes]
    return sum(each[name] for each in counts for name in names)


def _rejected(arena: "Arena", strike: Strike) -> int:
    assert arena.network is not None
    return sum(arena.network.rejected(node) for node in strike.nodes)


OF_WIRE: Final = (
    network_kind(
        "slow_link",
        "all frames to and from a node come `delay_s` later, and up to `jitter_s` more",
        _disturb,
        met=_frames,
        parameters={"delay_s": 0.05, "jitter_s": 0.0},
    ),
    network_kind(
        "lossy_link",
        "a share `lost` of the frames to and from a node is lost",
        _disturb,
        met=_frames,
        parameters={"lost": 0.02},
    ),
    network_kind(
        "duplicated_packets",
        "a share `duplicated` of the frames to and from a node comes twice",
        _disturb,
        met=_frames,
        parameters={"duplicated": 0.2},
    ),
    network_kind(
        "corrupt_packets",
        "in a share `flipped` of the frames to and from a node one bit is wrong, and the checksum is right",
        _disturb,
        met=_frames,
        parameters={"flipped": 0.01},
    ),
    network_kind(
        "narrow_link",
        "bytes to and from a node pass at `bytes_per_s`",
        _limit,
        parameters={"bytes_per_s": 300_000},
    ),
    network_kind(
        "reset_connections",
        "all connections between the struck node and the other nodes are reset, new ones too",
        _reset,
        met=_rejected,
    ),
)
