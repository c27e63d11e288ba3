"""One plot of a run: the loss above, the membership below.

The x axis is the steps of the committed lineage, so lost steps do not show: the row of a node that died ends at the
step from which the others resumed. Pure except for the file that it writes; runs in any process.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_WIDTH_INCHES: Final = 10.0
_LOSS_INCHES: Final = 4.0
_ROW_INCHES: Final = 0.42
_MARGIN_INCHES: Final = 1.5
_DOTS_PER_INCH: Final = 110
_SMOOTHING_SHARE: Final = 0.02
_LABEL_SHARE: Final = 0.06
_BAR_HEIGHT: Final = 0.56
_INK: Final = "#24292f"
_FAINT: Final = "#8c959f"
_LOSS: Final = "#0b61a4"
_BARS: Final = ("#9ec9e8", "#c5def0")
_LOST: Final = "#c62828"
_JOINED: Final = "#2e7d32"
_FAILED: Final = "#a34f00"


@dataclass(frozen=True)
class StepPoint:
    """One step of the committed lineage; `step` counts from 1."""

    step: int
    loss: float | None
    """None if it was not finite."""


@dataclass(frozen=True)
class GenerationSpan:
    """One generation: its nodes train the steps after `first_step`, until the next one begins."""

    number: int
    first_step: int
    """Steps that were done when it began."""
    world_size: int
    nodes: tuple[str, ...]
    reason: str
    """Why it was formed; clauses joined by `; `."""


@dataclass(frozen=True)
class _Change:
    """Something that happened to one node at the boundary of two generations."""

    step: int
    node: str
    text: str
    color: str
    marker: str


def plot_run(
    target: Path,
    title: str,
    points: Sequence[StepPoint],
    generations: Sequence[GenerationSpan],
) -> None:
    """Write a PNG to `target`: loss per step above, one row per node with its changes below. Oldest generation first."""
    nodes = list(dict.fromkeys(node for each in generations for node in each.nodes))
    last_step = max((point.step for point in points), default=1)
    rows_inches = _ROW_INCHES * max(1, len(nodes))
    figure = Figure(figsize=(_WIDTH_INCHES, _LOSS_INCHES + rows_inches + _MARGIN_INCHES))
    FigureCanvasAgg(figure)
    loss, membership = figure.subplots(
        2, 1, sharex=True, height_ratios=(_LOSS_INCHES, rows_inches + _ROW_INCHES)
    )
    _draw_loss(loss, points)
    _draw_membership(membership, nodes, generations, last_step)
    for each in generations[1:]:
        for axes in (loss, membership):
            axes.axvline(
                each.first_step, color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0
            )
    loss.set_title(title, loc="left", color=_INK, fontsize=12, pad=12)
    membership.set_xlim(0, last_step)
    membership.set_xlabel("step", color=_INK)
    figure.tight_layout()
    figure.savefig(target, format="png", dpi=_DOTS_PER_INCH)


def _draw_loss(axes: Axes, points: Sequence[StepPoint]) -> None:
    known = [(point.step, point.loss) for point in points if point.loss is not None]
    steps, losses = [step for step, _ in known], [loss for _, loss in known]
    axes.plot(steps, losses, color=_LOSS, linewidth=0.8, alpha=0.35, label="each step")
    axes.plot(steps, _smoothed(losses), color=_LOSS, linewidth=1.8, label="moving average")
    skipped = [point.step for point in points if point.loss is None]
    for step in skipped:
        axes.axvline(
            step, color=_FAILED, linewidth=0.8, label="skipped step" if step == skipped[0] else None
        )
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.grid(axis="y", color=_FAINT, alpha=0.25)
    axes.legend(frameon=False, loc="upper right")
    _clean(axes)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a centred window of about 2 % of the run; narrower at both ends, so that it stays centred."""
    half_steps = max(1, round(len(losses) * _SMOOTHING_SHARE / 2))
    result = []
    for index in range(len(losses)):
        reach = min(half_steps, index, len(losses) - 1 - index)
        window = losses[index - reach : index + reach + 1]
        result.append(sum(window) / len(window))
    return result


def _draw_membership(
    axes: Axes, nodes: Sequence[str], generations: Sequence[GenerationSpan], last_step: int
) -> None:
    row_of = {node: row for row, node in enumerate(nodes)}
    ends = [each.first_step for each in generations[1:]] + [last_step]
    for index, (each, end) in enumerate(zip(generations, ends, strict=True)):
        width = end - each.first_step
        if width <= 0:
            continue
        for node in each.nodes:
            axes.barh(
                row_of[node],
                width,
                left=each.first_step,
                height=_BAR_HEIGHT,
                color=_BARS[index % 2],
            )
        if width < last_step * _LABEL_SHARE:
            continue
        axes.text(
            each.first_step + width / 2,
            -0.75,
            f"W = {each.world_size}",
            ha="center",
            va="center",
            color=_INK,
            fontsize=9,
            clip_on=True,
        )
    for change in _changes(generations):
        _mark(axes, change, row_of[change.node], last_step)
    axes.set_yticks(range(len(nodes)), nodes)
    axes.set_ylim(max(1, len(nodes)) - 0.4, -1.2)
    axes.set_ylabel("nodes", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="y", length=0)
    _clean(axes)


def _mark(axes: Axes, change: _Change, row: int, last_step: int) -> None:
    axes.plot(
        change.step,
        row,
        marker=change.marker,
        color=change.color,
        markersize=9,
        zorder=3,
        clip_on=False,
    )
    right = change.step < last_step * 0.6
    axes.annotate(
        change.text,
        (change.step, row),
        xytext=(9 if right else -9, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=9,
        color=change.color,
        fontweight="bold",
    )


def _changes(generations: Sequence[GenerationSpan]) -> list[_Change]:
    """Nodes lost, joined or failed from one generation to the next, each with the reason."""
    changes = []
    for before, after in itertools.pairwise(generations):
        step = after.first_step
        for node in dict.fromkeys(before.nodes + after.nodes):
            why = "; ".join(clause for clause in after.reason.split("; ") if node in _words(clause))
            if node not in after.nodes:
                changes.append(_Change(step, node, why or after.reason, _LOST, "X"))
            elif node not in before.nodes:
                changes.append(_Change(step, node, why or after.reason, _JOINED, ">"))
            elif why:
                changes.append(_Change(step, node, why, _FAILED, "o"))
    return changes


def _words(clause: str) -> list[str]:
    return [word.rstrip(":,") for word in clause.split()]


def _clean(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK)
