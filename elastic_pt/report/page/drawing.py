"""Draws charts as SVG. Pure: values in, text out. Colours are classes, so that the page's style decides them.

Every chart is drawn twice, for a wide and for a narrow window: text of an SVG that is scaled down cannot be read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, NamedTuple
from zlib import crc32

from elastic_pt.report.page.units import compact

_LEFT: Final = 62
_RIGHT: Final = 14
_TOP: Final = 10
_BOTTOM: Final = 38
_LANE_HEIGHT: Final = 18
TIME_NAME: Final = "time since the first agent started"
_FLAGS_MAX: Final = 30
"""More marks than that are short strokes at the top: lines would hide the curve."""
_TIME_STEPS_S: Final = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1, 2, 5, 10, 15, 30),
    *(60 * each for each in (1, 2, 5, 10, 15, 30)),
    *(3600 * each for each in (1, 2, 3, 6, 12)),
    *(86400 * each for each in (1, 2, 5, 7, 14, 28, 56, 140, 365)),
)


class Size(NamedTuple):
    """Of a drawing, in its own units."""

    width: int
    height: int


class Point(NamedTuple):
    """A point of a line; `y` None breaks the line."""

    x: float
    y: float | None


@dataclass(frozen=True)
class Line:
    """A curve. `style` is its class."""

    style: str
    points: Sequence[Point]
    stepped: bool = False
    """Whether a value holds until the next one."""


@dataclass(frozen=True)
class Band:
    """The area between two curves that have the same x."""

    style: str
    low: Sequence[Point]
    high: Sequence[Point]


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x: a vertical line with a flag. `title` is its text."""

    style: str
    x: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    label: str
    """Says in a sentence what is drawn, for those who cannot see it."""
    x_name: str
    y_name: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    dots: Sequence[Mark] = ()
    """Points on the curve: `x`, and `y` from `dot_values`."""
    dot_values: Sequence[float] = ()
    marks: Sequence[Mark] = ()
    y_counts: bool = False
    """Whether y has whole numbers only."""
    x_is_time: bool = False
    height_share: float = 1.0
    above_lanes: bool = False
    """Whether its time axis is exactly above that of lanes."""


@dataclass(frozen=True)
class Span:
    """A part of a lane."""

    style: str
    start: float
    end: float
    title: str


