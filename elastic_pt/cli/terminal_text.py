"""Lines, tables and panels that a terminal can show: none is wider than asked for, and none steers the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.panel import Panel
from rich.text import Text


@dataclass(frozen=True)
class Glyphs:
    """Characters of the bars and the chart."""

    full: str
    empty: str
    levels: str
    more: str
    rule: str


_UNICODE: Final = Glyphs("━", "─", "▁▂▃▄▅▆▇█", "…", "─")
_ASCII: Final = Glyphs("#", "-", "_.-:=+*#", "...", "-")


class TerminalText:
    """Makes the pieces of a picture, of ASCII characters alone if the terminal shows no others."""

    def __init__(self, *, ascii: bool) -> None:
        self._ascii = ascii
        self.glyphs = _ASCII if ascii else _UNICODE

    def table(
        self,
        rows: Sequence[tuple[str, ...]],
        width: int,
        right: Iterable[int],
        styles: Sequence[str] = (),
    ) -> list[Text]:
        """Rows with aligned columns, the first one is dim; a style is that of a row's second column."""
        clean = [tuple(self.clean(cell) for cell in row) for row in rows]
        widths = [
            min(max(map(cell_len, column)), max(8, width // 3))
            for column in zip(*clean, strict=True)
        ]
        room = width - sum(widths[:-1]) - 2 * (len(widths) - 1)
        widths[-1] = max(1, min(max(cell_len(row[-1]) for row in clean), room))
        lines = []
        for number, row in enumerate(clean):
            line = Text(style="dim" if number == 0 else "")
            for index, cell in enumerate(row):
                cell = self.cut(cell, widths[index])
                gap = " " * (widths[index] - cell_len(cell))
                cell = gap + cell if index in right else cell + gap
                marked = number > 0 and index == 1 and styles
                line.append(cell, styles[number - 1] if marked else "")
                line.append("" if index == len(row) - 1 else "  ")
            line.truncate(width)
            line.rstrip()
            lines.append(line)
        return lines

    def rule(self, title: str, width: int) -> Text:
        """A line across with a title."""
        line = f"{self.glyphs.rule * 2} {title} "
        return Text(line + self.glyphs.rule * (width - len(line)), "dim")

    def panel(self, title: str, lines: Sequence[Text], height: int | None) -> Panel:
        """A frame with a title around lines."""
        shape = box.ASCII if self._ascii else box.ROUNDED
        return Panel(
            Group(*lines),
            title=Text(title, "bold"),
            title_align="left",
            box=shape,
            height=height,
            border_style="dim",
        )

    def line(self, text: str, width: int, style: str = "") -> Text:
        """One line, cut to the width."""
        return Text(self.cut(text, width), style)

    def cut(self, text: str, width: int, *, keep_end: bool = False) -> str:
        """`text` in at most `width` columns of the terminal; some characters take two."""
        text, more = self.clean(text), self.glyphs.more
        if cell_len(text) <= width:
            return text
        room = max(0, width - len(more))
        if not keep_end:
            return (set_cell_size(text, room) + more)[:width]
        while cell_len(text) > room:
            text = text[1:]
        return (more + text)[:width]

    def clean(self, text: str) -> str:
        """`text` without characters that steer a terminal, or that it cannot show."""
        if self._ascii:
            text = text.encode("ascii", "backslashreplace").decode()
        return "".join(each if each.isprintable() else " " for each in text)


def duration(seconds: float) -> str:
    """A duration in the two largest units that matter."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, small, smaller in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // small} {smaller}"
    return f"{whole} s"


def dollars(value: float) -> str:
    """An amount of USD, with cents while they matter."""
    return f"${value:,.2f}" if value < 1000 else f"${value:,.0f}"
