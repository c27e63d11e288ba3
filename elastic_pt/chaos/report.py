"""The report of a chaos run: one HTML page that needs no network, and an index of several. Pure but for the files.

    Result ─► page ─► report.html (template) ─► file
              lanes: one row per node, a bar for each generation that it was in, marks for what struck it

The style and the drawings are those of the report of a run (`elastic_pt.report.page`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from markupsafe import Markup

from elastic_pt.chaos.play import Happening, Played
from elastic_pt.chaos.result import Result, Verdict
from elastic_pt.chaos.scenario import Scenario, as_toml
from elastic_pt.report.goodput import Goodput
from elastic_pt.report.page.drawing import Lane, Mark, Span, draw_lanes
from elastic_pt.report.page.parts import Bar, BarRow, Tile
from elastic_pt.report.page.render import NARROW, WIDE, fill
from elastic_pt.report.page.units import duration, node_time, plural, share
from elastic_pt.telemetry.goodput import Bucket

REPORT: Final = "report.html"
INDEX: Final = "index.html"
_STYLE: Final = "report.css"
_EVERYWHERE: Final = "the run"
"""The lane of what concerns no single node."""
_LEGEND: Final = (
    ("member", "member of an odd generation"),
    ("later", "of an even one"),
    ("lasting", "a fault lasts"),
    ("struck shape", "a fault strikes"),
    ("joined shape", "a new machine starts"),
    ("left shape", "its agent has ended"),
)


@dataclass(frozen=True)
class Page:
    """What the template of one run shows."""

    name: str
    verdict: str
    hypothesis: str
    tiles: tuple[Tile, ...]
    verdicts: tuple[Verdict, ...]
    wide: Markup
    narrow: Markup
    legend: tuple[tuple[str, str], ...]
    faults: tuple[tuple[str, ...], ...]
    buckets: tuple[BarRow, ...]
    happenings: tuple[tuple[str, ...], ...]
    replay: str
    toml: str


def write_report(result: Result, path: Path) -> None:
    """Write the page of one run."""
    path.write_text(_filled(REPORT, page=page_of(result)), encoding="utf-8")


def write_index(
    results: Sequence[tuple[Result, str]], omitted: Iterable[tuple[Scenario, str]], path: Path
) -> None:
    """Write the page that leads to those of several runs. Each has the link to its own; `omitted` has the reasons."""
    rows = [
        {
            "name": each.played.scenario.with_seed(each.played.seed),
            "link": link,
            "passed": each.passed,
            "cells": _index_cells(each),
        }
        for each, link in results
    ]
    failed = [each.replay for each, _ in results if not each.passed]
    left_out = [(each.name, why) for each, why in omitted]
    headline = f"{plural(len(rows), 'run')}, {len(failed)} failed, {len(left_out)} left out"
    page = _filled(INDEX, headline=headline, rows=rows, failed=failed, omitted=left_out)
    path.write_text(page, encoding="utf-8")


def _filled(template: str, **values: object) -> str:
    folder = files(__package__)
    own_style = Markup(folder.joinpath(_STYLE).read_text(encoding="utf-8"))
    source = folder.joinpath(template).read_text(encoding="utf-8")
    return fill(source, own_style=own_style, **values)


def page_of(result: Result) -> Page:
    """What the page of a run shows."""
    played = result.played
    lanes = lanes_of(played)
    label = f"Members and faults over time, one lane for each of {len(lanes)} nodes"
    styles = {span.style for lane in lanes for span in lane.spans}
    styles |= {mark.style for lane in lanes for mark in lane.marks}
    return Page(
        name=played.scenario.with_seed(played.seed),
        verdict="passed" if result.passed else "failed",
        hypothesis=played.scenario.hypothesis,
        tiles=_tiles(result),
        verdicts=tuple(sorted(result.verdicts, key=lambda each: each.passed)),
        wide=Markup(draw_lanes(lanes, label, max(played.seconds, 1e-3), WIDE.width)),
        narrow=Markup(draw_lanes(lanes, label, max(played.seconds, 1e-3), NARROW.width)),
        legend=tuple(each for each in _LEGEND if each[0].removesuffix(" shape") in styles),
        faults=_faults(result),
        buckets=() if result.goodput is None else _buckets(result.goodput),
        happenings=tuple(
            (f"{each.at_s:.1f} s", each.what, each.node, each.text) for each in played.happenings
        ),
        replay=result.replay,
        toml=as_toml(played.scenario),
    )


def _tiles(result: Result) -> tuple[Tile, ...]:
    played, scenario = result.played, result.played.scenario
    failed = sum(not each.passed for each in result.verdicts)
    recoveries = [each.recovery_s for each in result.costs if each.recovery_s is not None]
    lost = [each.lost_steps for each in result.costs if each.lost_steps is not None]
    goodput = None if result.goodput is None else result.goodput.goodput
    return (
        Tile(
            "Verdict",
            "✓ passed" if result.passed else "✕ failed",
            f"{len(result.verdicts) - failed} of {plural(len(result.verdicts), 'oracle')} content",
            "good-text" if result.passed else "bad",
        ),
        Tile(
            "Longest recovery",
            duration(max(recoveries)) if recoveries else "none",
            f"at most {scenario.expect.recovers_within_s:g} s expected beside waits for a processor",
        ),
        Tile(
            "Lost steps",
            f"{sum(lost):,}" if lost else "not known",
            f"at most {scenario.expect.lost_steps} expected for each change of the members",
        ),
        Tile(
            "Took",
            duration(played.seconds),
            "" if goodput is None else f"goodput {share(goodput)}, starts included",
        ),
    )


def _faults(result: Result) -> tuple[tuple[str, ...], ...]:
    costs = {each.number: each for each in result.costs}
    struck = {each.number: each for each in result.played.struck}
    rows = []
    for number, fault in enumerate(result.played.scenario.faults, start=1):
        if number not in struck:
            rows.append((str(number), str(fault), "never", "", "", ""))
            continue
        each, cost = struck[number], costs.get(number)
        recovery_s = None if cost is None else cost.recovery_s
        lost = None if cost is None else cost.lost_steps
        rows.append(
            (
                str(number),
                str(fault),
                ", ".join(each.nodes) or _EVERYWHERE,
                f"{each.at_s:.1f} s, step {max(0, each.step)}",
                "" if recovery_s is None else duration(recovery_s),
                "" if lost is None else f"{lost:,}",
            )
        )
    return tuple(rows)


def _buckets(goodput: Goodput) -> tuple[BarRow, ...]:
    total_s = goodput.node_seconds or 1.0
    spent = sorted(
        ((bucket, seconds) for bucket, seconds in goodput.buckets.items() if seconds > 0),
        key=lambda each: -each[1],
    )
    return tuple(
        BarRow(
            bucket.replace("_", " "),
            Bar(
                "good" if bucket is Bucket.PRODUCTIVE else "loss",
                bucket,
                0.0,
                min(1.0, seconds / total_s),
                "",
            ),
            (node_time(seconds), share(seconds / total_s)),
        )
        for bucket, seconds in spent
    )


def lanes_of(played: Played) -> list[Lane]:
    """One lane per node: a bar for each time in a generation, and marks for faults, ends and new starts."""
    nodes = {f"node-{number}" for number in range(played.scenario.nodes)}
    for each in played.happenings:
        nodes |= set(_nodes_of(each)) | set(each.members)
    order = sorted(nodes, key=lambda name: (len(name), name))
    spans: dict[str, list[Span]] = {node: [] for node in order}
    marks: dict[str, list[Mark]] = {node: [] for node in order}
    for node, span in _member_spans(played):
        spans[node].append(span)
    for struck in played.struck:
        for node in struck.nodes or (_EVERYWHERE,):
            title = f"{struck.at_s:.1f} s: {struck.spec}"
            marks.setdefault(node, []).append(Mark("struck", struck.at_s, title))
            if struck.spec.for_s is not None:
                end_s = played.seconds if struck.healed_s is None else struck.healed_s
                spans.setdefault(node, []).append(Span("lasting", struck.at_s, end_s, title))
    for happening in played.happenings:
        style = {"started": "joined", "ended": "left"}.get(happening.what)
        if style is not None:
            title = f"{happening.at_s:.1f} s: {happening.what}, {happening.text}"
            for node in _nodes_of(happening):
                marks[node].append(Mark(style, happening.at_s, title))
    return [
        Lane(node, spans.get(node, []), marks.get(node, []))
        for node in [*order, *(each for each in marks if each not in nodes)]
    ]


def _nodes_of(happening: Happening) -> list[str]:
    return [each for each in happening.node.split("+") if each]


def _member_spans(played: Played) -> Iterable[tuple[str, Span]]:
    """When each node was a member: from a generation to the next one, to the end of its agent, or of the run."""
    since: dict[str, tuple[float, int]] = {}
    for each in played.happenings:
        match each.what:
            case "generation":
                ended, started = list(since), dict.fromkeys(each.members, (each.at_s, each.number))
            case "ended":
                ended, started = [n for n in _nodes_of(each) if n in since], {}
            case "stop":
                ended, started = list(since), {}
            case _:
                continue
        for node in ended:
            yield node, _member_span(node, *since.pop(node), each.at_s)
        since |= started
    for node, (at_s, number) in since.items():
        yield node, _member_span(node, at_s, number, played.seconds)


def _member_span(node: str, start_s: float, number: int, end_s: float) -> Span:
    title = f"{node}: generation {number}, for {duration(end_s - start_s)}"
    return Span("member" if number % 2 else "later", start_s, end_s, title)


def _index_cells(result: Result) -> tuple[str, ...]:
    played = result.played
    recoveries = [each.recovery_s for each in result.costs if each.recovery_s is not None]
    lost = [each.lost_steps for each in result.costs if each.lost_steps is not None]
    return (
        ", ".join(each.kind for each in played.scenario.faults),
        duration(played.seconds),
        duration(max(recoveries)) if recoveries else "",
        f"{sum(lost):,}" if lost else "",
        ", ".join(each.oracle for each in result.verdicts if not each.passed),
    )
