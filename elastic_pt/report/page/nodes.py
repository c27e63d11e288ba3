"""Drawings over time: the committed step, the world size, and a lane per node. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_pt.report.change import Change
from elastic_pt.report.page.curves import DOTS_MAX, POINTS_MAX
from elastic_pt.report.page.drawing import TIME_NAME, Chart, Lane, Line, Mark, Point, Span
from elastic_pt.report.page.facts import Facts
from elastic_pt.report.page.parts import Figure, Table
from elastic_pt.report.page.timeline import Membership
from elastic_pt.report.page.units import duration, plural
from elastic_pt.report.status import State
from elastic_pt.runlog.records import CauseKind

LANES_MAX: Final = 80
_SPANS_MAX: Final = 400
"""Parts into which the time of a lane is divided: memberships that are closer are drawn as one."""
_CHANGES_MAX: Final = 40
_SHAPES: Final = {CauseKind.LOST: "lost", CauseKind.JOINED: "joined", CauseKind.LEFT: "left"}
_MARKS_MAX: Final = 120


@dataclass(frozen=True)
class Clock:
    """Turns the log's time into that of the page, which begins with the first agent or the first record."""

    lead_s: float
    """Seconds from the start of the page's time to the first record."""
    end_s: float
    """End of the page's time."""

    def of(self, time_s: float) -> float:
        """A moment of the log in the page's time."""
        return min(self.end_s, max(0.0, time_s + self.lead_s))


def clock_of(facts: Facts) -> Clock:
    """The page's time: it ends with the run, with the last sign of it, or now if it goes on."""
    timeline, agents = facts.timeline, facts.goodput.agents
    first_s = min((each.started_at_s for each in agents), default=timeline.started_at_s)
    lead_s = max(0.0, timeline.started_at_s - first_s) if timeline.records else 0.0
    end_s = timeline.now_s
    if facts.status.state in (State.RUNNING, State.PAUSED):
        end_s = max(end_s, facts.now_at_s - timeline.started_at_s)
    elif facts.status.state is State.DOWN:
        end_s = max([end_s, *(each.ended_at_s - timeline.started_at_s for each in agents)])
    return Clock(lead_s, lead_s + max(end_s, 1e-3))


