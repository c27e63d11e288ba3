"""What `elastic-pt chaos` shows while a run is disturbed: a picture on a terminal, else a line for all that happens.

    tell(Happening) ─► RunPicture ─► lines of text      pure
                       ChaosScreen ─► terminal          four times a second, by a thread of rich

Colours are those of the terminal's palette, and each stands beside a word that says the same.
"""

import os
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from elastic_pt.cli.live import shows_only_ascii
from elastic_pt.cli.terminal_text import TerminalText, duration

if TYPE_CHECKING:
    from elastic_pt.chaos.play import Happening
    from elastic_pt.chaos.result import Result
    from elastic_pt.chaos.scenario import Scenario

_EVENTS_MIN: Final = 3
_FAULTS_MAX: Final = 8
_WIDTH_MAX: Final = 120
_REFRESHES_PER_S: Final = 4.0
_STYLES: Final = {"training": "green", "starting": "yellow", "waiting": "yellow", "ended": "red"}
_WHAT: Final = {
    "fault": "bold red",
    "healed": "green",
    "started": "cyan",
    "ended": "red",
    "generation": "cyan",
    "stop": "green",
    "failed": "bold red",
}


class RunPicture:
    """One run that is disturbed, as far as it has been heard of."""

    def __init__(self, scenario: "Scenario", seed: int, *, ascii: bool) -> None:
        self._scenario = scenario
        self._seed = seed
        self._text = TerminalText(ascii=ascii)
        self._states = {f"node-{number}": "starting" for number in range(scenario.nodes)}
        self._details: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._holding: dict[int, tuple[str, ...]] = {}
        """Numbers of the faults that last, with their nodes."""
        self._struck: dict[int, Happening] = {}
        self._healed: dict[int, float] = {}
        self._happenings: list[Happening] = []
        self._generation = 0
        self._step = 0
        self._preparing = True

    def hear(self, happening: "Happening") -> None:
        """Note what has happened."""
        # A partly noted happening is harmless: the thread that draws shows it a moment later.
        nodes = tuple(each for each in happening.node.split("+") if each)
        if happening.what == "reference":
            return
        self._preparing = False
        match happening.what:
            case "step":
                self._step = happening.number
                return
            case "fault":
                self._struck[happening.number] = happening
                if self._scenario.faults[happening.number - 1].for_s is not None:
                    self._holding[happening.number] = nodes
            case "healed":
                self._healed[happening.number] = happening.at_s
                self._holding.pop(happening.number, None)
            case "started":
                self._become(nodes, "starting")
            case "ended":
                self._become(nodes, "ended")
                self._details |= dict.fromkeys(nodes, happening.text)
            case "generation":
                self._generation = happening.number
                self._become(
                    [node for node, state in self._states.items() if state == "training"], "waiting"
                )
                self._become(happening.members, "training")
                self._generations |= dict.fromkeys(happening.members, happening.number)
        self._happenings.append(happening)

    def _become(self, nodes: Sequence[str], state: str) -> None:
        for node in nodes:
            self._states[node] = state
            self._details.pop(node, None)

    def lines(self, width: int, rows: int, elapsed_s: float) -> list[Text]:
        """The picture: none of its lines is longer than `width`, and there are at most `rows`."""
        head = self._head(width, elapsed_s)
        if self._preparing:
            return head[:rows]
        nodes, faults = self._nodes(width), self._faults(width)
        if len(faults) > _FAULTS_MAX:
            more = f"and {len(faults) - _FAULTS_MAX + 1} more faults"
            faults = [*faults[: _FAULTS_MAX - 1], self._text.line(more, width, "dim")]
        lines = [*head, self._text.rule("nodes", width), *nodes]
        if faults:
            lines += [self._text.rule("faults", width), *faults]
        room = rows - len(lines) - 1
        if room >= _EVENTS_MIN and self._happenings:
            newest = self._happenings[-room:]
            lines += [self._text.rule("events", width), *(self._event(e, width) for e in newest)]
        return lines[:rows]

    def _head(self, width: int, elapsed_s: float) -> list[Text]:
        scenario = self._scenario
        workers = (
            f"{scenario.workers_per_node} worker{'s' * (scenario.workers_per_node > 1)} per node"
        )
        first, *rest = textwrap.wrap(scenario.hypothesis, width)
        told = (
            f"first its data and the undisturbed run that judges it: {duration(elapsed_s)}"
            if self._preparing
            else f"step {self._step} of {scenario.steps}  generation {self._generation}  "
            f"{duration(elapsed_s)} of at most {duration(scenario.longest_s)}"
        )
        title = f"{scenario.with_seed(self._seed)}  {scenario.store}, {workers}"
        return [
            self._text.line(title, width, "bold"),
            self._text.line(first, width, "dim"),
            *([self._text.line(" ".join(rest), width, "dim")] if rest else []),
            self._text.line(told, width),
        ]

    def _nodes(self, width: int) -> list[Text]:
        rows: list[tuple[str, ...]] = [("node", "state", "generation", "fault")]
        styles = []
        for node in sorted(self._states, key=lambda name: (len(name), name)):
            state = self._states[node]
            under = [
                self._scenario.faults[number - 1].kind
                for number, nodes in self._holding.items()
                if node in nodes
            ]
            detail = self._details.get(node, "")
            shown = f"{state}: {detail}" if detail else state
            rows.append((node, shown, str(self._generations.get(node, "")), " ".join(under)))
            styles.append(_STYLES[state])
        return self._text.table(rows, width, right=(2,), styles=styles)

    def _faults(self, width: int) -> list[Text]:
        lines = []
        for number, fault in enumerate(self._scenario.faults, start=1):
            struck = self._struck.get(number)
            if struck is None:
                lines.append(self._text.line(f"{number:>2}  {'waits':<13}  {fault}", width, "dim"))
                continue
            over = f"-{self._healed[number]:.1f}" if number in self._healed else ""
            when = f"{struck.at_s:.1f}{over} s"
            text = f"{number:>2}  {when:<13}  {fault}"
            text += f"; struck {struck.node}" if struck.node else ""
            style = "yellow" if number in self._holding else ""
            lines.append(self._text.line(text, width, style))
        return lines

    def _event(self, happening: "Happening", width: int) -> Text:
        return self._text.line(line_of(happening), width, _WHAT.get(happening.what, ""))


