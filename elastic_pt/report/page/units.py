"""Numbers in words for people: durations, counts, shares and sizes. Pure."""

import math
from typing import Final

_DURATIONS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_BYTES: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def duration(seconds: float) -> str:
    """`2.50 s`, `90.0 s`, `12.5 min`, `3.2 h`, `41.0 d`: the largest unit of which there are at least two."""
    for unit_s, name in _DURATIONS:
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.1f} {name}"
    return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"


def node_time(seconds: float) -> str:
    """Node time in seconds, minutes or hours, each in the unit that suits it."""
    for unit_s, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 6 * unit_s:
            return f"{seconds / unit_s:,.{0 if seconds >= 1e4 * unit_s else 1}f} {name}"
    return f"{seconds:,.1f} s"


def share(value: float) -> str:
    """`93.1 %`; a share that is not 0 is never shown as 0."""
    percent = 100 * value
    return f"{percent:.1f} %" if percent >= 0.05 or percent == 0 else "< 0.1 %"


def size(count: float) -> str:
    """Bytes in decimal units."""
    power = 0 if count < 1 else min(len(_BYTES) - 1, int(math.log10(count) // 3))
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {_BYTES[power]}"


def significant(value: float | None, digits: int = 4) -> str:
    """A measured value with so many digits; `not finite` for NaN and infinities."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if 1e6 <= abs(value) < 1e15:
        return f"{float(f'{value:.{digits - 1}e}'):,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = digits - 1 - (0 if value == 0 else math.floor(math.log10(abs(value))))
        return f"{value:,.{max(0, min(8, places))}f}"
    return f"{value:.{digits - 1}e}"


def compact(value: float) -> str:
    """A label of an axis: `0.25`, `1,500`, `12k`, `3.5M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):g}{name}"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.6g}"


def dollars(value: float, total: float | None = None) -> str:
    """USD, with cents unless the total makes them meaningless."""
    return f"{value:,.{0 if (value if total is None else total) >= 1000 else 2}f}"


def plural(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
