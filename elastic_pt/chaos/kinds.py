"""The kinds of faults: what each does to a run, what it needs, and how the run must tell of it.

    strike(arena, strike)   the fault, in the thread of the run, while the process that reached the moment stands still
    deed                    or: what that process itself does (`failpoints`), exactly there
    heal(arena, strike)     undoes it, for faults that last (`for_s`)

`KINDS` is the catalogue. docs/chaos.md is generated from it.
"""

import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena
    from elastic_pt.fleet.network import Network


class Need(StrEnum):
    """What a fault needs of the machine."""

    NETWORK = "network"
    """Each node on a network of its own, which takes root on Linux."""
    BUCKET = "bucket"
    """An S3 server behind a proxy."""
    ROOT = "root"
    """Mounts or control groups."""


@dataclass(frozen=True)
class Strike:
    """One fault as it strikes."""

    number: int
    """Of the fault in its scenario, from 1."""
    nodes: tuple[str, ...]
    """Whom it strikes."""
    pid: int
    """The process that stands at the moment; 0 if a time told it."""
    parameters: Mapping[str, float]
    choices: random.Random


@dataclass(frozen=True)
class Evidence:
    """How a run tells of a fault. Any one of these is enough; none: nothing has to tell."""

    causes: frozenset[CauseKind] = frozenset()
    """A GENERATION has such a cause, which names a struck node."""
    events: frozenset[str] = frozenset()
    """An agent has written such an event."""


Action = Callable[["Arena", Strike], None]


@dataclass(frozen=True)
class Kind:
    """A kind of faults."""

    name: str
    meaning: str
    strike: Action | None = None
    deed: str = ""
    """What the process at the moment does itself, as in `ELASTIC_PT_FAILPOINTS`; `{name}` is a parameter."""
    heal: Action | None = None
    needs: frozenset[Need] = frozenset()
    evidence: Evidence = Evidence()
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Names and defaults."""
    ends_node: bool = False
    """Whether the agents of the struck nodes end through it."""


_LOST: Final = Evidence(causes=frozenset({CauseKind.LOST}))
_FAILED: Final = Evidence(causes=frozenset({CauseKind.FAILED}))
_LEFT: Final = Evidence(causes=frozenset({CauseKind.LEFT}))


def _each(act: Callable[["Arena", str], None]) -> Action:
    """The same for each struck node."""

    def strike(arena: "Arena", strike: Strike) -> None:
        for node in strike.nodes:
            act(arena, node)

    return strike


def _worker_of(arena: "Arena", strike: Strike, node: str) -> int:
    """The worker that stands at the moment, if it is one of the node's, else one by choice; 0: there is none."""
    workers = arena.workers(node)
    if strike.pid in workers:
        return strike.pid
    return strike.choices.choice(workers) if workers else 0


def _signal_worker(number: signal.Signals) -> Action:
    def act(arena: "Arena", strike: Strike) -> None:
        for node in strike.nodes:
            arena.send(_worker_of(arena, strike, node), number)

    return act


def _signal_agent(number: signal.Signals) -> Action:
    return _each(lambda arena, node: arena.signal_agent(node, number))


def _signal_node(number: signal.Signals) -> Action:
    return _each(lambda arena, node: arena.signal_node(node, number))


def _notify(arena: "Arena", strike: Strike) -> None:
    for node in strike.nodes:
        arena.notify(node, strike.parameters["lead_s"])


def _join(arena: "Arena", strike: Strike) -> None:
    for _ in range(int(strike.parameters["count"])):
        arena.start_another()


_OF_PROCESSES: Final = (
    Kind(
        "kill_worker",
        "SIGKILL to one worker",
        strike=_signal_worker(signal.SIGKILL),
        evidence=_FAILED,
    ),
    Kind("worker_raises", "a Python error in a worker", deed="raise", evidence=_FAILED),
    Kind(
        "worker_exits",
        "a worker ends with an exit code",
        deed="exit={code}",
        parameters={"code": 3},
        evidence=_FAILED,
    ),
    Kind("worker_segfaults", "SIGSEGV in a worker", deed="signal=SIGSEGV", evidence=_FAILED),
    Kind("worker_aborts", "SIGABRT in a worker", deed="signal=SIGABRT", evidence=_FAILED),
    Kind(
        "worker_stops",
        "SIGSTOP to one worker, for ever",
        strike=_signal_worker(signal.SIGSTOP),
        evidence=_FAILED,
    ),
    Kind(
        "worker_holds_lock",
        "a worker keeps the interpreter's lock for ever",
        deed="hold=3600",
        evidence=_FAILED,
    ),
    Kind(
        "worker_full_disk",
        "a step of a worker or agent fails with ENOSPC",
        deed="os_error=ENOSPC",
    ),
    Kind("worker_bad_disk", "a step of a worker or agent fails with EIO", deed="os_error=EIO"),
    Kind(
        "kill_agent",
        "SIGKILL to the agent alone",
        strike=_signal_agent(signal.SIGKILL),
        ends_node=True,
        evidence=_LOST,
    ),
    Kind(
        "agent_stops",
        "SIGSTOP to the agent alone, then SIGCONT",
        strike=_signal_agent(signal.SIGSTOP),
        heal=_signal_agent(signal.SIGCONT),
        evidence=_LOST,
    ),
    Kind(
        "kill_node",
        "SIGKILL to all processes of a node: a machine is lost",
        strike=_each(lambda arena, node: arena.kill(node)),
        ends_node=True,
        evidence=_LOST,
    ),
    Kind(
        "node_freezes",
        "SIGSTOP to all processes of a node, then SIGCONT: a machine is paused and goes on",
        strike=_signal_node(signal.SIGSTOP),
        heal=_signal_node(signal.SIGCONT),
        evidence=_LOST,
    ),
    Kind(
        "node_leaves",
        "SIGTERM to the agent",
        strike=_signal_agent(signal.SIGTERM),
        ends_node=True,
        evidence=_LEFT,
    ),
    Kind(
        "notice",
        "a notice of preemption, `lead_s` seconds ahead",
        strike=_notify,
        ends_node=True,
        parameters={"lead_s": 30.0},
        evidence=Evidence(events=frozenset({"notice"})),
    ),
    Kind(
        "notice_withdrawn",
        "a notice two minutes ahead that is withdrawn",
        strike=_each(lambda arena, node: arena.notify(node, 120.0)),
        heal=_each(lambda arena, node: arena.withdraw(node)),
        evidence=Evidence(events=frozenset({"notice"})),
    ),
    Kind(
        "join",
        "`count` more nodes start",
        strike=_join,
        parameters={"count": 1},
        evidence=Evidence(causes=frozenset({CauseKind.JOINED})),
    ),
)


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


_OF_NETWORK: Final = (
    Kind(
        "link_down",
        "a node's link is down: no packet passes, and no connection is reset",
        strike=_network(_link_down),
        heal=_network(_heal),
        needs=frozenset({Need.NETWORK}),
        evidence=_LOST,
    ),
    Kind(
        "partition",
        "the struck nodes and all others cannot reach each other; all reach the bucket",
        strike=_network(_partition),
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

KINDS: Final = {each.name: each for each in (*_OF_PROCESSES, *_OF_NETWORK)}
"""All kinds, by name."""
