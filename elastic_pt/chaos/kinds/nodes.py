"""Faults of whole nodes: machines that are lost, freeze, leave with or without a notice, join, or do not belong to the run."""

import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import LEFT, LOST, SILENT, Action, Evidence, Kind, Strike, each
from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena

_GONE: Final = frozenset({CauseKind.LEFT, CauseKind.LOST})
"""A node that has to leave is lost instead if there is no time for it."""
_NOTICED: Final = Evidence(
    causes=_GONE,
    events=frozenset({"notice"}),
    metrics=frozenset({"elastic_pt_notices_total"}),
)
_REFUSED: Final = Evidence(events=frozenset({"agent_failed"}))
_LONG_NOTICE_S: Final = 120.0
_OTHER_CONFIG: Final = "train.warmup_steps=5"


def _signal_agent(number: signal.Signals) -> Action:
    return each(lambda arena, node: arena.signal_agent(node, number))


def _signal_node(number: signal.Signals) -> Action:
    return each(lambda arena, node: arena.signal_node(node, number))


def _notify(arena: "Arena", strike: Strike) -> None:
    for node in strike.nodes:
        arena.notify(node, strike.parameters["lead_s"])


def _start(*settings: str, other_code: bool = False) -> Action:
    return each(lambda arena, node: arena.start(node, *settings, other_code=other_code))


OF_NODES: Final = (
    Kind(
        "kill_node",
        "SIGKILL to all processes of a node: a machine is lost",
        strike=each(lambda arena, node: arena.kill(node)),
        ends_node=True,
        evidence=LOST,
    ),
    Kind(
        "node_freezes",
        "SIGSTOP to all processes of a node, then SIGCONT: a machine is paused and goes on",
        strike=_signal_node(signal.SIGSTOP),
        heal=_signal_node(signal.SIGCONT),
        evidence=SILENT,
    ),
    Kind(
        "node_leaves",
        "SIGTERM to the agent",
        strike=_signal_agent(signal.SIGTERM),
        ends_node=True,
        evidence=LEFT,
    ),
    Kind(
        "second_sigterm",
        "another SIGTERM to an agent that is leaving: it ends at once",
        strike=_signal_agent(signal.SIGTERM),
        ends_node=True,
        evidence=Evidence(causes=_GONE),
    ),
    Kind(
        "notice",
        "a notice of preemption, `lead_s` seconds ahead",
        strike=_notify,
        ends_node=True,
        parameters={"lead_s": 30.0},
        evidence=_NOTICED,
    ),
    Kind(
        "notice_withdrawn",
        "a notice two minutes ahead that is withdrawn",
        strike=each(lambda arena, node: arena.notify(node, _LONG_NOTICE_S)),
        heal=each(lambda arena, node: arena.withdraw(node)),
        evidence=replace(_NOTICED, causes=frozenset(), may=_GONE),
    ),
    Kind(
        "join",
        "`count` more nodes start",
        strike=_start(),
        parameters={"count": 1},
        starts_nodes=True,
        evidence=Evidence(causes=frozenset({CauseKind.JOINED})),
    ),
    Kind(
        "new_fleet",
        "`count` new nodes start, after all others are gone",
        strike=_start(),
        parameters={"count": 2},
        starts_nodes=True,
        evidence=Evidence(
            events=frozenset({"agent_started"}),
            metrics=frozenset({'elastic_pt_changes_total{cause="all_lost"}'}),
        ),
    ),
    Kind(
        "same_name",
        "another agent starts under the name of a node that still runs",
        strike=each(lambda arena, node: arena.start_twin(node)),
        # It is not refused: it waits, and is admitted if the run has room for one more.
        evidence=Evidence(events=frozenset({"agent_started"}), names_node=False),
    ),
    Kind(
        "other_config",
        "`count` more nodes start, whose configuration would change the weights",
        strike=_start(_OTHER_CONFIG),
        parameters={"count": 1},
        starts_nodes=True,
        ends_node=True,
        evidence=_REFUSED,
    ),
    Kind(
        "other_code",
        "`count` more nodes start, whose source code is not that of the others",
        strike=_start(other_code=True),
        parameters={"count": 1},
        starts_nodes=True,
        ends_node=True,
        evidence=_REFUSED,
    ),
)
