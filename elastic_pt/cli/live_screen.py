"""The picture that `elastic-pt status --watch` draws: facts and a size in, a rich renderable out. Pure.

Below 110 columns or 20 rows everything is in one column; from there on nodes are beside the progress. The events take
the rows that are left. Colours are those of the terminal's palette, so light and dark ones work, and each colour stands
beside a word that says the same.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_pt.cli.loss_chart import chart, tall_chart
from elastic_pt.cli.node_rows import node_rows
from elastic_pt.cli.terminal_text import TerminalText, dollars, duration

if TYPE_CHECKING:
    from elastic_pt.report.events import Event
    from elastic_pt.report.live import Facts

_WIDE: Final = 110
_HIGH: Final = 20
_LEFT_SHARE: Final = 0.58
_NARROW_MAX: Final = 100
_EVENTS_MIN: Final = 4
_NODES_MIN: Final = 3
"""The heads of the columns, a node, and the number of the others."""
_EVENTS_OF_PIPE: Final = 8
_EVENT_LINES_MAX: Final = 3
_TITLE: Final = 10
_BAR_MIN: Final = 5
_STYLES: Final = {
    "running": "bold reverse green",
    "starting": "bold reverse yellow",
    "changing": "bold reverse cyan",
    "recovering": "bold reverse yellow",
    "paused": "bold reverse yellow",
    "new": "bold reverse cyan",
    "unknown": "bold reverse yellow",
    "down": "bold reverse red",
    "failed": "bold reverse red",
    "completed": "bold reverse green",
}
_MOODS: Final = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Size:
    """The room for a picture."""

    columns: int
    rows: int | None
    """None: as many as are needed, for a file or a pipe."""
    ascii: bool
    """Whether only ASCII characters can be shown."""


def screen(facts: "Facts", size: Size) -> RenderableType:
    """The whole picture. No line is longer than `size.columns`, and there are at most `size.rows` of them."""
    painter = _Painter(facts, size)
    if size.rows is None or size.columns < _WIDE or size.rows < _HIGH:
        return Group(*painter.narrow())
    return painter.wide()


class _Painter:
    """Makes the sections of one picture, each a list of lines."""

    def __init__(self, facts: "Facts", size: Size) -> None:
        self._facts = facts
        self._status = facts.status
        self._text = TerminalText(ascii=size.ascii)
        self._glyphs = self._text.glyphs
        self._columns = size.columns if size.rows is not None else min(size.columns, _NARROW_MAX)
        self._rows = size.rows

    def narrow(self) -> list[Text]:
        """One column, each section below a rule with its title."""
        width = self._columns
        rows = self._rows
        lines = [*self.head(width), *self.progress(width, 1)]

        def left() -> int:
            """The lines below the next title."""
            return 9**9 if rows is None else rows - len(lines) - 1

        # A title without anything below it helps nobody, so what has no room is left out.
        tiers = self.tiers(width)
        if tiers and left() >= len(tiers):
            lines += [self._text.rule("states", width), *tiers]
        if left() >= _NODES_MIN:
            most = None if rows is None else max(_NODES_MIN, left() - 1 - _EVENTS_MIN)
            lines += [self._text.rule("nodes", width), *self.nodes(width, most)]
        events = self.events(width, None if rows is None else left())
        if events and left() >= len(events):
            lines += [self._text.rule("events", width), *events]
        for line in lines:
            line.truncate(width)
        return lines if rows is None else lines[:rows]

    def wide(self) -> RenderableType:
        """Two columns of panels above the events."""
        assert self._rows is not None
        width, rows = self._columns, self._rows
        left = round(width * _LEFT_SHARE)
        head = self.head(width)
        chart_rows = max(1, min(18, rows - 28))
        progress, tiers = self.progress(left - 4, chart_rows), self.tiers(left - 4)
        upper = len(progress) + 2 + (len(tiers) + 2 if tiers else 0)
        upper = max(6, min(upper, rows - len(head) - _EVENTS_MIN - 2))
        panels = [self._text.panel("progress", progress, None if tiers else upper)]
        if tiers:
            panels.append(self._text.panel("states", tiers, upper - len(progress) - 2))
        grid = Table.grid()
        grid.add_column(width=left)
        grid.add_column(width=width - left)
        nodes = self.nodes(width - left - 4, upper - 2)
        grid.add_row(Group(*panels), self._text.panel("nodes", nodes, upper))
        height = rows - len(head) - upper
        events = self.events(width - 4, height - 2)
        return Group(*head, grid, self._text.panel("events", events, height))

    def head(self, width: int) -> list[Text]:
        """The state, the run, the time; why; what is wrong with this view."""
        facts, status = self._facts, self._status
        clock = f"{facts.now:%Y-%m-%d %H:%M:%S} UTC"
        word = self.state
        url = self._text.cut(status.url, max(8, width - len(word) - len(clock) - 8), keep_end=True)
        gap = " " * max(1, width - len(word) - 4 - cell_len(url) - len(clock))
        first = Text.assemble((f" {word.upper()} ", _STYLES[word]), "  ", (url, "bold"), gap)
        first.append(clock, "dim")
        members = status.members
        answer = sum(each.phase != "down" for each in members)
        parts = [f"generation {status.generation}", f"world size {status.world_size}"]
        if facts.started is not None and word not in ("completed", "failed"):
            parts.append(f"run began {duration((facts.now - facts.started).total_seconds())} ago")
        if word not in ("completed", "failed", "down", "new") and not facts.beats:
            parts.append(f"{answer} of {len(members)} members answer{'ed' if facts.stale else ''}")
        lines = [first, self._text.line(", ".join(parts), width)]
        if facts.stale:
            before = "running" if facts.beats else status.state
            parts = [f"last known: {before}", *([status.reason] if status.reason else [])]
            lines.append(self._text.line(": ".join(parts), width, "yellow"))
        elif facts.beats:
            unseen = "no agent answers from here, but the pulse in the bucket says that it trains"
            lines.append(self._text.line(unseen, width, "yellow"))
        elif status.reason not in ("", status.state):
            style = _STYLES[word].removeprefix("bold reverse ") if word != "running" else "dim"
            lines.append(self._text.line(status.reason + self._hint(), width, style))
        if facts.trouble or facts.stale:
            why = facts.trouble or "the bucket has not answered yet"
            lines.append(
                self._text.line(f"last read {duration(facts.age_s)} ago: {why}", width, "bold red")
            )
        lines.append(Text())
        return lines

    def _hint(self) -> str:
        match self.state:
            case "down":
                found = f"`elastic-pt run RUN_URL` resumes from step {self._status.step:,}"
            case "failed":
                found = "`elastic-pt reopen RUN_URL --why TEXT` lets it continue"
            case _:
                return ""
        return f"; {found}"

    @property
    def state(self) -> str:
        """The run's state in one word."""
        if self._facts.stale:
            return "unknown"
        if self._facts.beats:
            return "running"
        if self._status.state == "running" and self._facts.starts:
            if self._status.generation == 1:
                return "starting"
            return "changing" if self._facts.planned else "recovering"
        return str(self._status.state)

    def progress(self, width: int, chart_rows: int) -> list[Text]:
        """Step, loss, speed, goodput and cost."""
        facts, status = self._facts, self._status
        done = f"{status.step:,}" + ("" if status.steps is None else f" of {status.steps:,}")
        lines = []
        if status.steps:
            share = min(1.0, status.step / status.steps)
            tail = f"  {100 * share:.1f} %"
            eta = "" if facts.eta_s is None else duration(facts.eta_s)
            beside = eta and len(tail) + len(eta) + 6 <= width - _TITLE - len(done) - 2 - _BAR_MIN
            tail += f"  ETA {eta}" if beside else ""
            room = width - _TITLE - len(done) - 2 - len(tail)
            line = Text.assemble(f"{'step':<{_TITLE}}", (done, "bold"))
            if room >= _BAR_MIN:
                full = min(room, int(room * share))
                line.append("  ").append(self._glyphs.full * full, "green")
                line.append(self._glyphs.empty * (room - full), "dim")
            lines.append(line.append(tail))
            if eta and not beside:
                lines.append(self._text.line(f"{'ETA':<{_TITLE}}{eta}", width))
        else:
            lines.append(Text.assemble(f"{'step':<{_TITLE}}", (done, "bold")))
        loss = "not known" if status.loss is None else f"{status.loss:.4f}"
        if chart_rows == 1:
            line = Text.assemble(f"{'loss':<{_TITLE}}", (loss, "bold"), "  ")
            drawn = chart(facts.losses, width - len(line), 1, self._glyphs.levels)
            lines.append(line.append(drawn[0], "cyan") if drawn else line)
        else:
            lines.append(Text.assemble(f"{'loss':<{_TITLE}}", (loss, "bold")))
            lines += tall_chart(facts.losses, width, chart_rows, self._glyphs.levels)
        lines += self._titled("speed", self._speed(), width)
        if (account := facts.account) is not None:
            lines += self._titled(
                "goodput", [f"{100 * account.goodput:.1f} % of all node time"], width
            )
            if account.cost is not None:
                at_end = facts.projected_cost
                more = [] if at_end is None else [f"{dollars(at_end)} at the end"]
                spent = dollars(account.cost)
                spent += "" if self.state in ("completed", "failed") else " so far"
                if account.unpriced:
                    agents = "agent" if account.unpriced == 1 else "agents"
                    spent += f" ({account.unpriced} {agents} without a price)"
                lines += self._titled("cost", [spent, *more], width)
        return lines

    def _titled(self, title: str, parts: Sequence[str], width: int) -> list[Text]:
        """One line with the parts that fit into it."""
        line = f"{title:<{_TITLE}}{parts[0]}"
        for part in parts[1:]:
            if len(line) + len(part) + 2 <= width:
                line += f", {part}"
        return [self._text.line(line, width)]

    def _speed(self) -> list[str]:
        facts, status = self._facts, self._status
        parts = []
        if facts.step_s is not None:
            if facts.tokens_per_step is not None:
                parts.append(f"{facts.tokens_per_step / max(facts.step_s, 1e-9):,.0f} tokens/s")
            parts.append(f"{facts.step_s:.3g} s a step")
        if self.state in ("completed", "failed"):
            return [f"{parts[0]} at the end"] if parts else ["not known"]
        if facts.stale:
            parts = [f"before: {each}" for each in parts[:1]]
        elif not facts.trains:
            parts = ["no step is done now", *(f"before: {each}" for each in parts[:1])]
        if status.step_age_s is not None:
            known = "last known step" if facts.stale else "last step"
            parts.append(f"{known} {duration(status.step_age_s + facts.age_s)} ago")
        return parts or ["not known yet"]

    def tiers(self, width: int) -> list[Text]:
        """Step and age of each tier, and what is lost if only that tier is left."""
        status = self._status
        risks = {
            "memory": (max(0, status.step - self._tier_step("memory")), "workers fail"),
            "peer": (status.at_risk_steps.any_node, "any one node is lost"),
            "bucket": (status.at_risk_steps.all, "all nodes are lost"),
        }
        if not status.tiers:
            return (
                [self._text.line("no state is saved yet: all steps are at risk", width, "yellow")]
                if status.step
                else []
            )
        rows: list[tuple[str, ...]] = [("tier", "step", "age", "steps at risk", "if")]
        for tier in status.tiers:
            steps, event = risks[tier.name]
            age = duration(tier.age_s + self._facts.age_s)
            rows.append((tier.name, f"{tier.step:,}", age, f"{steps:,}", event))
        if self.state != "down":
            return self._text.table(rows, width, right=(1, 2, 3))
        # What was at risk is lost.
        again = max((each.step for each in self._facts.losses), default=0) - status.step
        lost = f"{again:,} step{'' if again == 1 else 's'} will be done again"
        lines = self._text.table([row[:3] for row in rows], width, right=(1, 2))
        return [*lines, self._text.line(lost, width, "yellow")] if again > 0 else lines

    def _tier_step(self, name: str) -> int:
        return next((each.step for each in self._status.tiers if each.name == name), 0)

    def nodes(self, width: int, most: int | None) -> list[Text]:
        """A line for each node. If there is no room for all, those in trouble come first."""
        found = node_rows(self._facts)
        if not found:
            return [self._text.line("no node yet", width, "dim")]
        shown = found
        if most is not None and len(found) + 1 > most:
            room = max(1, most - 2)
            ranked = sorted(
                range(len(found)), key=lambda index: (found[index][1] in ("green", "dim"), index)
            )
            chosen = sorted(ranked[:room])
            shown = [found[index] for index in chosen]
            others = Counter(found[index][0][1] for index in ranked[room:])
        heads = ("node", "phase", "slots", "zone", "copy on", "")
        used = [index for index in range(6) if index < 3 or any(row[index] for row, _ in shown)]
        rows = [heads, *(row for row, _ in shown)]
        lines = self._text.table(
            [tuple(row[index] for index in used) for row in rows],
            width,
            right=(2,),
            styles=[style for _, style in shown],
        )
        if len(shown) < len(found):
            rest = ", ".join(f"{count} {phase}" for phase, count in others.items())
            lines.append(
                self._text.line(f"and {len(found) - len(shown)} more: {rest}", width, "dim")
            )
        return lines

    def events(self, width: int, rows: int | None) -> list[Text]:
        """The newest events that fit, the newest one last."""
        events = self._facts.events
        if rows is None:
            return [line for each in events[-_EVENTS_OF_PIPE:] for line in self._event(each, width)]
        lines: list[Text] = []
        for event in reversed(events):
            told = self._event(event, width)
            if len(lines) + len(told) > rows:
                # The newest one is cut rather than left out.
                lines = lines or told[: max(0, rows)]
                break
            lines = [*told, *lines]
        return lines or [self._text.line("nothing has happened yet", width, "dim")][: max(0, rows)]

    def _event(self, event: "Event", width: int) -> list[Text]:
        today = event.time.date() == self._facts.now.date()
        when = f"{event.time:%H:%M:%S}" if today else f"{event.time:%b %d %H:%M}"
        room = max(10, width - len(when) - 2)
        parts = textwrap.wrap(self._text.clean(event.text), room) or [""]
        if any(cell_len(part) > room for part in parts):
            # Some characters take two columns.
            parts = textwrap.wrap(self._text.clean(event.text), room // 2)
        if len(parts) > _EVENT_LINES_MAX:
            last = self._text.cut(parts[_EVENT_LINES_MAX - 1] + " " * room, room)
            parts = [*parts[: _EVENT_LINES_MAX - 1], last]
        style = _MOODS[event.mood]
        heads = [when, *[" " * len(when)] * (len(parts) - 1)]
        return [
            Text.assemble((head, "dim"), "  ", (part, style))
            for head, part in zip(heads, parts, strict=True)
        ]
