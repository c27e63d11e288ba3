"""The command `chaos`: runs that faults strike on this machine, with their final weights as judge (docs/chaos.md).

list                        the scenarios of the package, and which of them cannot be played here
run NAME|FILE ...           play some
campaign, replay SEED       random scenarios, each drawn from one number
"""

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from elastic_pt.cli.chaos_screen import ChaosScreen
from elastic_pt.cli.demo_screen import command_line, shown
from elastic_pt.cli.ending import ends_in_order
from elastic_pt.cli.options import AsJson, AsJsonList, print_json
from elastic_pt.errors import ConfigError

if TYPE_CHECKING:
    from elastic_pt.chaos.machine import Machine
    from elastic_pt.chaos.result import Result
    from elastic_pt.chaos.scenario import Scenario
    from elastic_pt.chaos.workbench import Workbench

_FAILED: Final = 1
_DEFAULT_SEED: Final = 1
_SEED_MAX: Final = 2**63 - 1

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="A new directory for runs, results and reports. Default: chaos/ and the time.",
        show_default=False,
    ),
]


def chaos() -> None:
    """Let faults strike real runs on this machine, and judge what became of them.

    The final weights are the judge: they must be those of an undisturbed run,
    bit for bit. Nothing outside this machine is touched. docs/chaos.md has
    every kind of fault, and how to write a scenario.

    Examples:
    elastic-pt chaos list
    elastic-pt chaos run --help
    """


def list_scenarios(as_json: AsJsonList = False) -> None:
    """List the scenarios, and which of them this machine cannot play.

    Examples:
    elastic-pt chaos list
    elastic-pt chaos list --json
    """
    from elastic_pt.chaos.machine import Machine
    from elastic_pt.chaos.play import needs_of
    from elastic_pt.chaos.scenario import shipped

    scenarios = shipped()
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "hypothesis": each.hypothesis,
                    "rows": list(each.rows),
                    "faults": [str(fault) for fault in each.faults],
                    "needs": sorted(needs_of(each)),
                    "quick": each.quick,
                }
                for each in scenarios
            ]
        )
        return
    machine = Machine()
    width = max((len(each.name) for each in scenarios), default=0)
    for each in scenarios:
        marks = " ".join([*each.rows, *(["quick"] if each.quick else [])])
        typer.echo(f"{each.name:<{width}}  {each.hypothesis}" + (f"  [{marks}]" if marks else ""))
        if why := machine.cannot_play(each):
            typer.echo(f"{'':<{width}}  not here: {why}")


def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|FILE...",
            help="Scenarios that `chaos list` shows, or TOML files of your own.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All scenarios of the package.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick set of the package, as in CI.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="S", min=0, max=_SEED_MAX, help="Decides all that is left to chance."
        ),
    ] = _DEFAULT_SEED,
    out: Out = None,
    as_json: AsJson = False,
) -> int:
    """Play scenarios, one after the other, and judge each run.

    Exit code 0: every oracle of every run is content. 1: one is not; the
    command that plays the run again is printed. What this machine cannot play
    is left out by name, and counts as neither.

    Examples:
    elastic-pt chaos run killed-leader
    elastic-pt chaos run my-scenario.toml --seed 7 --out chaos/mine
    elastic-pt chaos run --quick --json
    """
    from elastic_pt.chaos.machine import Machine
    from elastic_pt.chaos.scenario import load, shipped

    if every and quick:
        raise ConfigError("--all --quick: expected one of them")
    given = list(dict.fromkeys(names or []))
    found = [(each, load(each)) for each in given]
    if every or quick:
        found += [
            (each.name, each)
            for each in shipped()
            if (every or each.quick) and each.name not in given
        ]
    if not found:
        raise ConfigError("NAME|FILE: none given, expected a scenario, --quick or --all")
    named = [each.name for _, each in found]
    if twice := [each for each in named if named.count(each) > 1]:
        raise ConfigError(
            f"{twice[0]}: the name of two scenarios; expected one, as it names its results"
        )
    machine = Machine()
    left_out = [(each, why) for _, each in found if (why := machine.cannot_play(each))]
    tasks = [
        _Task(each, seed, ("run", name, "--seed", str(seed)))
        for name, each in found
        if not machine.cannot_play(each)
    ]
    if not tasks:
        told = "; ".join(f"{each.name}: {why}" for each, why in left_out)
        raise ConfigError(f"nothing can be played here: {told}")
    batch = _Batch(_new_directory(out), machine, quiet=as_json)
    for each, why in left_out:
        batch.left_out(each, why)
    with batch:
        batch.play(tasks)
    if as_json:
        print_json(batch.as_json())
    return batch.exit_code


def campaign(
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes",
            metavar="M",
            min=0.0,
            help="No run starts later than that.",
            show_default=False,
        ),
    ],
    mean_s: Annotated[
        int,
        typer.Option(
            "--mean-seconds-between-faults",
            metavar="X",
            min=1,
            max=999,
            help="Mean of the exponential gaps between faults, in whole seconds.",
        ),
    ] = 29,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="S",
            min=0,
            max=_SEED_MAX,
            help="The same number gives the same runs. Default: another campaign each time.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
) -> int:
    """Play random scenarios until the time is over: a line for each run.

    Each run has a seed of its own, from which `chaos replay` makes it again.
    The kinds of faults and the phases of a run are gone through evenly. Exit
    code 1 if a run failed; the seeds of those that failed come last.

    Examples:
    elastic-pt chaos campaign --minutes 10
    elastic-pt chaos campaign --minutes 120 --mean-seconds-between-faults 15 --seed 3
    """
    from elastic_pt.chaos.campaign import draw, seeds
    from elastic_pt.chaos.machine import Machine

    batch = _Batch(_new_directory(out), Machine(), quiet=False)
    deadline_s = time.monotonic() + 60 * minutes

    def drawn() -> Iterator[_Task]:
        for each in seeds(seed, mean_s):
            if time.monotonic() >= deadline_s:
                return
            scenario = draw(each)
            if why := batch.machine.cannot_play(scenario):
                batch.left_out(scenario, why, aloud=False)
            else:
                yield _Task(scenario, each, ("replay", str(each)))

    with batch:
        batch.play(drawn())
        if batch.omitted:
            whys = sorted({why for _, why in batch.omitted})
            batch.screen.say(f"left out: {len(batch.omitted)} drawn runs: {'; '.join(whys)}")
    return batch.exit_code


