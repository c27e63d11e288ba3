"""What `elastic-pt demo` shows: lose a node, take one in, end with the same weights bit for bit.

    prepare ─► three nodes, one killed, one joins ─► two nodes, undisturbed ─► digests side by side
                                     └─► plot             held-out text, continuation ◄─┘

Everything goes through the same commands and agents as a real run; only this file knows that it is a show.
Runs in the command line's process; the nodes are processes of their own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from elastic_pt.config import Config, parse_config
from elastic_pt.data.documents import standard_library_source
from elastic_pt.data.prepare import Progress as PrepareProgress
from elastic_pt.data.prepare import prepare
from elastic_pt.errors import RunFailed, UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.report.artifacts import (
    Evaluation,
    Sampling,
    choose_checkpoint,
    continue_text,
    digest_of,
    evaluate,
    open_trained,
)
from elastic_pt.report.plot import GenerationSpan, StepPoint, plot_run
from elastic_pt.report.status import (
    Run,
    RunStatus,
    State,
    open_run,
    read_history,
    read_status,
    records,
)
from elastic_pt.runlog.identity import CONFIG_KEY
from elastic_pt.runlog.records import Generation
from elastic_pt.store.open import open_store

KILL_STEP: Final = 130
LOST_STEPS: Final = range(8, 22)
"""How far beyond the newest checkpoint the node is killed: far enough to show that steps are done again."""
CORPUS_CHARACTERS: Final = 6_000_000
TABLE_FOLDERS: Final = ("encodings", "lib2to3", "pydoc_data")
"""Generated tables of characters and the like: they would fill a fifth of so small a corpus."""
VOCABULARY: Final = 1024
HELD_OUT: Final = 0.01
PROMPT: Final = "def __init__(self"
PLOT_NAME: Final = "plot.png"
_PATIENCE_S: Final = 900.0
_WATCH_S: Final = 0.2
_RECOVERY_POLL_S: Final = 0.02
_LINE_INTERVAL_S: Final = 10.0

_CONFIG: Final = """
[run]
url = "{run}"
seed = 1
[data]
url = "{data}"
sequence_length = 128
[model]
width = 128
[train]
steps = 400
global_batch = 12
micro_batch = 2
decay_share = 0.4
[elastic]
nodes_max = {nodes}
join_window_s = 3.0
[checkpoint]
every_steps = 30
keep = 2
"""


@dataclass(frozen=True)
class Recovery:
    """How the run got over the loss of a node, by this process's clock, from the SIGKILL on."""

    node: str
    killed_step: int
    """Steps that were done when it was killed."""
    resumed_step: int
    """The checkpoint that the others went on from."""
    first_step_s: float
    """Until the next generation had completed its first step."""
    caught_up_s: float
    """Until it had completed more steps than were done at the kill."""


@dataclass(frozen=True)
class Result:
    """What one finished run has to show."""

    digest: str
    loss: float
    held_out: Evaluation
    seconds: float


class Screen:
    """Tells what happens: a live line on a terminal, while `bars` is entered; plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._line_s = float("-inf")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text))

    def progress(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Where the current part is."""
        if not self.console.is_terminal:
            if time.monotonic() - self._line_s >= _LINE_INTERVAL_S:
                self._line_s = time.monotonic()
                self.say(f"  {what} {done}/{'?' if total is None else total}  {note}")
            return
        if self._task is None:
            self._task = self.bars.add_task(what, total=total, note=note)
        self.bars.update(self._task, description=what, completed=done, total=total, note=note)

    def part_done(self) -> None:
        """The current part is over; its bar goes."""
        if self._task is not None:
            self.bars.remove_task(self._task)
            self._task = None


