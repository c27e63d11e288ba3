"""`elastic-pt local`: start a fleet, show its progress, end it.

Fleet.start × N ─► follow (status every half second) ─► STOP in the log
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from elastic_pt.cli.demo_screen import command_line, shown
from elastic_pt.config import Config
from elastic_pt.errors import ConfigError, ElasticPtError, StoreError, UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.report.status import Run, RunStatus, open_run, read_status
from elastic_pt.runlog.records import Stop
from elastic_pt.workers.scratch import make_locked, sweep

_OUTPUT_PREFIX: Final = "elastic-pt-local-"
_POLL_S: Final = 0.5
_LINE_INTERVAL_S: Final = 2.0
_END_S: Final = 10.0
_LAST_LINES: Final = 200
_ARRIVAL_S: Final = 3.0
"""Agents that start together are ready within this time of each other, even on a busy machine."""

Show = Callable[[RunStatus], None]


def train_locally(config: Config, nodes: int) -> Stop:
    """Train with `nodes` agents on this machine until they have ended; returns the log's STOP.

    Raises `ElasticPtError`, with the exit code of the first agent that failed, if the run did not end.
    """
    names = [f"node-{number}" for number in range(1, nodes + 1)]
    with _output_directory() as output:
        stop = _train(config, nodes, names, output)
        shutil.rmtree(output, ignore_errors=True)
        return stop


def live_view_of(url: str) -> str:
    """The command that shows this run while it trains, as a user would type it."""
    folder = url.removeprefix("file://")
    return command_line(["status", shown(Path(folder)) if folder != url else url, "--watch"])


@contextmanager
def _output_directory() -> Iterator[Path]:
    """The directory of the agents' output. After a failure it stays, for the user, until the next `local`."""
    base = Path(tempfile.gettempdir())
    sweep(base, _OUTPUT_PREFIX)
    try:
        output, lock = make_locked(base, _OUTPUT_PREFIX)
    except OSError as error:
        raise ConfigError(
            f"TMPDIR = {str(base)!r}: {error.strerror}; expected a writable directory"
        ) from error
    try:
        yield output
    finally:
        os.close(lock)


def _train(config: Config, nodes: int, names: list[str], output: Path) -> Stop:
    typer.echo(f"run {config.run.url}; agents write to {output}", err=True)
    typer.echo(f"watch it in a second terminal: {live_view_of(config.run.url)}", err=True)
    if nodes * max(1, config.elastic.workers_per_node) > config.train.slots:
        typer.echo(
            f"only {config.train.slots} workers have work (train.global_batch / train.micro_batch); "
            "further nodes wait as spares",
            err=True,
        )
    if nodes > config.elastic.nodes_max:
        typer.echo(
            f"elastic.nodes_max = {config.elastic.nodes_max} is raised to {nodes} for --nodes {nodes}",
            err=True,
        )
    with Fleet(fleet_config(config, nodes), output) as fleet:
        for name in names:
            fleet.start(name)
        try:
            follow(fleet, config)
            run = _opened(config)
        except (KeyboardInterrupt, SystemExit):
            shutil.rmtree(output, ignore_errors=True)
            raise
        finally:
            end(fleet)
        stop = None if run is None else run.log.view.stop
        # If every agent refused the request, it failed, even though the run was complete before.
        refused = set(fleet.exit_codes().values()) == {ConfigError.exit_code}
        if stop is None or refused:
            raise first_failure(fleet, names)
    return stop


def fleet_config(config: Config, nodes: int) -> Config:
    """The configuration with which all nodes join the first generation."""
    elastic = config.elastic.model_copy(
        update={
            "nodes_max": max(config.elastic.nodes_max, nodes),
            "join_window_s": max(config.elastic.join_window_s, _ARRIVAL_S if nodes > 1 else 0.0),
        }
    )
    return config.model_copy(update={"elastic": elastic})


def follow(fleet: Fleet, config: Config) -> None:
    """Show the run's progress until all agents have ended."""
    console = Console(stderr=True)
    display, show = _live(console, config) if console.is_terminal else (nullcontext(), _lines())
    run: Run | None = None
    told: set[str] = set()
    with display:
        while True:
            running = fleet.running()
            for name, code in fleet.exit_codes().items():
                if code and name not in told:
                    told.add(name)
                    console.print(f"{name} ended: {why_ended(fleet, name)}", markup=False)
            run = run or _opened(config)
            if run is not None:
                # Training goes on while the bucket cannot be read.
                with suppress(StoreError):
                    show(read_status(run))
            if not running:
                return
            time.sleep(_POLL_S)


def _opened(config: Config) -> Run | None:
    try:
        return open_run(config.run.url)
    except ElasticPtError:
        return None


def end(fleet: Fleet) -> None:
    """Send SIGTERM to the running agents and wait for `_END_S`. The fleet kills the rest."""
    for name in fleet.running():
        os.kill(fleet.pid(name), signal.SIGTERM)
    deadline_s = time.monotonic() + _END_S
    while fleet.running() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def first_failure(fleet: Fleet, names: list[str]) -> ElasticPtError:
    """The error of the first failed agent, with its exit code."""
    codes = fleet.exit_codes()
    failed = [name for name in names if codes.get(name)]
    name = failed[0] if failed else names[0]
    code = codes.get(name)
    what = "refused" if code == ConfigError.exit_code else "the run did not end"
    error = ElasticPtError(f"{what}; {name}: {why_ended(fleet, name)}")
    # An agent that a signal ended, or that left in good order, has no error code.
    error.exit_code = code if code is not None and code > 0 else UnexpectedError.exit_code
    return error


def why_ended(fleet: Fleet, name: str) -> str:
    """The signal that killed an agent, or else the last error in its output, or else its exit code."""
    code = fleet.exit_codes().get(name)
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    lines = fleet.tail(name, lines=_LAST_LINES).splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"exit code {code}, without an error in its output"


def describe(status: RunStatus) -> str:
    """State, loss and members as one short text."""
    members = ", ".join(member.node for member in status.members if member.phase != "down")
    loss = "" if status.loss is None else f"  loss {status.loss:.4f}"
    commit = "" if status.commit is None else f"  committed {status.commit.step}"
    world = f"  generation {status.generation}  world {status.world_size}"
    return f"{status.state}{loss}{world}{commit}  {members}"


def _live(console: Console, config: Config) -> tuple[AbstractContextManager[object], Show]:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task("starting", total=config.train.steps)

    def show(status: RunStatus) -> None:
        bar.update(task, completed=status.step, description=describe(status))

    return bar, show


def _lines() -> Show:
    """Show a line when the state or the membership changes, and every two seconds while steps are done."""
    last: tuple[object, ...] = ()
    last_step, last_s = -1, float("-inf")

    def show(status: RunStatus) -> None:
        nonlocal last, last_step, last_s
        now_s = time.monotonic()
        current = (
            status.state,
            status.generation,
            tuple(each.phase == "down" for each in status.members),
        )
        due = status.step != last_step and now_s - last_s >= _LINE_INTERVAL_S
        if current != last or due:
            last, last_step, last_s = current, status.step, now_s
            typer.echo(f"step {status.step}/{status.steps}  {describe(status)}", err=True)

    return show
