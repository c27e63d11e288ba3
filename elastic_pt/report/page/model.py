"""What the page shows, from facts. Pure; the template only lays it out."""

import datetime
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from elastic_pt.report.change import Change
from elastic_pt.report.goodput import Goodput
from elastic_pt.report.page.curves import loss_figure, throughput_figures
from elastic_pt.report.page.facts import SIZES_MAX, Facts
from elastic_pt.report.page.failures import failures_of, planned_of, steps_again
from elastic_pt.report.page.nodes import clock_of, member_figures, progress_figure
from elastic_pt.report.page.parts import Bar, BarRow, Failure, Section, Table, Tile
from elastic_pt.report.page.units import (
    dollars,
    duration,
    node_time,
    plural,
    share,
    significant,
    size,
)
from elastic_pt.report.status import State
from elastic_pt.telemetry.goodput import Bucket

CHECKPOINTS_MAX: Final = 40
_SHARE_MIN: Final = 5e-4
"""A bucket with a smaller share has no row."""
_PACE_STEPS: Final = 200
_TONES: Final = {
    State.FAILED: "bad",
    State.PAUSED: "warn",
    State.DOWN: "warn",
    State.COMPLETED: "good",
}
_PHASE_COLOURS: Final = ("data", "compute", "communicate", "optimizer", "other")


@dataclass(frozen=True)
class Page:
    """The whole page."""

    name: str
    url: str
    state: str
    tone: str
    reason: str
    made_at: str
    nothing: str
    """Why there is nothing to show but the configuration; empty if there is something."""
    tiles: tuple[Tile, ...]
    loss: Section
    nodes: Section
    goodput: Section
    failures: tuple[Failure, ...]
    failure_notes: tuple[str, ...]
    planned: tuple[str, ...]
    checkpoints: Section
    throughput: Section
    mixture: Section
    versions: Table
    settings: str


def page_of(facts: Facts) -> Page:
    """The page that these facts make."""
    status, clock = facts.status, clock_of(facts)
    made = datetime.datetime.fromtimestamp(facts.now_at_s, datetime.UTC)
    failures, failure_notes = failures_of(facts)
    loss = loss_figure(facts)
    return Page(
        name=facts.url.rstrip("/").rpartition("/")[2] or facts.url,
        url=facts.url,
        state=status.state,
        tone=_TONES.get(status.state, ""),
        reason=facts.redactor.text(status.reason),
        made_at=made.strftime("%Y-%m-%d %H:%M UTC"),
        nothing=""
        if facts.timeline.records
        else "The run has not started: its log has no record, so there is nothing to show yet.",
        tiles=tuple(_tiles(facts, clock.end_s)),
        loss=Section((loss,))
        if loss
        else Section(
            missing="No step is committed yet."
            if facts.config
            else "A run of stock torchrun has no history of steps."
        ),
        nodes=Section(tuple(member_figures(facts, clock)))
        if facts.timeline.world_sizes
        else Section(missing="The log has no generation yet."),
        goodput=_goodput(facts.goodput),
        failures=failures,
        failure_notes=failure_notes,
        planned=planned_of(facts),
        checkpoints=_checkpoints(facts),
        throughput=_throughput(facts),
        mixture=_mixture(facts),
        versions=_versions(facts),
        settings=facts.config_text,
    )


def _tiles(facts: Facts, elapsed_s: float) -> Iterable[Tile]:
    status, goodput = facts.status, facts.goodput
    step = max(status.step, facts.steps.step[-1] if len(facts.steps) else 0)
    reason = "" if status.reason == status.state else facts.redactor.text(status.reason)
    yield Tile("State", status.state, reason, _TONES.get(status.state, ""))
    if status.steps:
        yield Tile("Step", f"{step:,}", f"of {status.steps:,}: {share(step / status.steps)}")
    elif step:
        yield Tile("Step", f"{step:,}")
    if not facts.timeline.records:
        return
    loss = (
        status.loss
        if status.loss is not None
        else (facts.steps.loss[-1] if len(facts.steps) else None)
    )
    if loss is not None:
        held_out = facts.steps.held_out
        note = (
            f"held-out {significant(held_out[-1][1])} at step {held_out[-1][0]:,}"
            if held_out
            else "nats per token, newest step"
        )
        yield Tile("Loss", significant(loss), note, "" if math.isfinite(loss) else "bad")
    if goodput.goodput is not None:
        yield Tile("Goodput", share(goodput.goodput), "of the node time in new steps")
        yield Tile(
            "Node time",
            node_time(goodput.node_seconds),
            f"{plural(len(goodput.agents), 'agent')}, {duration(elapsed_s)} from start to end",
        )
    else:
        yield Tile("Time", duration(elapsed_s), "by the log; no agent left an account")
    if goodput.cost is not None:
        yield Tile("Cost", f"{dollars(goodput.cost)} USD", _cost_note(goodput))
    changes = [each for each in facts.changes if isinstance(each, Change)]
    failures = [each for each in changes if not each.planned]
    survived = "Failures" if status.state is State.FAILED else "Failures survived"
    yield Tile(
        survived,
        f"{len(failures):,}",
        f"{steps_again(failures)} done again; {plural(len(changes) - len(failures), 'planned change')}",
    )
    if (left := _remaining(facts, step)) is not None:
        yield left


