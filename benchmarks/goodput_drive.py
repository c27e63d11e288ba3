"""Takes a system through a schedule in real time, and measures its undisturbed rates. The same for ours and torchrun's.

    calibrate   one node after the other joins ─► steps per second of each world size
    drive       fill ─► undisturbed ─► Schedule, in real time ─► undisturbed ─► Course

The machine may be faster or slower than during the calibration. So the rate before the schedule and the one after it are
measured too, and the calibrated rates count times their mean ratio to the calibrated one.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from benchmarks.goodput_plan import Schedule, oracle_steps
from benchmarks.recovery_watch import StepPoint
from elastic_pt.errors import ElasticPtError

STEPS_BEFORE: Final = 8
"""Steps that a world has done before it is measured."""
_POLL_S: Final = 0.05
_WARM_S: Final = 30.0
"""Seconds before its time at which a node of a trace is started."""
_START_S: Final = 180.0
"""Seconds for the nodes of a run to import and to do their first steps."""
_NEXT_STEP_S: Final = 60.0


class System(Protocol):
    """What trains: our agents, or torchrun's."""

    living: list[tuple[float, int]]
    """When the number of living nodes changed (Unix time), and by how much."""

    def newest(self) -> StepPoint:
        """The newest step that it has ever done, and when."""

    def until_training(self, nodes: int, steps: int, limit_s: float) -> None:
        """Wait until this many nodes have done some more steps together. Raises `ElasticPtError` after `limit_s`."""

    def warm(self, *, joins: bool = False) -> None:
        """Start a node for the pool; with `joins` one that joins when it has imported."""

    def join(self) -> None:
        """Let the oldest node of the pool join."""

    def lose(self, draw: float) -> None:
        """Kill one of the nodes that train; `draw` from 0 to 1 chooses it."""

    def tick(self) -> None:
        """Note what has happened meanwhile."""


@dataclass
class Course:
    """How a system went through a schedule. Unix time."""

    begin: StepPoint
    end: StepPoint
    speeds: list[float] = field(default_factory=list)
    """Undisturbed rate before the schedule and after it, each divided by the calibrated one."""

    @property
    def steps(self) -> int:
        """Steps from begin to end, each once."""
        return self.end.step - self.begin.step

    def oracle_steps(self, system: System, schedule: Schedule, rates: Mapping[int, float]) -> float:
        """The steps of the capacity oracle."""
        speed = statistics.fmean(self.speeds) if self.speeds else 1.0
        return oracle_steps(
            system.living,
            {nodes: rate * speed for nodes, rate in rates.items()},
            nodes_max=schedule.nodes_max,
            begin_s=self.begin.time_s,
            end_s=self.end.time_s,
        )


def calibrate(
    system: System, sizes: Collection[int], seconds: float, tell: Callable[[str], None]
) -> dict[int, float]:
    """Undisturbed steps per second of each world size; nodes join in between. A size that fails is left out."""
    rates = {}
    for nodes in range(1, max(sizes) + 1):
        system.warm(joins=True)
        if nodes not in sizes:
            continue
        try:
            rates[nodes] = undisturbed_rate(system, nodes, seconds)
            tell(f"{nodes} nodes: {rates[nodes]:.3f} steps/s undisturbed")
        except ElasticPtError as error:
            tell(f"{nodes} nodes: {error}")
    return rates


def undisturbed_rate(
    system: System, nodes: int, seconds: float, limit_s: float = _START_S
) -> float:
    """Steps per second of this many nodes, from the end of a step to that of another.

    Raises `ElasticPtError` if they do not train within `limit_s`.
    """
    system.until_training(nodes, STEPS_BEFORE, limit_s)
    first = system.newest()
    time.sleep(seconds)
    last = system.newest()
    if last.step == first.step:
        raise ElasticPtError(f"no step within {seconds:g} s; expected some")
    return (last.step - first.step) / (last.time_s - first.time_s)


def drive(
    system: System,
    schedule: Schedule,
    rates: Mapping[int, float],
    seconds: float,
    read: Callable[[], None],
) -> Course:
    """Start the nodes of a schedule and carry it out. Calls `read` at its begin and its end. Raises `ElasticPtError`."""
    for _ in range(schedule.nodes):
        system.warm(joins=True)
    system.until_training(schedule.nodes, STEPS_BEFORE, _START_S)
    system.living.append((time.time(), schedule.nodes))
    if schedule.replaced:
        system.warm()
        _await_pool(system, schedule.nodes)
    before = undisturbed_rate(system, schedule.nodes, seconds)
    read()
    begin = _next_step(system)
    _follow(system, schedule, begin.time_s)
    end = _next_step(system)
    read()
    course = Course(begin, end)
    _compare(course, before, rates.get(schedule.nodes))
    left = schedule.nodes
    if not schedule.replaced:
        left += sum(-1 if event.lost else 1 for event in schedule.events)
    # torchrun may need minutes to recover, or never do.
    with suppress(ElasticPtError):
        after = undisturbed_rate(system, left, seconds, _NEXT_STEP_S)
        _compare(course, after, rates.get(left))
    return course


def _await_pool(system: System, nodes: int) -> None:
    """Give the first node of the pool time to import. It is known to be warm only if it counts as living."""
    deadline_s = time.monotonic() + _WARM_S
    while time.monotonic() < deadline_s and sum(each for _, each in system.living) <= nodes:
        system.tick()
        time.sleep(_POLL_S)


def _compare(course: Course, rate: float, calibrated: float | None) -> None:
    if calibrated is not None:
        course.speeds.append(rate / calibrated)


def _follow(system: System, schedule: Schedule, begin_s: float) -> None:
    events = list(schedule.events)
    joins = [event.at_s for event in events if not event.lost]
    while time.time() < begin_s + schedule.seconds:
        now_s = time.time() - begin_s
        while joins and now_s >= joins[0] - _WARM_S:
            joins.pop(0)
            system.warm()
        if events and now_s >= events[0].at_s:
            event = events.pop(0)
            if event.lost:
                system.lose(event.draw)
            else:
                system.join()
            if schedule.replaced:
                system.join()
                system.warm()
        system.tick()
        time.sleep(_POLL_S)


def _next_step(system: System) -> StepPoint:
    """The next new step, so that a measurement begins and ends with the end of a step; or now, if none comes."""
    before = system.newest()
    deadline_s = time.monotonic() + _NEXT_STEP_S
    while (newest := system.newest()).step == before.step:
        if time.monotonic() > deadline_s:
            return StepPoint(time.time(), before.step)
        time.sleep(_POLL_S)
    return newest
