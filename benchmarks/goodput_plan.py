"""What happens in a run of `goodput.py`, and what a perfect system would do meanwhile. All functions are pure.

    seed ─► faults ──────────────────────────► Schedule ─► goodput_ours, goodput_peer
    spot trace ─► thinned ─► busiest stretch ──┘
    living nodes over time, rates by world size ─► oracle_steps

A trace is thinned by one rule. It is read as moments at which nodes were taken or given. A change is kept if it is at
least `GAP_S` after the last kept one. A kept change stands for one node, however many nodes the market took or gave at
that moment. A removal is dropped if only `FEWEST` nodes are left, an addition if there are `nodes_max` nodes. Of removal
and addition at the same moment, the removal is kept. Times between kept changes are those of the trace.
"""

import datetime
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

GAP_S: Final = 20.0
"""Least seconds between two changes of a trace."""
FEWEST: Final = 2
"""A trace never takes the last nodes: a run without nodes has no capacity to compare with."""
FLOOR_S: Final = 10.0
"""Least seconds between two faults, so that a newcomer for the pool can be warm before the next fault."""
_LEAD_S: Final = 10.0
"""Seconds of a stretch before its first change, and after its last one."""


@dataclass(frozen=True)
class Event:
    """One change of the living nodes."""

    at_s: float
    """Since the start of the measurement."""
    lost: bool
    """A node is killed; otherwise one joins."""
    draw: float = 0.0
    """From 0 to 1: which of the training nodes is killed, in order of their names."""


@dataclass(frozen=True)
class Schedule:
    """The changes of one run."""

    name: str
    seconds: float
    nodes: int
    """Nodes that train at the start."""
    nodes_max: int
    events: tuple[Event, ...]
    replaced: bool
    """Whether a warm node takes the place of each lost one at once."""


def faults(name: str, *, mean_s: float, seconds: float, nodes: int, seed: int) -> Schedule:
    """Kills with exponential gaps of this mean, none shorter than `FLOOR_S`; each lost node is replaced."""
    randomness = random.Random(f"{seed} {name}")
    events = []
    at_s = FLOOR_S
    while (at_s := at_s + randomness.expovariate(1 / (mean_s - FLOOR_S))) < seconds - FLOOR_S:
        events.append(Event(at_s, lost=True, draw=randomness.random()))
        at_s += FLOOR_S
    return Schedule(name, seconds, nodes, nodes, tuple(events), replaced=True)


def read_aws(text: str) -> list[tuple[float, bool]]:
    """The changes in `milliseconds,add|remove,node`: second, and whether a node was taken. In order of time."""
    rows = [line.split(",") for line in text.splitlines() if line]
    return sorted((int(when) / 1000, kind == "remove") for when, kind, _ in rows)


def read_gcp(text: str) -> list[tuple[float, bool]]:
    """The changes in `date, time, instances held`: second since the first sample, and whether nodes were taken."""
    samples = [
        (datetime.datetime.fromisoformat(f"{day} {clock}"), int(held))
        for day, clock, held in (line.split(", ") for line in text.splitlines() if line)
    ]
    return [
        ((when - samples[0][0]).total_seconds(), held < before)
        for (_, before), (when, held) in itertools.pairwise(samples)
        if held != before
    ]


def thinned(
    changes: Iterable[tuple[float, bool]], *, nodes: int, nodes_max: int
) -> list[tuple[float, bool]]:
    """The changes that the rule of the module keeps, for a run that starts with `nodes` nodes."""
    kept: list[tuple[float, bool]] = []
    for when_s, lost in sorted(changes, key=lambda change: (change[0], not change[1])):
        if kept and when_s - kept[-1][0] < GAP_S:
            continue
        if nodes > FEWEST if lost else nodes < nodes_max:
            nodes += -1 if lost else 1
            kept.append((when_s, lost))
    return kept


def stretch_of(
    name: str,
    changes: Sequence[tuple[float, bool]],
    *,
    seconds: float,
    nodes: int,
    nodes_max: int,
    seed: int,
) -> Schedule:
    """The stretch of a trace with the most changes after thinning, the earliest of equals.

    It begins `_LEAD_S` before its first change, and its last change is at least `_LEAD_S` before its end.
    """
    best: list[tuple[float, bool]] = []
    for first_s in sorted({when_s for when_s, _ in changes}):
        end_s = first_s + seconds - 2 * _LEAD_S
        inside = [change for change in changes if first_s <= change[0] <= end_s]
        kept = thinned(inside, nodes=nodes, nodes_max=nodes_max)
        if len(kept) > len(best):
            best = kept
    randomness = random.Random(f"{seed} {name}")
    begin_s = best[0][0] - _LEAD_S if best else 0.0
    events = tuple(Event(when_s - begin_s, lost, randomness.random()) for when_s, lost in best)
    return Schedule(name, seconds, nodes, nodes_max, events, replaced=False)


def sizes_of(schedules: Iterable[Schedule]) -> set[int]:
    """The numbers of living nodes that may occur: one rate is measured for each."""
    sizes: set[int] = set()
    for schedule in schedules:
        if schedule.replaced:
            # A fault may come before the pool has another warm node.
            sizes |= {schedule.nodes - 1, schedule.nodes}
        else:
            changes = (-1 if event.lost else 1 for event in schedule.events)
            sizes |= set(itertools.accumulate(changes, initial=schedule.nodes))
    return sizes


def oracle_steps(
    living: Sequence[tuple[float, int]],
    rates: Mapping[int, float],
    *,
    nodes_max: int,
    begin_s: float,
    end_s: float,
) -> float:
    """The steps that the living nodes would do with no disturbance, if every change cost nothing.

    `living` has moments and by how much the number of living nodes changes then; those before `begin_s` count too.
    `rates` has the undisturbed steps per second for each number of nodes, at most `nodes_max` of which train.
    """
    steps, nodes, since_s = 0.0, 0, begin_s
    for when_s, change in sorted(living):
        until_s = min(max(when_s, begin_s), end_s)
        steps += _rate(rates, min(nodes, nodes_max)) * (until_s - since_s)
        nodes, since_s = nodes + change, until_s
    return steps + _rate(rates, min(nodes, nodes_max)) * (end_s - since_s)


def _rate(rates: Mapping[int, float], nodes: int) -> float:
    # Of a size that was not measured, because nobody expected it: between its neighbours in proportion.
    if nodes == 0:
        return 0.0
    if nodes in rates:
        return rates[nodes]
    nearest = min(rates, key=lambda each: abs(each - nodes))
    return rates[nearest] * nodes / nearest