def _cost_note(goodput: Goodput) -> str:
    if goodput.unpriced:
        return f"{plural(goodput.unpriced, 'agent')} without a price not counted"
    if goodput.cost is None or goodput.goodput is None:
        return ""
    return f"{dollars(goodput.cost_of(Bucket.PRODUCTIVE), goodput.cost)} USD of it for new steps"


def _remaining(facts: Facts, step: int) -> Tile | None:
    """When it will end, for a run that trains."""
    status = facts.status
    recent = [each for each in facts.steps.seconds[-_PACE_STEPS:] if math.isfinite(each)]
    if status.state is not State.RUNNING or not status.steps or not recent:
        return None
    left_s = (status.steps - step) * statistics.fmean(recent)
    end = datetime.datetime.fromtimestamp(facts.now_at_s + left_s, datetime.UTC)
    return Tile(
        "Time left",
        duration(left_s),
        f"until {end:%Y-%m-%d %H:%M} UTC at the pace of the last {plural(len(recent), 'step')}, without failures",
    )


def _goodput(goodput: Goodput) -> Section:
    """The waterfall: all node time, less each bucket that made no new step, is the productive time."""
    if not goodput.agents or not goodput.node_seconds:
        return Section(
            missing="No agent of this run left an account of its time: its agents are of an earlier version, or of stock torchrun."
        )
    total_s = goodput.node_seconds
    spent = {
        each: seconds
        for each, seconds in goodput.buckets.items()
        if seconds > 0 and each is not Bucket.PRODUCTIVE
    }
    losses = sorted(spent.items(), key=lambda each: -each[1])
    tiny = [bucket for bucket, seconds in losses if seconds / total_s < _SHARE_MIN]
    rows = [_waterfall_row("all node time", "total", 0.0, total_s, goodput.cost or 0.0, goodput)]
    end_s = total_s
    for bucket, seconds in losses[: len(losses) - len(tiny)]:
        rows.append(
            _waterfall_row(
                bucket.replace("_", " "),
                "loss",
                max(0.0, end_s - seconds),
                seconds,
                goodput.cost_of(bucket),
                goodput,
            )
        )
        end_s -= seconds
    rows.append(
        _waterfall_row(
            "productive",
            "good",
            0.0,
            goodput.buckets.get(Bucket.PRODUCTIVE, 0.0),
            goodput.cost_of(Bucket.PRODUCTIVE),
            goodput,
        )
    )
    priced = goodput.cost is not None
    running = sum(each.running for each in goodput.agents)
    notes = (
        [f"{plural(running, 'agent')} still running: their time counts up to now."]
        if running
        else []
    )
    if tiny:
        notes.append(f"Less than {100 * _SHARE_MIN:g} % each: {', '.join(tiny).replace('_', ' ')}.")
    return Section(
        rows=tuple(rows),
        columns=("", "", "node time", "share", *(["USD"] if priced else [])),
        notes=tuple(notes),
    )


def _waterfall_row(
    name: str, style: str, start_s: float, seconds: float, cost: float, goodput: Goodput
) -> BarRow:
    total_s = goodput.node_seconds
    cells = [node_time(seconds), share(seconds / total_s)]
    if goodput.cost is not None:
        cells.append(dollars(cost, goodput.cost))
    return BarRow(name, Bar(style, name, start_s / total_s, seconds / total_s, ""), tuple(cells))


