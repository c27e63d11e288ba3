"""The demo's output: a progress bar for each phase, lines above the bars, and commands to try at the end.

Without a terminal a line every ten seconds replaces the bars.
"""

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

PHASES: Final = ("prepare", "disturbed", "undisturbed", "compare")
_LINE_INTERVAL_S: Final = 10.0


class Screen:
    """The bars of all phases and the lines above them. A context manager: inside it the bars are live."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20, pulse_style="bar.back"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            phase: self._bars.add_task(phase, start=False, total=None, note="") for phase in PHASES
        }
        self._phase = PHASES[0]
        self._line_s = float("-inf")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a permanent line above the bars."""
        self.console.print(Text(text), soft_wrap=True)

    def begin(self, phase: str, text: str) -> None:
        """Print `text` and start the clock of the next phase."""
        self._phase = phase
        self._bars.start_task(self._tasks[phase])
        self.say(text)

    def progress(self, done: int, total: int | None, note: str) -> None:
        """Update the current phase's bar."""
        self._bars.update(self._tasks[self._phase], completed=done, total=total, note=note)
        if not self.console.is_terminal and time.monotonic() - self._line_s >= _LINE_INTERVAL_S:
            self._line_s = time.monotonic()
            self.say(f"   {self._phase} {done}/{'?' if total is None else total}  {note}")

    def end(self, note: str) -> None:
        """End the current phase: fill its bar and stop its clock."""
        task = self._bars.tasks[PHASES.index(self._phase)]
        total = task.total or task.completed or 1
        self._bars.update(task.id, completed=total, total=total, note=note)
        self._bars.stop_task(task.id)

    def tell_live_view(self, run: Path) -> None:
        """Print the command that shows a run while it trains."""
        line = Text.assemble(
            "   watch it in a second terminal: ", (command_line(live_view(run)), "bold")
        )
        self.console.print(line, soft_wrap=True)

    def try_next(self, place: Path) -> None:
        """Print commands to try on what the demo left in `place`."""
        self.say("\nTry next:")
        for arguments, why in next_commands(place):
            line = Text.assemble(f"  {command_line(arguments)}", (f"   # {why}", "dim"))
            self.console.print(line, soft_wrap=True)


def next_commands(place: Path) -> list[tuple[list[str], str]]:
    """Commands, each with its purpose, that work on what a demo left in `place`."""
    run, again = shown(place / "disturbed"), shown(place / "again")
    config = shown(place / "disturbed-nodes" / "config.toml")
    return [
        (["log", run, "--explain"], "each change of the members, phase by phase"),
        (["goodput", run], "what the time was spent on, and what the failure cost"),
        (["report", run, "--out", shown(place / "report.html")], "all about the run on one page"),
        (["sync", run, "--to", f"tensorboard:{shown(place / 'tensorboard')}"], "for TensorBoard"),
        (["watch", run], "for a cron job: exit code 0 if the run is healthy or completed"),
        (["checkpoints", run, "--verify"], "read every byte of the kept checkpoints"),
        (["generate", run, "--prompt", "class "], "let the model write"),
        (["export", run, "--out", shown(place / "model")], "for Hugging Face transformers"),
        (
            ["local", config, "--nodes", "2", "--set", f"run.url={again}"],
            "train again, and kill any process",
        ),
        (["digest", again], "after that: the same digest"),
    ]


def live_view(run: Path) -> list[str]:
    """The arguments that open the live view of a run."""
    return ["status", shown(run), "--watch"]


def shown(path: Path) -> str:
    """A path as a user would type it: relative if it is below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command_line(arguments: list[str]) -> str:
    """A call of this program with these arguments, as a user can paste it."""
    return f"{_program()} {shlex.join(arguments)}"


def _program() -> str:
    """The command by which a user calls this program, quoted for a shell."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(shown(Path(sys.executable)))} -m elastic_pt"
    found = shutil.which(called.name)
    on_path = found is not None and Path(found).resolve() == called.resolve()
    return called.name if on_path else shlex.quote(shown(called.absolute()))