class Show:
    """One run of the demo while it trains."""

    def __init__(self, fleet: Fleet, screen: Screen) -> None:
        self._fleet = fleet
        self._screen = screen
        self._store = open_store(fleet.config.run.url)
        self._run: Run | None = None
        self.now = "starting"

    @property
    def run(self) -> Run:
        """The run, once it has begun."""
        assert self._run is not None
        return self._run

    def watch(
        self, what: str, reached: Callable[[RunStatus], bool], poll_s: float = _WATCH_S
    ) -> RunStatus:
        """Show progress until the status is as wanted. Raises `RunFailed` or `UnexpectedError` if that becomes impossible."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            if self._run is None and self._store.size(CONFIG_KEY) is not None:
                self._run = open_run(self._store.url)
            if self._run is not None:
                status = read_status(self._run)
                loss = "" if status.loss is None else f"loss {status.loss:.3f}  "
                note = f"{loss}world size {status.world_size}  {self.now}"
                self._screen.progress("step", status.step, status.steps, note)
                if reached(status):
                    return status
                if status.state in (State.COMPLETED, State.FAILED):
                    raise RunFailed(f"the run ended ({status.reason}) before: {what}")
            failed = {node: code for node, code in self._fleet.exit_codes().items() if code}
            if failed or time.monotonic() > deadline_s:
                node = next(iter(failed), next(iter(self._fleet.exit_codes())))
                cause = f"{node} ended" if failed else f"not within {_PATIENCE_S} s"
                raise UnexpectedError(f"{cause}, waiting for: {what}; {self._fleet.tail(node, 3)}")
            time.sleep(poll_s)


def run_demo(directory: Path) -> None:
    """Run the whole demo below a new numbered folder of `directory`.

    Raises `RunFailed` or `UnexpectedError` if the two runs do not end with the same bits, or do not end at all.
    """
    place, started_s = _new_folder(directory), time.monotonic()
    screen = Screen()
    screen.say(f"elastic_pt demo in {place}")
    with screen.bars:
        _prepare(place, screen)
        disturbed = _config(place, "disturbed", 3)
        screen.say(
            f"1. three nodes train {disturbed.train.steps} steps; one will be killed, one will join"
        )
        recovery, disturbed_s = _train_disturbed(disturbed, place, screen)
        plot_path = place / "disturbed" / PLOT_NAME
        plot(open_run(disturbed.run.url), plot_path)
        undisturbed = _config(place, "undisturbed", 2)
        screen.say("2. two nodes train the same, undisturbed")
        undisturbed_s = _train_undisturbed(undisturbed, place, screen)
        results = [_result(disturbed, disturbed_s), _result(undisturbed, undisturbed_s)]
        text = _continuation(disturbed)
    _report(screen.console, results, recovery, text)
    screen.say(f"plot       {plot_path}")
    screen.say(f"total      {time.monotonic() - started_s:.0f} s")
    if results[0].digest != results[1].digest:
        raise UnexpectedError(
            f"the digests differ: {results[0].digest} with a node lost and one joined, "
            f"{results[1].digest} undisturbed; equal ones were promised, so this is a bug"
        )


def _new_folder(directory: Path) -> Path:
    """The first free number below `directory`, so that every demo starts afresh and none is overwritten."""
    number = 1
    while True:
        place = directory.resolve() / str(number)
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return place


def _config(place: Path, run: str, nodes: int) -> Config:
    text = _CONFIG.format(run=place / run, data=place / "data", nodes=nodes)
    return parse_config(text, source="the demo's configuration")


def _prepare(place: Path, screen: Screen) -> None:
    def show(progress: PrepareProgress) -> None:
        screen.progress(
            f"documents: {progress.stage}", progress.documents, progress.documents_total
        )

    source = standard_library_source(CORPUS_CHARACTERS)
    manifest = prepare(
        [replace(source, exclude_folders=(*source.exclude_folders, *TABLE_FOLDERS))],
        open_store(f"file://{place / 'data'}"),
        vocab_size=VOCABULARY,
        held_out=HELD_OUT,
        progress=show,
    )
    screen.part_done()
    documents = sum(source.documents for source in manifest.sources)
    screen.say(
        f"   corpus: Python's standard library, {documents:,} documents, "
        f"{manifest.tokens('train'):,} tokens of {manifest.vocab_size:,}"
    )


def _train_disturbed(config: Config, place: Path, screen: Screen) -> tuple[Recovery, float]:
    started_s = time.monotonic()
    with Fleet(config, place / "disturbed-nodes") as fleet:
        show = Show(fleet, screen)
        for node in ("node-1", "node-2", "node-3"):
            fleet.start(node)
        show.watch("three nodes", lambda status: status.world_size == 3 and status.step > 0)
        show.now = "training"
        recovery = _lose_rank_zero(fleet, show, screen)
        fleet.start("node-4")
        show.now = "training; node-4 is starting"
        joined = show.watch(
            "node-4 joined", lambda status: any(each.node == "node-4" for each in status.members)
        )
        screen.say(f"   generation {joined.generation}: {joined.reason}, at a step boundary")
        show.now = "training"
        _end(fleet, show, screen)
    return recovery, time.monotonic() - started_s


def _train_undisturbed(config: Config, place: Path, screen: Screen) -> float:
    started_s = time.monotonic()
    with Fleet(config, place / "undisturbed-nodes") as fleet:
        show = Show(fleet, screen)
        for node in ("node-1", "node-2"):
            fleet.start(node)
        show.watch("the first step", lambda status: status.step > 0)
        show.now = "training"
        _end(fleet, show, screen)
    return time.monotonic() - started_s


def _lose_rank_zero(fleet: Fleet, show: Show, screen: Screen) -> Recovery:
    """SIGKILL the node that leads, commits and holds the generation's store; measure how the others go on."""
    before = show.watch(
        f"step {KILL_STEP}, some steps after a checkpoint",
        lambda status: (
            status.step >= KILL_STEP
            and status.commit is not None
            and status.step - status.commit.step in LOST_STEPS
        ),
        _RECOVERY_POLL_S,
    )
    node = before.members[0].node
    fleet.kill(node)
    killed_s = time.monotonic()
    screen.say(f"   step {before.step}: SIGKILL to {node} (rank 0), agent and worker at once")
    show.now = f"{node} is gone; recovering"

    def resumed_step() -> int:
        generation = show.run.log.view.generation
        return 0 if generation is None or generation.resume is None else generation.resume.step

    # What the others still say of the old generation is at least `LOST_STEPS` beyond the checkpoint.
    after = show.watch(
        "the next generation's first step",
        lambda status: (
            status.generation > before.generation
            and 0 < status.step - resumed_step() < LOST_STEPS.start
        ),
        _RECOVERY_POLL_S,
    )
    first_step_s = time.monotonic() - killed_s
    resumed = resumed_step()
    screen.say(
        f"   generation {after.generation}: {after.reason}; on from step {resumed}, {first_step_s:.1f} s later"
    )
    show.now = f"doing steps {resumed + 1} to {before.step} again"
    show.watch(
        "the steps that were lost", lambda status: status.step > before.step, _RECOVERY_POLL_S
    )
    return Recovery(node, before.step, resumed, first_step_s, time.monotonic() - killed_s)