def _checkpoints(facts: Facts) -> Section:
    commits = facts.timeline.commits
    if not commits:
        return Section(
            missing="No checkpoint is committed yet."
            if facts.config
            else "A run of stock torchrun commits no checkpoints in this log."
        )
    figure = progress_figure(facts, clock_of(facts))
    steps = [each.checkpoint.step for each in commits]
    gaps = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    times = [after.time_s - before.time_s for before, after in itertools.pairwise(commits)]
    permanent = sum(each.checkpoint.permanent for each in commits)
    notes = [
        f"{plural(len(commits), 'commit')}, {permanent} of them permanent, {len(facts.timeline.quarantined)} quarantined; {len(facts.checkpoints)} kept now."
    ]
    notes.append(
        f"Between commits: {plural(statistics.median_low(gaps), 'step')} (median; at most {max(gaps)})"
        + (
            f", {duration(statistics.median(times))} (median; at most {duration(max(times))})."
            if times
            else "."
        )
    )
    rows = []
    now = datetime.datetime.fromtimestamp(facts.now_at_s, datetime.UTC)
    for each in facts.checkpoints[:CHECKPOINTS_MAX]:
        checkpoint = each.report.checkpoint
        marks = ["permanent"] if checkpoint.permanent else []
        marks += (
            [f"quarantined: {facts.redactor.text(each.report.quarantine)}"]
            if each.report.quarantine
            else []
        )
        rows.append(
            (
                f"{checkpoint.step:,}",
                "" if checkpoint.loss is None else significant(checkpoint.loss),
                "unknown" if each.size_bytes is None else size(each.size_bytes),
                f"{duration(each.report.age_s(now))} ago",
                "; ".join(marks) or "kept",
            )
        )
    title = "Checkpoints in the bucket" + (
        f", the newest {CHECKPOINTS_MAX}" if len(facts.checkpoints) > CHECKPOINTS_MAX else ""
    )
    tables = [Table(title, ("step", "loss", "size", "committed", "state"), tuple(rows))]
    kept = {each.report.checkpoint.directory for each in facts.checkpoints}
    gone = [
        (directory, facts.redactor.text(why))
        for directory, why in facts.timeline.quarantined.items()
        if directory not in kept
    ]
    if gone:
        tables.append(
            Table(
                "Quarantined and no longer kept",
                ("checkpoint", "why"),
                tuple(gone[-CHECKPOINTS_MAX:]),
            )
        )
    if len(facts.checkpoints) > SIZES_MAX:
        notes.append(f"Sizes are read of the newest {SIZES_MAX}.")
    return Section(
        figures=() if figure is None else (figure,), tables=tuple(tables), notes=tuple(notes)
    )


def _throughput(facts: Facts) -> Section:
    figures = tuple(throughput_figures(facts))
    if not figures:
        return Section(missing="The history has no times of steps.")
    known = [
        (t, s)
        for t, s in zip(facts.steps.tokens, facts.steps.seconds, strict=True)
        if s > 0 and t >= 0
    ]
    tokens, seconds = sum(each for each, _ in known), sum(each for _, each in known)
    notes = [
        f"{tokens:,.0f} tokens in {duration(seconds)} of steps: {significant(tokens / seconds, 3)} tokens per second."
        if seconds
        else ""
    ]
    phases = facts.steps.phases_s
    total_s = sum(phases.values()) or 1.0
    bars, start = [], 0.0
    for name in [
        *(each for each in _PHASE_COLOURS if each in phases),
        *(each for each in phases if each not in _PHASE_COLOURS),
    ]:
        width = phases[name] / total_s
        style = name if name in _PHASE_COLOURS else "other"
        bars.append(Bar(f"phase-{style}", name, start, width, share(width)))
        start += width
    if set(phases) <= {"data", "other"}:
        notes.append(
            "The history has no phases of a step but the wait for data: its agents are of an earlier version."
        )
    return Section(figures=figures, bars=tuple(bars), notes=tuple(filter(None, notes)))


def _mixture(facts: Facts) -> Section:
    sources, weights = facts.steps.sources, facts.mixture.weights
    if not sources and not weights:
        return Section(
            missing=f"Neither is known: the history has no sources, and the data's manifest cannot be read ({facts.redactor.text(facts.mixture.missing)})."
        )
    rows_total = sum(each.rows for each in sources.values())
    most = max(
        [
            *weights.values(),
            *(each.rows / rows_total for each in sources.values() if rows_total),
            1e-9,
        ]
    )
    rows = []
    for name in sorted({*weights, *sources}, key=lambda each: -weights.get(each, 0.0)):
        planned, found = weights.get(name), sources.get(name)
        realised = found.rows / rows_total if found and rows_total else None
        loss = found.recent_loss if found else math.nan
        rows.append(
            BarRow(
                name,
                Bar("mixture", name, (planned or 0.0) / most, (realised or 0.0) / most, ""),
                (
                    "unknown" if planned is None else share(planned),
                    "unknown" if realised is None else share(realised),
                    f"{found.rows:,}" if found else "",
                    significant(loss) if math.isfinite(loss) else "",
                ),
            )
        )
    notes = []
    if not sources:
        notes.append(
            "The history has no sources (an earlier version wrote it), so only the plan is shown."
        )
    if not weights:
        notes.append(f"The plan is not known: {facts.redactor.text(facts.mixture.missing)}.")
    if facts.mixture.missing == "" and sources and "other" in sources and "other" not in weights:
        notes.append("`other` is the rest of the sources: a step's report names at most 64.")
    return Section(
        rows=tuple(rows),
        columns=("source", "", "planned", "realised", "rows", "newest loss"),
        notes=tuple(notes),
    )


def _versions(facts: Facts) -> Table:
    wanted: Mapping[str, object] = {
        name: value
        for name, value in facts.identity.items()
        if "." not in name or name.startswith("data.url")
    }
    rows = [
        (name, facts.redactor.text(str(value)))
        for name, value in wanted.items()
        if value not in ("", None)
    ]
    return Table("Versions and platform", ("name", "value"), tuple(rows))