@dataclass(frozen=True)
class Lane:
    """One row of a lane chart."""

    name: str
    spans: Sequence[Span]
    marks: Sequence[Mark]


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within a range, at most `most`."""
    if not high > low or most < 1:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10, 20) if power * each >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * each, 12) for each in range(first, last + 1)][: most + 1]


def time_ticks(high_s: float, most: int) -> list[tuple[float, str]]:
    """Round moments from 0 to `high_s` with their labels."""
    step = next((each for each in _TIME_STEPS_S if each * most >= high_s), _TIME_STEPS_S[-1])
    unit_s, name = next(
        (unit, name)
        for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (0, "s"))
        if step >= unit
    )
    count = min(int(high_s // step), 2 * most)
    return [
        (each * step, f"{each * step / (unit_s or 1):g} {name}" if each else "0")
        for each in range(count + 1)
    ]


def draw_chart(chart: Chart, size: Size) -> str:
    """The SVG of a chart."""
    height = int(size.height * chart.height_share)
    left = _names_width(size.width) if chart.above_lanes else _LEFT
    right, bottom = size.width - _RIGHT, height - _BOTTOM
    x_of = _scale(chart.x_range, left, right)
    y_of = _scale(chart.y_range, bottom, _TOP)
    parts = [_open(chart.label, size.width, height), *_y_axis(chart, y_of, (left, right), height)]
    parts += _x_axis(chart.x_range, chart.x_name, chart.x_is_time, x_of, bottom, size.width)
    # Values out of the range of y end at the frame.
    clip = f"clip{crc32(chart.label.encode())}-{size.width}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{left}" y="{_TOP}" width="{right - left}" height="{bottom - _TOP}"/></clipPath>'
        f'<g clip-path="url(#{clip})">'
    )
    for band in chart.bands:
        outline = [*band.low, *reversed(band.high)]
        parts.append(f'<path class="{band.style}" d="{_path(outline, x_of, y_of)}Z"/>')
    parts += [
        f'<path class="{line.style}" d="{_path(_stepped(line.points) if line.stepped else line.points, x_of, y_of)}"/>'
        for line in chart.lines
    ]
    parts.append("</g>")
    for dot, value in zip(chart.dots, chart.dot_values, strict=True):
        y = min(max(y_of(value), _TOP), bottom)
        parts.append(
            f'<circle class="{dot.style}" cx="{x_of(dot.x):.1f}" cy="{y:.1f}" r="3.5">{_title(dot.title)}</circle>'
        )
    dense = len(chart.marks) > _FLAGS_MAX
    parts += [
        _mark(mark, x_of(mark.x), _TOP + 9 if dense else bottom, dense) for mark in chart.marks
    ]
    return "".join([*parts, "</svg>"])


def draw_lanes(lanes: Sequence[Lane], label: str, duration_s: float, width: int) -> str:
    """The SVG of lanes over time, one row each."""
    names = _names_width(width)
    height = len(lanes) * _LANE_HEIGHT + 6 + _BOTTOM
    bottom, right = height - _BOTTOM, width - _RIGHT
    x_of = _scale((0.0, duration_s), names, right)
    parts = [_open(label, width, height)]
    parts += _x_axis((0.0, duration_s), TIME_NAME, True, x_of, bottom, width)
    shown = shortened([lane.name for lane in lanes], (names - 12) // 8)
    for row, lane in enumerate(lanes):
        y = 6 + row * _LANE_HEIGHT
        parts.append(
            f'<text class="name" x="{names - 8}" y="{y + 11}" text-anchor="end">{escape(shown[row])}{_title(lane.name)}</text>'
            f'<line class="grid" x1="{names}" x2="{right}" y1="{y + 7}" y2="{y + 7}"/>'
        )
        for span in lane.spans:
            x = x_of(span.start)
            wide = max(1.0, x_of(span.end) - x)
            parts.append(
                f'<rect class="{span.style}" x="{x:.1f}" y="{y + 2}" width="{wide:.1f}" height="10" rx="1.5">'
                f"{_title(span.title)}</rect>"
            )
        parts += [
            f'<path class="{mark.style}" d="{_shape(mark.style, x_of(mark.x), y + 7)}">{_title(mark.title)}</path>'
            for mark in lane.marks
        ]
    return "".join([*parts, "</svg>"])


def _names_width(width: int) -> int:
    return min(150, width // 4)


def shortened(names: Sequence[str], letters: int) -> list[str]:
    """The names, cut to so many letters: first what all have in common is left out, then the middle."""
    if all(len(name) <= letters for name in names):
        return list(names)
    start = len(_common_start(names).rstrip("0123456789")) if len(names) > 1 else 0
    inner = [name[start:] for name in names]
    end = len(_common_start([name[::-1] for name in inner])) if len(names) > 1 else 0
    marked = [f"{'…' * bool(start)}{name[: len(name) - end]}{'…' * bool(end)}" for name in inner]
    tail = letters // 2
    return [
        name if len(name) <= letters else f"{name[: letters - 1 - tail]}…{name[-tail:]}"
        for name in marked
    ]


def _common_start(names: Sequence[str]) -> str:
    """What all names begin with: it is enough to compare the first and the last one in order."""
    first, last = min(names), max(names)
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((index for index, (one, other) in pairs if one != other), len(first))]


def _shape(style: str, x: float, y: float) -> str:
    """A cross for what was lost, failed or struck by a fault, a triangle in front of the bar for who joined, a bar for who left."""
    if style in ("lost", "failed", "struck"):
        return f"M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8"
    if style == "joined":
        return f"M{x - 7:.1f} {y - 5}l7 5l-7 5Z"
    return f"M{x:.1f} {y - 6}v12"


def _open(label: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _scale(values: tuple[float, float], first: float, last: float) -> Callable[[float], float]:
    low, high = values
    factor = (last - first) / (high - low) if high > low else 0.0
    return lambda value: first + (value - low) * factor


def _y_axis(
    chart: Chart, y_of: Callable[[float], float], ends: tuple[int, int], height: int
) -> list[str]:
    left, right = ends
    ticks = nice_ticks(*chart.y_range, max(3, height // (32 if chart.y_counts else 50)))
    if chart.y_counts:
        ticks = [each for each in ticks if each == int(each)]
    parts = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(each):.1f}" y2="{y_of(each):.1f}"/>'
        f'<text x="{left - 6}" y="{y_of(each) + 4:.1f}" text-anchor="end">{compact(each)}</text>'
        for each in ticks
    ]
    middle = (height - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text class="axis" transform="translate({left - 50} {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(chart.y_name)}</text>'
    )
    return parts


def _x_axis(
    values: tuple[float, float],
    name: str,
    is_time: bool,
    x_of: Callable[[float], float],
    bottom: int,
    width: int,
) -> list[str]:
    most = max(3, width // (80 if is_time else 110))
    ticks = (
        time_ticks(values[1], most)
        if is_time
        else [(each, compact(each)) for each in nice_ticks(*values, most) if each == int(each)]
    )
    parts = [
        f'<line class="base" x1="{x_of(values[0]):.1f}" x2="{x_of(values[1]):.1f}" y1="{bottom}" y2="{bottom}"/>'
    ]
    for value, label in ticks:
        x = x_of(value)
        parts.append(
            f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    middle = (x_of(values[0]) + x_of(values[1])) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{bottom + 33}" text-anchor="middle">{escape(name)}</text>'
    )
    return parts


def _mark(mark: Mark, x: float, bottom: int, dense: bool) -> str:
    flag = "" if dense else f'<path d="M{x - 4:.1f} {_TOP}h8l-4 7Z"/>'
    return (
        f'<g class="mark {mark.style}{" dense" if dense else ""}">'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>{flag}{_title(mark.title)}</g>'
    )


def _stepped(points: Sequence[Point]) -> list[Point]:
    corners: list[Point] = []
    for point in points:
        if corners:
            corners.append(Point(point.x, corners[-1].y))
        corners.append(point)
    return corners


def _path(
    points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> str:
    """A path through the points, broken where there is no value. A value alone is drawn as a short stroke."""
    parts: list[str] = []
    drawn = False
    for index, point in enumerate(points):
        if point.y is None:
            drawn = False
            continue
        parts.append(f"{'L' if drawn else 'M'}{x_of(point.x):.1f} {y_of(point.y):.1f}")
        alone = not drawn and (index + 1 == len(points) or points[index + 1].y is None)
        parts += ["m-4 0h4"] if alone else []
        drawn = True
    return "".join(parts)
