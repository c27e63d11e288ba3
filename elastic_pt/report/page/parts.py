"""The parts of which the page's model is made."""

from dataclasses import dataclass

from elastic_pt.report.page.drawing import Chart, Lane


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A drawing with what is needed to read it."""

    chart: Chart | None = None
    lanes: tuple[Lane, ...] = ()
    duration_s: float = 0.0
    """Of the lanes."""
    legend: tuple[tuple[str, str], ...] = ()
    """The class and the meaning of each style."""
    notes: tuple[str, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Bar:
    """A part of a bar: from and to as shares of the whole."""

    style: str
    name: str
    start: float
    width: float
    value: str


@dataclass(frozen=True)
class BarRow:
    """A row of a table with a bar."""

    name: str
    bar: Bar
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """A broken generation, explained."""

    title: str
    causes: str
    sentences: tuple[str, ...]
    cost: str
    bars: tuple[Bar, ...]
    """The phases, as shares of the most expensive failure shown."""


@dataclass(frozen=True)
class Section:
    """A part of the page. `missing` says why there is nothing to show."""

    figures: tuple[Figure, ...] = ()
    rows: tuple[BarRow, ...] = ()
    columns: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    missing: str = ""