def line_of(happening: "Happening") -> str:
    """One line about what has happened, for a picture, a file or a pipe."""
    node = f"{happening.node} " if happening.node else ""
    return f"{happening.at_s:>6.1f} s  {happening.what:<10}  {node}{happening.text}"


class ChaosScreen:
    """Shows one run after the other; what is said stays above the picture. A context manager."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._ascii = shows_only_ascii(os.environ, console)
        self._picture: RunPicture | None = None
        self._begun_s = 0.0
        self._live = Live(
            console=console,
            get_renderable=self.picture,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str, style: str = "", *, wrap: bool = False) -> None:
        """A line that stays. `wrap`: a terminal may get it as several lines; a command to copy must stay one."""
        self._console.print(
            Text(TerminalText(ascii=self._ascii).clean(text), style),
            soft_wrap=not (wrap and self._console.is_terminal),
        )

    def begin(self, scenario: "Scenario", seed: int) -> None:
        """The next run starts."""
        self._begun_s = self._clock()
        self._picture = RunPicture(scenario, seed, ascii=self._ascii)
        if not self._console.is_terminal:
            self.say(f"{scenario.with_seed(seed)}: {scenario.hypothesis}")

    def tell(self, happening: "Happening") -> None:
        """Something has happened in this run."""
        assert self._picture is not None
        if happening.what != "reference":
            self._begun_s = self._clock() - happening.at_s
        self._picture.hear(happening)
        if not self._console.is_terminal and happening.what != "step":
            self.say(line_of(happening))
            self._console.file.flush()

    def end(self, result: "Result") -> None:
        """The run is over and judged: one line, and one more for each oracle that is not content."""
        self._picture = None
        self.say(summary(result), "green" if result.passed else "bold red", wrap=True)
        for verdict in result.verdicts:
            if not verdict.passed:
                self.say(f"        {verdict.oracle}: {verdict.told}", "red", wrap=True)
        if not result.passed:
            self.say(f"        replay: {result.replay}", "bold")

    def picture(self) -> RenderableType:
        """What a terminal shows now."""
        if self._picture is None:
            return Text()
        size = self._console.size
        width = min(size.width, _WIDTH_MAX) - 1
        elapsed_s = self._clock() - self._begun_s
        return Group(*self._picture.lines(width, size.height - 2, elapsed_s))


def summary(result: "Result") -> str:
    """One line about a run: verdict, faults, and what they cost at most."""
    played = result.played
    word = "passed" if result.passed else "FAILED"
    kinds = ", ".join(each.spec.kind for each in played.struck) or "no fault struck"
    title = played.scenario.with_seed(played.seed)
    told = f"{word}  {title}  {played.seconds:.1f} s  {kinds}"
    recoveries = [each.recovery_s for each in result.costs if each.recovery_s is not None]
    lost = [each.lost_steps for each in result.costs if each.lost_steps is not None]
    told += f"; recovered within {max(recoveries):.1f} s" if recoveries else ""
    return told + (f", {sum(lost)} steps lost" if lost else "")
