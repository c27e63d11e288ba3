"""Curves over the steps: loss and throughput. Pure."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from elastic_pt.report.change import Change
from elastic_pt.report.page.drawing import Band, Chart, Line, Mark, Point
from elastic_pt.report.page.facts import Facts
from elastic_pt.report.page.parts import Figure, Table
from elastic_pt.report.page.steps import Steps, Thinned, Values, moving_average, thin
from elastic_pt.report.page.units import plural, significant

POINTS_MAX: Final = 600
"""Points of a curve: more than a screen of this width shows."""
_MARKS_MAX: Final = 120
DOTS_MAX: Final = 200
_TABLE_ROWS: Final = 12


def loss_figure(facts: Facts) -> Figure | None:
    """The loss of each step and its moving average; None if no step is committed."""
    steps = facts.steps
    if not len(steps):
        return None
    step, loss = _column(steps.step), _column(steps.loss)
    window = max(5, min(1000, len(steps) // 50))
    raw = thin(step, loss, POINTS_MAX)
    average = thin(step, moving_average(loss, window), POINTS_MAX)
    single = raw.steps_per_point == 1
    skipped = steps.skipped[:: max(1, -(-len(steps.skipped) // DOTS_MAX))]
    held_out = steps.held_out[:: max(1, -(-len(steps.held_out) // DOTS_MAX))]
    low, high = _range([raw.low, raw.high] if single else [average.mean, raw.mean], steps.held_out)
    chart = Chart(
        label=f"Loss by step: {significant(_last(average.mean))} at step {steps.step[-1]}, as a mean of {window} steps",
        x_name="step",
        y_name="loss (nats per token)",
        x_range=(0.0, float(max(step[-1], facts.status.step))),
        y_range=(low, high),
        bands=()
        if single
        else [Band("band", _points(raw.steps, raw.low), _points(raw.steps, raw.high))],
        lines=[
            *([Line("faint", _points(raw.steps, raw.mean))] if single else []),
            Line("curve", _points(average.steps, average.mean)),
            Line("held-out", [Point(*each) for each in held_out]),
        ],
        dots=[
            *(
                Mark(
                    "held-out-dot", float(at), f"held-out loss {significant(value)} at step {at:,}"
                )
                for at, value in held_out
            ),
            *(
                Mark(
                    "skipped",
                    float(each.step),
                    f"step {each.step:,} was skipped: {facts.redactor.text(each.why)}",
                )
                for each in skipped
            ),
        ],
        dot_values=[*(value for _, value in held_out), *(low for _ in skipped)],
        marks=change_marks(facts),
    )
    legend = [
        ("faint", "loss of a step")
        if single
        else ("band", "least to greatest loss of the steps of a point"),
        ("curve", f"mean of the last {window} steps"),
    ]
    legend += [("held-out-dot", "held-out loss")] if held_out else []
    legend += [("skipped", "skipped step")] if skipped else []
    legend += [
        (f"{style} flag", name)
        for style, name in (("failure", "failure"), ("planned", "planned change"))
        if any(each.style == style for each in chart.marks)
    ]
    return Figure(
        chart,
        legend=tuple(legend),
        notes=tuple(_loss_notes(steps, raw)),
        table=_loss_table(steps, average),
    )


def throughput_figures(facts: Facts) -> list[Figure]:
    """Tokens per second, and below it the world size, by step."""
    steps = facts.steps
    seconds = _column(steps.seconds)
    if not len(steps) or not np.isfinite(seconds).any():
        return []
    step = _column(steps.step)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(seconds > 0, _column(steps.tokens) / seconds, np.nan)
    window = max(5, min(1000, len(steps) // 50))
    raw, average = (
        thin(step, rate, POINTS_MAX),
        thin(step, moving_average(rate, window), POINTS_MAX),
    )
    _, high = _range([average.mean, raw.mean], [])
    x_range = (0.0, float(max(step[-1], facts.status.step)))
    note = f"Each point stands for {plural(raw.steps_per_point, 'step')}."
    world = thin(step, _column(steps.world_size), POINTS_MAX)
    return [
        Figure(
            Chart(
                label=f"Tokens per second by step: {significant(_last(average.mean), 3)} at the end",
                x_name="step",
                y_name="tokens per second",
                x_range=x_range,
                y_range=(0.0, high * 1.15),
                lines=[
                    Line("faint", _points(raw.steps, raw.mean)),
                    Line("curve", _points(average.steps, average.mean)),
                ],
                marks=change_marks(facts),
            ),
            legend=(
                (
                    "faint",
                    "each step" if raw.steps_per_point == 1 else "mean of the steps of a point",
                ),
                ("curve", f"mean of the last {window} steps"),
            ),
            notes=(note,) if raw.steps_per_point > 1 else (),
        ),
        Figure(
            Chart(
                label="World size by step",
                x_name="step",
                y_name="workers",
                y_counts=True,
                x_range=x_range,
                y_range=(0.0, float(np.nanmax(world.high)) * 1.15 + 0.5),
                lines=[Line("curve", _points(world.steps, world.mean), stepped=True)],
                height_share=0.55,
            ),
        ),
    ]


def change_marks(facts: Facts) -> list[Mark]:
    """A mark for each change at its step. Marks that would overlap are drawn as one, a failure before a planned change."""
    last = max(facts.steps.step[-1] if len(facts.steps) else 0, facts.status.step, 1)
    places: dict[int, list[Change]] = {}
    for change in facts.changes:
        if isinstance(change, Change):
            places.setdefault(step_of(change) * _MARKS_MAX // last, []).append(change)
    marks = []
    for found in places.values():
        failures = [each for each in found if not each.planned]
        first = (failures or found)[0]
        more = f" (and {plural(len(found) - 1, 'more change')} near it)" if len(found) > 1 else ""
        title = f"step {step_of(first):,}: generation {first.generation}: {facts.redactor.text(first.reason)}{more}"
        marks.append(Mark("failure" if failures else "planned", float(step_of(first)), title))
    return marks


def step_of(change: Change) -> int:
    """The step at which a change happened; that of its state if this is unknown."""
    return max(change.reached_step or 0, change.resume_step)


def _loss_notes(steps: Steps, raw: Thinned) -> list[str]:
    notes = []
    if raw.steps_per_point > 1:
        notes.append(
            f"The curve is thinned: each point stands for {raw.steps_per_point:,} of {len(steps):,} steps."
        )
    if steps.not_finite:
        notes.append(
            f"{plural(steps.not_finite, 'step')} had a loss that is not finite; the curve leaves it out."
        )
    if steps.skipped_count:
        notes.append(f"{plural(steps.skipped_count, 'step')} changed nothing (skipped).")
    if not steps.held_out:
        notes.append("The history has no held-out loss.")
    return notes


def _loss_table(steps: Steps, average: Thinned) -> Table:
    chosen = sorted({int(each) for each in np.linspace(0, len(average.steps) - 1, _TABLE_ROWS)})
    rows = tuple(
        (f"{int(average.steps[each]):,}", significant(float(average.mean[each]))) for each in chosen
    )
    return Table("The curve in numbers", ("step", "moving average of the loss"), rows)


def _column(values: Sequence[float]) -> Values:
    return np.asarray(values, dtype=np.float64)


def _points(steps: Values, values: Values) -> list[Point]:
    return [
        Point(float(x), float(y) if math.isfinite(y) else None)
        for x, y in zip(steps, values, strict=True)
    ]


def _last(values: Values) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _range(curves: Sequence[Values], more: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The range of y. A few extreme values do not flatten the curve: they end at the frame."""
    values = np.concatenate([*curves, np.asarray([value for _, value in more], dtype=np.float64)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    usual = float(np.percentile(values, 98))
    if high - low > 4 * (usual - low) > 0:
        high = low + 2 * (usual - low)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-6)
    return low - room, high + room
