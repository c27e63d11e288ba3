"""Summaries of the samples of `recovery.py`: percentiles, median phases, targets, and the printed table.

    Sample ─► summarize ─► {"p50", "p99", "repeats", "phases", "samples", ...} ─► rows ─► table
                                                                  TARGETS ─► judge ─┘

All functions are pure except `print_report`. Percentiles are nearest-rank, so p99 of fewer than 100 samples is the
largest sample. A repetition that did not recover counts as infinitely long. In the JSON it is null.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.summary import percentile

PHASES: Final = ("detect", "agree", "fork", "process group", "restore", "first step")
"""The phases of a recovery, in order. They end when: a member detects it; the log has the new generation; its workers
run; they are connected; they have the state; the first step is done."""
KINDS: Final = ("worker", "node", "two_nodes", "silent", "hang", "join", "leave")
"""The kinds of disturbances, in the order of the measurement."""

Summary = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One repetition. If it did not recover, `seconds` is None and `failure` has the reason."""

    seconds: float | None
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase. Their sum is `seconds`."""
    beside: Mapping[str, float] = field(default_factory=dict)
    """More measurements of this repetition, by name, with the unit last."""
    victim: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table: a measurement of a kind, and its targets (maxima, in the unit of the measurement)."""

    kind: str
    title: str
    beside: str = ""
    """The name of a measurement in `Sample.beside`; empty for `seconds`."""
    p50: float | None = None
    p99: float | None = None
    worst: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The targets, by their names in a `Summary`."""
        limits = {"p50": self.p50, "p99": self.p99, "max": self.worst}
        return {name: limit for name, limit in limits.items() if limit is not None}


_LOST: Final = "lost_steps"
# A target without a percentile is a p99 target.
ROWS: Final = (
    Row("worker", "worker killed", p50=0.5, p99=1.0),
    Row("worker", "worker killed: steps lost", _LOST, p50=1, worst=2),
    Row("node", "node killed, any", p50=0.4, p99=2.0),
    Row("node", "node killed, any: steps lost", _LOST, p50=1, worst=2),
    Row("two_nodes", "two nodes killed, no mirrors of each other"),
    Row("two_nodes", "two nodes killed: steps lost", _LOST, p50=1, worst=2),
    Row("silent", "node falls silent", p50=2.5),
    Row("hang", "worker hangs: detected", beside="detection_s", p99=3.0),
    Row("hang", "worker hangs"),
    Row("join", "join: survivors' stall", p99=0.5),
    Row("join", "join: joiner's first step", beside="joiner_s", p99=4.0),
    Row("leave", "leave: survivors' stall", p99=0.5),
)


def summarize(samples: Sequence[Sample]) -> Summary:
    """The JSON object of one kind: percentiles, median phases, more measurements, and all samples."""
    assert samples
    recovered = [sample for sample in samples if sample.seconds is not None]
    phases = {name: None for sample in recovered for name in sample.phases}
    summary: Summary = {
        **_percentiles([sample.seconds for sample in samples]),
        "repeats": len(samples),
        "phases": {
            name: statistics.median(sample.phases.get(name, 0.0) for sample in recovered)
            for name in phases
        },
    }
    for name in {name: None for sample in samples for name in sample.beside}:
        summary[name] = _percentiles([sample.beside.get(name) for sample in samples])
    failures = [sample.failure for sample in samples if sample.failure]
    if failures:
        counts = {failure: failures.count(failure) for failure in dict.fromkeys(failures)}
        summary["reason"] = "; ".join(f"{count} x {failure}" for failure, count in counts.items())
    summary["samples"] = [
        {
            "seconds": sample.seconds,
            "victim": sample.victim,
            "phases": dict(sample.phases),
            **sample.beside,
            **({"failure": sample.failure} if sample.failure else {}),
        }
        for sample in samples
    ]
    return summary


def unavailable(reason: str) -> Summary:
    """The JSON object of a kind that was not measured, and why."""
    return {
        "p50": None,
        "p99": None,
        "repeats": 0,
        "phases": {},
        "samples": [],
        "reason": reason,
    }


def _percentiles(values: Sequence[float | None]) -> dict[str, float | None]:
    numbers = [math.inf if value is None else value for value in values]
    found = {name: percentile(numbers, share) for name, share in (("p50", 0.5), ("p99", 0.99))}
    found["max"] = max(numbers)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def value_of(summary: Summary, row: Row, name: str) -> float | None:
    """A percentile of the row's measurement; None if there is none."""
    found: float | None = (summary.get(row.beside, {}) if row.beside else summary).get(name)
    return found


