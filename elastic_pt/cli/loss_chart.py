"""The losses of a run as a chart of characters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.text import Text

if TYPE_CHECKING:
    from elastic_pt.report.losses import LossPoint

_SPIKES: Final = 0.98
"""The chart ends at this quantile of the losses, so that the first steps do not flatten the rest."""


def tall_chart(points: "Sequence[LossPoint]", width: int, rows: int, levels: str) -> list[Text]:
    """The chart with its least and greatest loss, its first and its last step beside it."""
    if len(points) < 2:
        return [Text()] * (rows + 1)
    low, high = _bounds([each.loss for each in points])
    label = max(len(f"{low:.3f}"), len(f"{high:.3f}")) + 1
    lines = []
    for number, line in enumerate(chart(points, width - label, rows, levels)):
        title = f"{high:.3f}" if number == 0 else f"{low:.3f}" if number == rows - 1 else ""
        lines.append(Text.assemble((f"{title:<{label}}", "dim"), (line, "cyan")))
    first, last = f"step {points[0].step:,}", f"{points[-1].step:,}"
    gap = " " * max(1, width - label - len(first) - len(last))
    return [*lines, Text(" " * label + first + gap + last, "dim")]


def chart(points: "Sequence[LossPoint]", columns: int, rows: int, levels: str) -> list[str]:
    """The losses over the steps, scaled from the least to the greatest one; the first line is the top."""
    if len(points) < 2 or columns < 2:
        return []
    first, last = points[0].step, points[-1].step
    bins: list[list[float]] = [[] for _ in range(columns)]
    for point in points:
        bins[min(columns - 1, (point.step - first) * columns // max(1, last - first + 1))].append(
            point.loss
        )
    low, high = _bounds([each.loss for each in points])
    heights, before = [], 0
    for values in bins:
        if values:
            share = (sum(values) / len(values) - low) / max(high - low, 1e-12)
            before = round(max(0.0, min(1.0, share)) * (rows * len(levels) - 1))
        heights.append(before)
    lines = []
    for row in reversed(range(rows)):
        base = row * len(levels)
        lines.append(
            "".join(
                " " if each < base else levels[min(each - base, len(levels) - 1)]
                for each in heights
            )
        )
    return lines


def _bounds(losses: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(losses)
    return ordered[0], ordered[min(len(ordered) - 1, int(_SPIKES * len(ordered)))]
