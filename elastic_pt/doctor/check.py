"""The result of one check, and how amounts are written in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from elastic_pt.errors import ElasticPtError

EXPECTED: Final = "; expected "
"""Before the last part of each error of this project (STYLE: what, where, the value, what is expected)."""
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. Texts are for people: one line each."""

    name: str
    """snake_case; docs/deployment/doctor.md has a row for each."""
    ok: bool
    found: str
    expected: str
    remedy: str
    """What to do if it is not ok; empty if it is."""


def judged(name: str, ok: bool, found: str, expected: str, remedy: str) -> Check:
    """A check, without its remedy if it is ok."""
    return Check(name, ok, found, expected, "" if ok else remedy)


def required(name: str, expected: str, remedy: str, require: Callable[[], str]) -> Check:
    """The check of a requirement. `require` returns what was found, or raises an `ElasticPtError`."""
    try:
        return Check(name, True, require(), expected, "")
    except ElasticPtError as error:
        found, _, wanted = one_line(str(error)).partition(EXPECTED)
        return Check(name, False, found, wanted or expected, remedy)


def one_line(text: str) -> str:
    """`text` without line ends."""
    return " ".join(text.split())


def size(count: float) -> str:
    """Bytes for people, such as `2.9 GiB`."""
    unit, value = "B", float(count)
    for larger in _UNITS:
        if value < 1023.5:
            break
        unit, value = larger, value / 1024
    return f"{value:.0f} {unit}" if value >= 9.95 or unit == "B" else f"{value:.1f} {unit}"


def rate(bytes_per_s: float) -> str:
    """A rate for people, such as `93 MB/s`."""
    megabytes = bytes_per_s / 1e6
    return f"{megabytes:,.0f} MB/s" if megabytes >= 9.95 else f"{megabytes:.1f} MB/s"


def seconds(value: float) -> str:
    """A duration for people, such as `12 ms` or `3.1 s`."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.1f} s" if value < 99.5 else f"{value:,.0f} s"