def judge(summary: Summary, row: Row) -> bool | None:
    """Whether the measurement meets the row's targets; None if there is no target or no measurement."""
    wanted = row.limits
    if not wanted or not summary["repeats"]:
        return None
    values = {name: value_of(summary, row, name) for name in wanted}
    return all(value is not None and value <= wanted[name] for name, value in values.items())


def words(summary: Summary | None, row: Row) -> str:
    """A cell of the table: p50 and p99 (of steps: the maximum), or the reason why there are none."""
    if summary is None:
        return ""
    steps = row.beside == _LOST
    values = [value_of(summary, row, name) for name in ("p50", "max" if steps else "p99")]
    reason = str(summary.get("reason", "")).partition("\n")[0]
    if values == [None, None]:
        return reason or "-"
    text = " / ".join(
        "none" if value is None else f"{value:.{0 if steps else 2}f}" for value in values
    )
    return f"{text} ({reason})" if reason else text


def targets_of(kinds: Mapping[str, Summary]) -> dict[str, bool]:
    """Whether each target of the kinds that were measured is met, by a line that says which."""
    found = {}
    for row in ROWS:
        verdict = judge(kinds[row.kind], row) if row.kind in kinds else None
        if verdict is not None:
            limits = ", ".join(f"{name} at most {limit:g}" for name, limit in row.limits.items())
            found[f"{row.title}: {limits}"] = verdict
    return found


def breakdown(summary: Summary) -> str:
    """The median phases in order, in one line. For a join also the phases of the joiner."""
    joiner = {
        f"joiner's {name}": summary[key]["p50"]
        for name, key in (
            ("agent", "joiner_agent_s"),
            ("admission", "joiner_agree_s"),
            ("first step", "joiner_step_s"),
        )
        if summary.get(key, {}).get("p50") is not None
    }
    parts = summary["phases"] | joiner
    return "  ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items())


def worst(summary: Summary) -> str:
    """The phases of the slowest repetition, or the failure of one that did not recover."""
    slowest = max(
        summary["samples"],
        key=lambda sample: math.inf if sample["seconds"] is None else sample["seconds"],
    )
    if slowest["seconds"] is None:
        return f"{slowest['victim']} {slowest['failure']}".strip()
    parts = (f"{name} {seconds:.3f}" for name, seconds in slowest["phases"].items())
    return "  ".join((slowest["victim"], *parts)).strip()


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of all sides, and the phases of each of our rows that misses its target."""
    sides = [name for name in report if name == "ours" or name.startswith("torchrun")]
    table = Table(title="seconds, p50 / p99 (nearest rank); steps lost, p50 / maximum")
    table.add_column("disturbance")
    table.add_column("target")
    for side in sides:
        table.add_column(side)
    table.add_column("ours")
    missed: dict[str, Summary] = {}
    for row in ROWS:
        if all(row.kind not in report[side] for side in sides):
            continue
        ours = report.get("ours", {}).get(row.kind)
        verdict = None if ours is None else judge(ours, row)
        if verdict is False:
            missed[row.kind] = ours
        target = " / ".join(
            "-" if limit is None else f"{limit:g}" for limit in (row.p50, row.p99 or row.worst)
        )
        table.add_row(
            row.title,
            "" if target == "- / -" else target,
            *(words(report[side].get(row.kind), row) for side in sides),
            {None: "", True: "[green]met[/green]", False: "[red]MISSED[/red]"}[verdict],
        )
    console.print(table)
    for side in sides:
        for kind, summary in report[side].items():
            lost = summary.get("lost_steps", {})
            again_s = summary.get("new_progress_s", {}).get("p50")
            if lost.get("p50") is not None:
                after = "" if again_s is None else f", the first new one after {again_s:.2f} s"
                steps = f"{lost['p50']:.0f} steps lost at the median, {lost['max']:.0f} at most"
                console.print(f"{side} {kind}: {steps}{after} (median)")
    for target, met in targets_of(report.get("ours", {})).items():
        console.print(f"{'met' if met else '[red]MISSED[/red]'}: {target}")
    for kind, summary in missed.items():
        console.print(f"[red]missed[/red] {kind}, medians: {breakdown(summary)}")
        console.print(f"       {kind}, the worst: {worst(summary)}")
