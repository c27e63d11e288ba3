"""Observes a run of real agents: the events that they log, and the steps that one of them reports.

    <node>.log ─► EventLogs ─► first_step_after ─► FirstStep ─┐
    GET /v1/status ─► StepWatch ─► StepPoint ─────────────────┴─► phases_of

All processes are on one machine, so events and benchmark use the same clock.
"""

import datetime
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
from elastic_pt.checkpoint.peer import Peer, PeerAddress
from elastic_pt.errors import StoreError
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.records import Member

_POLL_S: Final = 0.01
_ANSWER_TIMEOUT_S: Final = 1.0
_ANSWER_BYTES_MAX: Final = 1 << 20
_INDIFFERENT: Final = ("training", "waiting for all members to stop")
"""Reasons of decisions without a change."""


@dataclass(frozen=True)
class Event:
    """One structured event of an agent; `time_s` is Unix time."""

    time_s: float
    node: str
    name: str
    content: dict[str, Any]


class EventLogs:
    """The events of all agents of a fleet. Reads only the new parts of their logs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read_bytes: dict[Path, int] = {}
        self.events: list[Event] = []
        """All events so far. Those of one node are in order."""

    def refresh(self) -> list[Event]:
        """Read new lines. Returns all events so far."""
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
    """The event in a line of an agent's log; None for other output."""
    if not line.startswith(b"{"):
        return None
    content = json.loads(line)
    moment = datetime.datetime.fromisoformat(content["timestamp"])
    return Event(moment.timestamp(), node, content["event"], content)


@dataclass(frozen=True)
class FirstStep:
    """A generation with a completed first step: when the log had it, and the report of each node. Unix time."""

    generation: int
    generation_s: float
    reports: dict[str, Event]
    """The `first_step` events, by node."""

    @property
    def last(self) -> Event:
        """The report of the last node. The generation has completed the step only then."""
        return max(self.reports.values(), key=lambda event: event.time_s)


def first_step_of(
    events: Sequence[Event], nodes: Iterable[str], after: int, including: str | None = None
) -> FirstStep | None:
    """The first step of the oldest generation after `after` in which all `nodes` did a step; None if there is none yet.

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
    """Wait for `first_step_of`. Returns None after `limit_s`."""
    wanted = list(nodes)
    deadline_s = time.monotonic() + limit_s
    while (found := first_step_of(logs.refresh(), wanted, after, including)) is None:
        if time.monotonic() > deadline_s:
            return None
        time.sleep(_POLL_S)
    return found


def noticed_s(events: Sequence[Event], nodes: Iterable[str], since_s: float) -> float | None:
    """When the first of `nodes` detected a fault, or a reason to change the members; None if none did."""
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
    """Seconds of each phase between `start_s` and a node's first step. Their sum is the whole time.

    The time after the generation's record that is in no worker's report is the fork. If the moment of detection is
    unknown, all time before the record counts as agreement.
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
    """When a node first reported a step. Unix time."""

    time_s: float
    step: int


class StepWatch:
    """Polls one agent for its step at a fixed interval, in its own thread. A context manager.

    The thread runs inside `within()`, which can move it to another network.
    """

    def __init__(
        self,
        member: Member,
        access: Access,
        within: Callable[[], AbstractContextManager[None]],
        interval_s: float = _POLL_S,
    ) -> None:
        self.points: list[StepPoint] = []
        self.node = member.node
        self._member = member
        self._access = access
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
        """The last reported step; 0 before the first answer."""
        return self.points[-1].step if self.points else 0

    def until_beyond(self, step: int, limit_s: float) -> float | None:
        """Wait for a step after `step`. Returns when it was reported; None after `limit_s` seconds."""
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
        agent = agent_of(self._member, self._access)
        while not self._stop.wait(self._interval_s):
            step = step_of(agent)
            if step is not None and step != self.step:
                self.points.append(StepPoint(time.time(), step))
        agent.close()


def agent_of(member: Member, access: Access) -> Peer:
    """A client of a member's agent, for `step_of`."""
    return Peer(PeerAddress(member.address, member.port), access, _ANSWER_TIMEOUT_S)


def step_of(agent: Peer) -> int | None:
    """The step that an agent reports; None if it does not answer."""
    try:
        answer = agent.get("/v1/status", _ANSWER_BYTES_MAX)
    except StoreError:
        return None
    return None if answer is None else int(json.loads(answer)["step"])


def normal_step_s(points: Sequence[StepPoint], before_s: float) -> float:
    """Median seconds between the steps before a moment; 0 if there are fewer than two."""
    times = [point.time_s for point in points if point.time_s < before_s]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.median(gaps) if gaps else 0.0


def last_step_s(points: Sequence[StepPoint], before_s: float) -> float | None:
    """When the last step before a moment was reported; None if there is none."""
    return max((point.time_s for point in points if point.time_s < before_s), default=None)