def replay(
    seed: Annotated[
        int,
        typer.Argument(metavar="SEED", help="As a campaign printed it.", show_default=False),
    ],
    out: Out = None,
    as_json: AsJson = False,
) -> int:
    """Play one run of a campaign again, from its seed alone.

    With another version of elastic-pt the same seed may be another run.

    Examples:
    elastic-pt chaos replay 123029
    """
    from elastic_pt.chaos.campaign import draw
    from elastic_pt.chaos.machine import Machine

    scenario, machine = draw(seed), Machine()
    if why := machine.cannot_play(scenario):
        raise ConfigError(f"SEED {seed} cannot be played here: {why}")
    batch = _Batch(_new_directory(out), machine, quiet=as_json)
    with batch:
        batch.play([_Task(scenario, seed, ("replay", str(seed)))])
    if as_json:
        print_json(batch.as_json())
    return batch.exit_code


@dataclass(frozen=True)
class _Task:
    """A run to play."""

    scenario: "Scenario"
    seed: int
    again: tuple[str, ...]
    """The words after `elastic-pt chaos` that play it again."""


class _Batch:
    """The runs of one command. A context manager: inside it the screen is live, at its end the reports are there."""

    def __init__(self, out: Path, machine: "Machine", *, quiet: bool) -> None:
        self.machine = machine
        self._results: list[tuple[Result, str]] = []
        """Each with the place of its report."""
        self.omitted: list[tuple[Scenario, str]] = []
        self.broken: list[str] = []
        """Runs that could not be played to their end, each as the command that plays it again."""
        self.screen = ChaosScreen(Console(highlight=False, stderr=quiet))
        self._out = out
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(ends_in_order())
        self._stack.enter_context(self.screen)

    def __exit__(self, *error: object) -> None:
        failed = [each for each, _ in self._results if not each.passed]
        self._write_index()
        if self._results:
            said = f"{len(self._results)} run{'s' * (len(self._results) > 1)}, {len(failed)} failed"
            said += f", {len(self.omitted)} left out" if self.omitted else ""
            said += f", {len(self.broken)} broken" if self.broken else ""
            self.screen.say(f"{said}; report: {shown(self._out / 'index.html')}")
        for each in failed:
            self.screen.say(f"failed: {each.replay}", "bold red")
        self._stack.close()

    @property
    def exit_code(self) -> int:
        """0 if runs were played and all passed, else 1."""
        passed = self._results and all(each.passed for each, _ in self._results)
        return 0 if passed and not self.broken else _FAILED

    def left_out(self, scenario: "Scenario", why: str, *, aloud: bool = True) -> None:
        """A scenario is not played."""
        self.omitted.append((scenario, why))
        if aloud:
            self.screen.say(f"left out  {scenario.name}: {why}", "yellow")

    def play(self, tasks: Iterable[_Task]) -> None:
        """Play and judge each, and write its report."""
        from elastic_pt.chaos.workbench import Workbench

        with Workbench(self._out / "workbench") as workbench:
            self._play_all(tasks, workbench)

    def _play_all(self, tasks: Iterable[_Task], workbench: "Workbench") -> None:
        from elastic_pt.chaos.report import write_report
        from elastic_pt.chaos.run import run_scenario

        for each in tasks:
            self.screen.begin(each.scenario, each.seed)
            place = self._out / f"{each.scenario.name}-{each.seed}"
            again = command_line(["chaos", *each.again])
            try:
                result = run_scenario(
                    workbench,
                    each.scenario,
                    each.seed,
                    place,
                    network=self.machine.networks,
                    replay=again,
                    tell=self.screen.tell,
                )
            except Exception:
                # One run that cannot be played must not hide the others.
                place.mkdir(parents=True, exist_ok=True)
                (place / "error.txt").write_text(traceback.format_exc())
                self.broken.append(again)
                self.screen.say(f"BROKEN  {again}: see {place / 'error.txt'}", "red")
                continue
            write_report(result, place / "report.html")
            self._results.append((result, f"{place.name}/report.html"))
            self.screen.end(result)

    def _write_index(self) -> None:
        from elastic_pt.chaos.report import write_index

        if self._results:
            write_index(self._results, self.omitted, self._out / "index.html")

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "passed": self.exit_code == 0,
            "runs": [each.as_json() for each, _ in self._results],
            "broken": self.broken,
            "left_out": [{"name": each.name, "why": why} for each, why in self.omitted],
            "report": str(self._out / "index.html"),
        }


def _new_directory(out: Path | None) -> Path:
    """Create `--out`, which must be new or empty. Raises `ConfigError`."""
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = Path("chaos") / now if out is None else out
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"--out {path}: exists already; expected a new or empty directory")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {path}: {error.strerror}; expected a directory that this user may write to"
        ) from error
    return path.absolute()