def _end(fleet: Fleet, show: Show, screen: Screen) -> None:
    show.watch("the end of the run", lambda status: status.state is State.COMPLETED)
    fleet.wait(_PATIENCE_S)
    screen.part_done()


def plot(run: Run, path: Path) -> None:
    """Draw a run from its URL alone."""
    points = [StepPoint(line["step"], line["loss"]) for line in read_history(run)]
    generations = [
        GenerationSpan(
            body.number,
            0 if body.resume is None else body.resume.step,
            body.world_size,
            tuple(member.node for member in body.members),
            body.reason,
        )
        for record in records(run)
        if isinstance(body := record.body, Generation)
    ]
    plot_run(path, "A small transformer on Python's standard library", points, generations)


def _result(config: Config, seconds: float) -> Result:
    run = open_run(config.run.url)
    trained = open_trained(run, None, None)
    return Result(
        digest=digest_of(run, choose_checkpoint(run, None)),
        loss=read_history(run)[-1]["loss"],
        held_out=evaluate(trained, lambda _: None),
        seconds=seconds,
    )


def _continuation(config: Config) -> str:
    trained = open_trained(open_run(config.run.url), None, None)
    sampling = Sampling(max_tokens=120, temperature=0.5, top_k=40, seed=1)
    return PROMPT + continue_text(trained.text_model(), PROMPT, sampling)


def _report(console: Console, results: list[Result], recovery: Recovery, text: str) -> None:
    disturbed, undisturbed = results
    lost_steps = recovery.killed_step - recovery.resumed_step
    lines = [
        "SHA-256 of all weights and the optimizer's state",
        f"  disturbed    {disturbed.digest}",
        f"  undisturbed  {undisturbed.digest}",
        "",
        f"loss of the last step   {disturbed.loss:.6f} and {undisturbed.loss:.6f} nats per token",
        f"held-out text           {disturbed.held_out.bits_per_byte:.6f} and "
        f"{undisturbed.held_out.bits_per_byte:.6f} bits per byte",
        f"recovery                {recovery.first_step_s:.1f} s from the SIGKILL of {recovery.node} "
        "to the first step of the others",
        f"                        {recovery.caught_up_s:.1f} s until they had done the {lost_steps} lost "
        "steps again, and the next",
        f"training, start to end  {disturbed.seconds:.0f} s disturbed, {undisturbed.seconds:.0f} s undisturbed",
    ]
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)
    if disturbed.digest == undisturbed.digest:
        console.print(Text("\nThe weights are equal, bit for bit.\n", "bold green"))
    console.print(Text(text.rstrip() + "\n", "cyan"))