def progress_figure(facts: Facts, clock: Clock) -> Figure | None:
    """The committed step over time: it is flat while nothing new was safe."""
    commits = facts.timeline.commits
    if not commits:
        return None
    chosen = commits[:: max(1, -(-len(commits) // POINTS_MAX))]
    chosen = chosen if chosen[-1] is commits[-1] else [*chosen, commits[-1]]
    first = clock.of(0.0)
    points = [
        Point(first, 0.0),
        *(Point(clock.of(each.time_s), float(each.checkpoint.step)) for each in chosen),
    ]
    permanent = [each for each in commits if each.checkpoint.permanent]
    quarantined = [
        each for each in commits if each.checkpoint.directory in facts.timeline.quarantined
    ]
    dots = [
        ("permanent", each, f"step {each.checkpoint.step:,}, permanent")
        for each in permanent[-DOTS_MAX:]
    ]
    dots += [
        (
            "quarantined",
            each,
            f"step {each.checkpoint.step:,}: {facts.redactor.text(facts.timeline.quarantined[each.checkpoint.directory])}",
        )
        for each in quarantined[-DOTS_MAX:]
    ]
    legend = [("curve", "newest committed step")]
    legend += [("permanent", "permanent")] if permanent else []
    legend += [("quarantined", "quarantined")] if quarantined else []
    return Figure(
        Chart(
            label=f"Committed step over time: step {commits[-1].checkpoint.step} after {duration(clock.end_s)}",
            x_name=TIME_NAME,
            y_name="committed step",
            x_range=(0.0, clock.end_s),
            y_range=(0.0, max(1.0, max(each.checkpoint.step for each in commits) * 1.05)),
            x_is_time=True,
            lines=[Line("curve", [*points, Point(clock.end_s, points[-1].y)], stepped=True)],
            dots=[Mark(style, clock.of(each.time_s), title) for style, each, title in dots],
            dot_values=[float(each.checkpoint.step) for _, each, _ in dots],
            height_share=0.8,
        ),
        legend=tuple(legend),
    )


def member_figures(facts: Facts, clock: Clock) -> list[Figure]:
    """The world size over time, and below it a lane per node."""
    sizes = facts.timeline.world_sizes
    if not sizes:
        return []
    end = Point(clock.end_s, float(sizes[-1][1]))
    points = [
        Point(0.0, 0.0),
        *(Point(clock.of(at_s), float(size)) for at_s, size in _last_per_place(sizes, clock)),
        end,
    ]
    rows = tuple((duration(clock.of(at_s)), str(size)) for at_s, size in sizes[-_CHANGES_MAX:])
    lanes, left_out = _lanes(facts, clock)
    notes = []
    if left_out:
        notes.append(
            f"{plural(left_out, 'node')} with less time as a member {'has' if left_out == 1 else 'have'} no lane here."
        )
    title = "Changes of the world size" + (
        f", the newest {_CHANGES_MAX}" if len(sizes) > _CHANGES_MAX else ""
    )
    marks = {mark.style for lane in lanes for mark in lane.marks}
    legend = [("member", "member of the generation")]
    if any(span.style == "up" for lane in lanes for span in lane.spans):
        legend.append(("up", "agent runs, no member"))
    legend += [
        (f"{style} shape", name)
        for style, name in (
            ("lost", "lost"),
            ("failed", "failed"),
            ("joined", "joined"),
            ("left", "left"),
        )
        if style in marks
    ]
    return [
        Figure(
            Chart(
                label=f"World size over time: {plural(sizes[-1][1], 'worker')} at the end",
                x_name="",
                y_counts=True,
                y_name="workers",
                x_range=(0.0, clock.end_s),
                y_range=(0.0, max(size for _, size in sizes) * 1.15 + 0.5),
                x_is_time=True,
                lines=[Line("curve", points, stepped=True)],
                height_share=0.6,
                above_lanes=True,
            ),
        ),
        Figure(
            lanes=tuple(lanes),
            duration_s=clock.end_s,
            legend=tuple(legend),
            notes=tuple(notes),
            table=Table(title, ("time", "workers"), rows),
        ),
    ]


def _last_per_place(sizes: Sequence[tuple[float, int]], clock: Clock) -> list[tuple[float, int]]:
    """At most one lowest and one newest world size for each place that a screen can show."""
    places: dict[int, list[tuple[float, int]]] = {}
    for at_s, size in sizes:
        places.setdefault(int(clock.of(at_s) / clock.end_s * POINTS_MAX), []).append((at_s, size))
    return [
        each
        for found in places.values()
        for each in dict.fromkeys(
            (min(found, key=lambda one: one[1]), found[-1]) if len(found) > 2 else found
        )
    ]


def _lanes(facts: Facts, clock: Clock) -> tuple[list[Lane], int]:
    by_node: dict[str, list[Membership]] = {}
    for each in facts.timeline.memberships_until(clock.end_s - clock.lead_s):
        by_node.setdefault(each.node, []).append(each)
    for agent in facts.goodput.agents:
        by_node.setdefault(agent.node, [])
    member_s = {
        node: sum(each.end_s - each.start_s for each in found) for node, found in by_node.items()
    }
    shown = sorted(by_node, key=lambda node: -member_s[node])[:LANES_MAX]
    shown.sort(
        key=lambda node: (min((each.start_s for each in by_node[node]), default=math.inf), node)
    )
    places = max(24, min(_MARKS_MAX, 2000 // len(shown)))
    marks = _lane_marks(facts, clock, by_node, places)
    up: dict[str, list[Span]] = {}
    for agent in facts.goodput.agents:
        start, end = (
            clock.of(at_s - facts.timeline.started_at_s)
            for at_s in (agent.started_at_s, agent.ended_at_s)
        )
        up.setdefault(agent.node, []).append(
            Span("up", start, end, f"{agent.node}: its agent ran for {duration(end - start)}")
        )
    lanes = [
        Lane(
            node,
            [
                *_merged(up.get(node, []), clock),
                *_merged(_member_spans(by_node[node], facts, clock), clock),
            ],
            marks.get(node, []),
        )
        for node in shown
    ]
    return lanes, len(by_node) - len(shown)


def _member_spans(found: Iterable[Membership], facts: Facts, clock: Clock) -> list[Span]:
    spans = []
    for each in found:
        start, end = clock.of(each.start_s), clock.of(each.end_s)
        which = (
            f"generation {each.first_generation}"
            if each.first_generation == each.last_generation
            else f"generations {each.first_generation} to {each.last_generation}"
        )
        why = f"; {facts.redactor.text(each.detail)}" if each.detail else ""
        spans.append(
            Span("member", start, end, f"{each.node}: {which}, for {duration(end - start)}{why}")
        )
    return spans


def _merged(spans: Sequence[Span], clock: Clock) -> list[Span]:
    """Spans with no visible gap between them as one, if there are more than a lane can show."""
    if len(spans) <= _SPANS_MAX // 10:
        return list(spans)
    gap_s = clock.end_s / _SPANS_MAX
    merged: list[tuple[Span, int]] = []
    for span in sorted(spans, key=lambda each: each.start):
        if merged and span.start - merged[-1][0].end <= gap_s:
            before, count = merged[-1]
            merged[-1] = (
                Span(span.style, before.start, max(before.end, span.end), before.title),
                count + 1,
            )
        else:
            merged.append((span, 1))
    return [
        each
        if count == 1
        else Span(
            each.style,
            each.start,
            each.end,
            f"{plural(count, 'period')} close to each other; the first: {each.title}",
        )
        for each, count in merged
    ]


def _lane_marks(
    facts: Facts, clock: Clock, by_node: Mapping[str, Sequence[Membership]], places: int
) -> dict[str, list[Mark]]:
    """What happened to each node, where it can be told apart; failures go first."""
    marks: dict[str, dict[int, Mark]] = {}

    def add(node: str, mark: Mark) -> None:
        place = int(mark.x / clock.end_s * places)
        there = marks.setdefault(node, {})
        if place not in there or there[place].style in ("joined", "left"):
            there[place] = mark

    for node, found in by_node.items():
        for each in found:
            if each.unseen:
                at = clock.of(each.end_s)
                title = f"{node} lost after {duration(at)}, generation {each.last_generation}"
                add(node, Mark("lost", at, f"{title}: {each.detail}"))
    for change in facts.changes:
        if not isinstance(change, Change):
            continue
        at_s = facts.timeline.generation_times_s.get(change.generation, 0.0)
        for cause in change.causes:
            lost = cause.kind is CauseKind.LOST
            at = clock.of(at_s - change.agree_s - cause.detect_s if lost else at_s)
            style = _SHAPES.get(cause.kind, "failed")
            detail = f": {facts.redactor.text(cause.detail)}" if cause.detail else ""
            title = (
                f"{cause.node} {cause.kind} after {duration(at)}, generation {change.generation}"
            )
            add(cause.node, Mark(style, at, title + detail))
    return {node: list(there.values()) for node, there in marks.items()}
