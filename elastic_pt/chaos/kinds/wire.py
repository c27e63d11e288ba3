"""Faults of a node's link that let it work on, badly: delay, loss, little bandwidth, resets, flipped and doubled frames."""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import Evidence, Strike
from elastic_pt.chaos.kinds.network import CUT, network_kind, rejected
from elastic_pt.fleet.forwarder import Disturbance
from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
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


def _frames(network: "Network", strike: Strike) -> int:
    """How many frames were lost, doubled or changed; of a delay all frames."""
    what = {"delay_s": "frames", "jitter_s": "frames"}
    names = {what.get(name, name) for name in strike.parameters}
    counts = [network.disturbed(node) for node in strike.nodes]
    return sum(each[name] for each in counts for name in names)


def _throttled(network: "Network", strike: Strike) -> int:
    return sum(network.throttled(node) for node in strike.nodes)


_SLOW: Final = Evidence(
    may=CUT.causes | CUT.may,
    names_node=False,
    silent="no event names a slow link yet (F10)",
)

OF_WIRE: Final = (
    network_kind(
        "slow_link",
        "all frames to and from a node come `delay_s` later, and up to `jitter_s` more",
        _disturb,
        _frames,
        parameters={"delay_s": 0.05, "jitter_s": 0.0},
        evidence=_SLOW,
    ),
    network_kind(
        "lossy_link",
        "a share `lost` of the frames to and from a node is lost",
        _disturb,
        _frames,
        parameters={"lost": 0.02},
        evidence=_SLOW,
    ),
    network_kind(
        "duplicated_packets",
        "a share `duplicated` of the frames to and from a node comes twice",
        _disturb,
        _frames,
        parameters={"duplicated": 0.2},
        evidence=Evidence(silent="TCP drops what comes twice"),
    ),
    network_kind(
        "corrupt_packets",
        "in a share `flipped` of the frames to and from a node one bit is wrong, and the checksum is right",
        _disturb,
        _frames,
        parameters={"flipped": 0.01},
        evidence=replace(_SLOW, silent="no check finds a wrong gradient yet (F11)"),
    ),
    network_kind(
        "narrow_link",
        "bytes to and from a node pass at `bytes_per_s`",
        _limit,
        _throttled,
        parameters={"bytes_per_s": 300_000},
        evidence=_SLOW,
    ),
    network_kind(
        "reset_connections",
        "all connections between the struck node and the other nodes are reset, new ones too",
        _reset,
        rejected,
        evidence=replace(CUT, causes=CUT.causes | {CauseKind.FAILED}),
    ),
)
