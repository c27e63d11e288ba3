"""Observes a run of real agents: the events they log, and the steps that one of them reports.

    <node>.log ─► EventLogs ─► first_step_after ─► FirstStep ─┐
    GET /v1/status ─► StepWatch ─► StepPoint ─────────────────┴─► phases_of

All processes are on one machine, so the times of events and of the benchmark are of one clock.
"""

import datetime
import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.recovery_report import PHASES
from elastic_pt.runlog.records import Member

_POLL_S: Final = 0.01
_ANSWER_TIMEOUT_S: Final = 1.0
_INDIFFERENT: Final = ("training", "waiting for all members to stop")
"""Reasons of decisions that detect no change."""


@dataclass(frozen=True)
class Event:
    """One structured event of an agent; `time_s` is Unix time."""

    time_s: float
    node: str
    name: str
    content: dict[str, Any]


class EventLogs:
    """The events of all agents of a fleet, read from the end of their logs on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read_bytes: dict[Path, int] = {}
        self.events: list[Event] = []
        """All events so far; those of one node are in order."""

    def refresh(self) -> list[Event]:
        """Read on; returns all events."""
        for path in self._directory.glob("*.log"):
            start = self._read_bytes.get(path, 0)
            if path.stat().st_size <= start:
                continue
            with path.open("rb") as file:
                file.seek(start)
                *lines, _ = file.read().split(b"\n")
            self._read_bytes[path] = start + sum(len(line) + 1 for line in lines)
            self.events += [
                event for line in lines if (event := parse_event(line, path.stem)) is not None
            ]
        return self.events


def parse_event(line: bytes, node: str) -> Event | None:
    """An event from a line of an agent's log; None for other output."""
    if not line.startswith(b"{"):
        return None
    content = json.loads(line)
    moment = datetime.datetime.fromisoformat(content["timestamp"])
    return Event(moment.timestamp(), node, content["event"], content)


@dataclass(frozen=True)
class FirstStep:
    """A generation whose first step is done: when the log had it, and what each node said. Unix time."""

    generation: int
    generation_s: float
    reports: dict[str, Event]
    """The `first_step` events, by node."""

    @property
    def last(self) -> Event:
        """The report of the node that had it last: only then has the generation completed the step."""
        return max(self.reports.values(), key=lambda event: event.time_s)


def first_step_of(
    events: Sequence[Event], nodes: Iterable[str], after: int, including: str | None = None
) -> FirstStep | None:
    """The first step of the oldest generation beyond `after` of which all `nodes` did one; None so far.

    With `including`, only generations with that member count.
    """
    wanted = set(nodes)
    formed = {
        int(event.content["number"]): event.time_s
        for event in events
        if event.name == "generation"
        and event.content["number"] > after
        and (including is None or including in event.content["members"])
    }
    for number in sorted(formed):
        reports = {
            event.node: event
            for event in events
            if event.name == "first_step"
            and event.content["generation"] == number
            and event.node in wanted
        }
        if set(reports) == wanted:
            return FirstStep(number, formed[number], reports)
    return None


def first_step_after(
    logs: EventLogs,
    nodes: Iterable[str],
    after: int,
    *,
    limit_s: float,
    including: str | None = None,
) -> FirstStep | None:
    """Wait for `first_step_of`; None when it has not come within `limit_s`."""
    wanted = list(nodes)
    deadline_s = time.monotonic() + limit_s
    while (found := first_step_of(logs.refresh(), wanted, after, including)) is None:
        if time.monotonic() > deadline_s:
            return None
        time.sleep(_POLL_S)
    return found


def noticed_s(events: Sequence[Event], nodes: Iterable[str], since_s: float) -> float | None:
    """When the first of `nodes` detected a fault, or that the world should change."""
    wanted = set(nodes)
    times = [
        event.time_s
        for event in events
        if event.time_s > since_s
        and event.node in wanted
        and (
            event.name == "worker_failed"
            or (event.name == "decision" and event.content["reason"] not in _INDIFFERENT)
        )
    ]
    return min(times, default=None)


def phases_of(
    start_s: float, notice_s: float | None, generation_s: float, report: Event
) -> dict[str, float]:
    """Seconds of each phase between `start_s` and a node's first step; they add up to all of it.

    The time after the generation's record that its workers did not report is the fork. Without a known moment of
    detection, the time before the record counts as agreeing.
    """
    agreed_s = max(start_s, generation_s)
    detected_s = start_s if notice_s is None else min(max(start_s, notice_s), agreed_s)
    group_s, restore_s, step_s = (
        float(report.content[name]) for name in ("group_s", "restore_s", "step_s")
    )
    seconds = (
        detected_s - start_s,
        agreed_s - detected_s,
        report.time_s - agreed_s - group_s - restore_s - step_s,
        group_s,
        restore_s,
        step_s,
    )
    return dict(zip(PHASES, seconds, strict=True))


@dataclass(frozen=True)
class StepPoint:
    """When a node was first seen at a step. Unix time."""

    time_s: float
    step: int


class StepWatch:
    """Asks one agent for its step at a fixed interval, in a thread of its own; a context manager.

    The thread runs inside `within()`, which can move it to another network.
    """

    def __init__(
        self,
        member: Member,
        token: str,
        within: Callable[[], AbstractContextManager[None]],
        interval_s: float = _POLL_S,
    ) -> None:
        self.points: list[StepPoint] = []
        self.node = member.node
        self._member = member
        self._headers = {"Authorization": f"Bearer {token}"}
        self._within = within
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def step(self) -> int:
        """The step it was last seen at; 0 before the first answer."""
        return self.points[-1].step if self.points else 0

    def until_beyond(self, step: int, limit_s: float) -> float | None:
        """When it was seen beyond a step: waits for that, at most `limit_s` seconds."""
        deadline_s = time.monotonic() + limit_s
        seen = 0
        while True:
            for point in self.points[seen:]:
                seen += 1
                if point.step > step:
                    return point.time_s
            if time.monotonic() > deadline_s:
                return None
            time.sleep(_POLL_S)

    def _run(self) -> None:
        with self._within():
            self._ask()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(
            self._member.address, self._member.port, timeout=_ANSWER_TIMEOUT_S
        )
        while not self._stop.wait(self._interval_s):
            try:
                connection.request("GET", "/v1/status", headers=self._headers)
                step = int(json.loads(connection.getresponse().read())["step"])
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            if step != self.step:
                self.points.append(StepPoint(time.time(), step))
        connection.close()


def normal_step_s(points: Sequence[StepPoint], before_s: float) -> float:
    """Median seconds between steps that were seen before a moment; 0 when fewer than two were."""
    times = [point.time_s for point in points if point.time_s < before_s]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.median(gaps) if gaps else 0.0


def last_step_s(points: Sequence[StepPoint], before_s: float) -> float | None:
    """When the last step before a moment was seen."""
    return max((point.time_s for point in points if point.time_s < before_s), default=None)
