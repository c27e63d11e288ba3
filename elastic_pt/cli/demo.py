"""`elastic-pt demo`: a run loses a node, another one joins, and the final weights are the same bit for bit.

    prepare ─► disturbed: three nodes,     ─► undisturbed: two nodes ─► compare: digests, held-out text,
               one killed, another joins                                plot, a continuation

Each phase has a progress bar. The runs use real agents. Their directories stay, and the demo ends with commands
to try on them. This code runs in the command line's process; each node is a separate process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from elastic_pt.cli.demo_screen import Screen, shown
from elastic_pt.config import Config, parse_config
from elastic_pt.data.prepare import prepare
from elastic_pt.data.scan import Progress
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import ConfigError, RunFailed, UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.report.artifacts import (
    Evaluation,
    Sampling,
    continue_text,
    digest_of,
    evaluate,
    open_trained,
)
from elastic_pt.report.history import read_steps
from elastic_pt.report.page.write import write_report
from elastic_pt.report.plot import GenerationSpan, StepPoint, plot_run
from elastic_pt.report.status import (
    Run,
    RunStatus,
    State,
    open_run,
    read_status,
    records,
)
from elastic_pt.runlog.identity import CONFIG_KEY
from elastic_pt.runlog.records import Generation
from elastic_pt.store.open import open_store

KILL_STEP: Final = 28
"""Early: the new node needs time to start, and has to join long before the last step."""
LOST_STEPS: Final = range(8, 18)
"""Steps from the newest checkpoint to the kill: enough to show that steps are done again."""
CORPUS_CHARACTERS: Final = 1_500_000
"""A third more than the training steps read."""
TABLE_FOLDERS: Final = ("encodings", "lib2to3", "pydoc_data")
"""Folders of generated tables, which would be a large part of such a small corpus."""
VOCABULARY: Final = 1024
HELD_OUT: Final = 0.02
PROMPT: Final = "def __init__(self"
PLOT_NAME: Final = "plot.png"
REPORT_NAME: Final = "report.html"
_TIMEOUT_S: Final = 900.0
_POLL_S: Final = 0.2
_RECOVERY_POLL_S: Final = 0.05

_CONFIG: Final = """
[run]
url = "{run}"
seed = 1
[data]
url = "{data}"
sequence_length = 128
[model]
layers = 2
width = 96
heads = 2
kv_heads = 1
[train]
steps = 300
global_batch = 12
micro_batch = 2
learning_rate = 4e-3
decay_share = 0.4
[elastic]
nodes_max = {nodes}
join_window_s = 3.0
[checkpoint]
every_steps = 20
keep = 2
[evaluation]
every_steps = 25
rows = 48
"""


@dataclass(frozen=True)
class Recovery:
    """The recovery from the loss of a node. Seconds count from the SIGKILL, on this process's clock."""

    node: str
    killed_step: int
    """Steps done when the node was killed."""
    resumed_step: int
    """Step of the checkpoint from which the others resumed."""
    first_step_s: float
    """Until the next generation had completed its first step."""
    caught_up_s: float
    """Until it had completed more steps than were done at the kill."""


@dataclass(frozen=True)
class Result:
    """The results of one finished run."""

    digest: str
    loss: float
    held_out: Evaluation
    seconds: float


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
        """The run; it must have started."""
        assert self._run is not None
        return self._run

    def watch(
        self, what: str, reached: Callable[[RunStatus], bool], poll_s: float = _POLL_S
    ) -> RunStatus:
        """Show progress until `reached(status)`; returns that status. Raises `RunFailed` or `UnexpectedError` if it cannot come."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            if self._run is None and self._store.size(CONFIG_KEY) is not None:
                self._run = open_run(self._store.url)
            if self._run is not None:
                status = read_status(self._run)
                loss = "" if status.loss is None else f"loss {status.loss:.2f}, "
                note = f"{loss}world size {status.world_size}, {self.now}"
                self._screen.progress(status.step, status.steps, note)
                if reached(status):
                    return status
                if status.state in (State.COMPLETED, State.FAILED):
                    raise RunFailed(f"the run ended ({status.reason}) before: {what}")
            failed = {node: code for node, code in self._fleet.exit_codes().items() if code}
            if failed or time.monotonic() > deadline_s:
                node = next(iter(failed), next(iter(self._fleet.exit_codes())))
                cause = f"{node} ended" if failed else f"timeout after {_TIMEOUT_S} s"
                raise UnexpectedError(f"{cause}, waiting for: {what}; {self._fleet.tail(node, 3)}")
            time.sleep(poll_s)


def run_demo(directory: Path) -> None:
    """Run the whole demo in a new numbered folder of `directory`.

    Raises `RunFailed` or `UnexpectedError` if a run does not complete, or if the two digests differ.
    """
    place, started_s = _new_folder(directory), time.monotonic()
    disturbed, undisturbed = _config(place, "disturbed", 3), _config(place, "undisturbed", 2)
    console = Console(highlight=False)
    with Screen(console) as screen:
        screen.begin("prepare", f"elastic_pt demo in {place}")
        _prepare(place, screen)
        screen.begin(
            "disturbed",
            f"1. three nodes train {disturbed.train.steps} steps; one will be killed, one will join",
        )
        recovery, disturbed_s = _train_disturbed(disturbed, place, screen)
        screen.begin("undisturbed", "2. two nodes train the same, undisturbed")
        undisturbed_s = _train_undisturbed(undisturbed, place, screen)
        screen.begin("compare", "3. both are compared")
        seconds = {"disturbed": disturbed_s, "undisturbed": undisturbed_s}
        results, text = _compare(place, seconds, screen)
    _report(console, results, recovery, text)
    screen.say(f"plot       {shown(place / 'disturbed' / PLOT_NAME)}")
    screen.say(f"report     {shown(place / 'disturbed' / REPORT_NAME)}")
    screen.say(f"total      {time.monotonic() - started_s:.0f} s")
    if results[0].digest != results[1].digest:
        raise UnexpectedError(
            f"the digests differ: {results[0].digest} with a node lost and one joined, "
            f"{results[1].digest} undisturbed; expected equal digests: this is a bug"
        )
    screen.try_next(place)


def _new_folder(directory: Path) -> Path:
    """Create the folder with the first free number in `directory`, so that no demo is overwritten."""
    number = 1
    while True:
        place = directory.resolve() / str(number)
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(
                f"--directory {directory}: {error.strerror}; expected a directory that this user may write to"
            ) from error
        else:
            return place


def _config(place: Path, run: str, nodes: int) -> Config:
    text = _CONFIG.format(run=place / run, data=place / "data", nodes=nodes)
    return parse_config(text, source="the demo's configuration")


def _prepare(place: Path, screen: Screen) -> None:
    def show(progress: Progress) -> None:
        screen.progress(progress.documents, progress.documents_total, progress.stage)

    source = standard_library_source(CORPUS_CHARACTERS)
    manifest = prepare(
        [replace(source, exclude_folders=(*source.exclude_folders, *TABLE_FOLDERS))],
        open_store(f"file://{place / 'data'}"),
        vocab_size=VOCABULARY,
        held_out=HELD_OUT,
        progress=show,
    )
    documents = sum(source.documents for source in manifest.sources)
    screen.say(
        f"   corpus: Python's standard library, {documents:,} documents, "
        f"{manifest.tokens('train'):,} tokens, vocabulary {manifest.vocab_size:,}"
    )
    screen.end("tokenizer, token shards")


def _train_disturbed(config: Config, place: Path, screen: Screen) -> tuple[Recovery, float]:
    started_s = time.monotonic()
    with Fleet(config, place / "disturbed-nodes") as fleet:
        show = Show(fleet, screen)
        for node in ("node-1", "node-2", "node-3"):
            fleet.start(node)
        show.watch("three nodes", lambda status: status.world_size == 3 and status.step > 0)
        screen.tell_live_view(place / "disturbed")
        show.now = "training"
        recovery = _lose_rank_zero(fleet, show, screen)
        show.now = "node-4 starts"
        joined = show.watch(
            "node-4 joined",
            lambda status: (
                any(each.node == "node-4" for each in status.members)
                or status.state is State.COMPLETED
            ),
        )
        if joined.state is State.COMPLETED:
            note = f"{recovery.node} lost; the run ended before node-4 had started"
        else:
            note = f"{recovery.node} lost, node-4 joined"
            screen.say(f"   generation {joined.generation}: {joined.reason}; no step is done again")
        show.now = "training"
        _end(fleet, show)
    screen.end(note)
    return recovery, time.monotonic() - started_s


def _train_undisturbed(config: Config, place: Path, screen: Screen) -> float:
    started_s = time.monotonic()
    with Fleet(config, place / "undisturbed-nodes") as fleet:
        show = Show(fleet, screen)
        for node in ("node-1", "node-2"):
            fleet.start(node)
        show.watch("the first step", lambda status: status.step > 0)
        show.now = "training"
        _end(fleet, show)
    screen.end("")
    return time.monotonic() - started_s


def _lose_rank_zero(fleet: Fleet, show: Show, screen: Screen) -> Recovery:
    """SIGKILL the node of rank 0, which proposes, commits and holds the generation's store; measure the recovery.

    Starts another node as soon as the others train again.
    """
    before = show.watch(
        f"step {KILL_STEP}, some steps after a checkpoint",
        lambda status: (
            status.step >= KILL_STEP
            and status.commit is not None
            and status.step - status.commit.step in LOST_STEPS
        ),
    )
    node = before.members[0].node
    fleet.kill(node)
    killed_s = time.monotonic()
    screen.say(f"   step {before.step}: SIGKILL to {node} (rank 0), agent and worker at once")
    show.now = f"{node} lost"

    def resumed_step() -> int:
        generation = show.run.log.view.generation
        return 0 if generation is None else generation.resume_step

    def recovered(status: RunStatus) -> bool:
        # A status may still have the step of the generation before. The record says that the new one has done its first.
        recovery = show.run.log.view.recovery
        return recovery is not None and recovery.number == status.generation > before.generation

    after = show.watch("the next generation's first step", recovered, _RECOVERY_POLL_S)
    first_step_s = time.monotonic() - killed_s
    resumed = resumed_step()
    screen.say(
        f"   generation {after.generation}: {after.reason}; resumed from step {resumed}, {first_step_s:.1f} s later"
    )
    fleet.start("node-4")
    show.now = f"steps from {resumed + 1} again"
    show.watch(
        "the steps that were lost", lambda status: status.step > before.step, _RECOVERY_POLL_S
    )
    return Recovery(node, before.step, resumed, first_step_s, time.monotonic() - killed_s)


def _end(fleet: Fleet, show: Show) -> None:
    show.watch("the end of the run", lambda status: status.state is State.COMPLETED)
    fleet.wait(_TIMEOUT_S)


def _compare(place: Path, seconds: dict[str, float], screen: Screen) -> tuple[list[Result], str]:
    """Return both results, the disturbed run's first, and a text that its model generates."""
    results, parts = [], 2 * len(seconds) + 2
    for number, (name, seconds_of) in enumerate(seconds.items()):
        run = open_run(f"file://{place / name}")
        screen.progress(2 * number, parts, f"digest of {name}")
        trained = open_trained(run, None, None)
        digest = digest_of(run, trained.chosen)
        screen.progress(2 * number + 1, parts, f"held-out text, {name}")
        held_out = evaluate(trained)
        *_, newest = read_steps(run.store, records(run))
        results.append(Result(digest, newest["loss"], held_out, seconds_of))
        if number == 0:
            first, model = run, trained.text_model()
    screen.progress(parts - 2, parts, "plot")
    plot(first, place / "disturbed" / PLOT_NAME)
    write_report(first, place / "disturbed" / REPORT_NAME, time.time())
    screen.progress(parts - 1, parts, "continuation")
    sampling = Sampling(max_tokens=120, temperature=0.5, top_k=40, seed=1)
    text = PROMPT + continue_text(model, PROMPT, sampling)
    screen.end("")
    return results, text


def plot(run: Run, path: Path) -> None:
    """Draw a run from its run directory alone."""
    points = [StepPoint(line["step"], line["loss"]) for line in read_steps(run.store, records(run))]
    generations = [
        GenerationSpan(
            body.number,
            body.resume_step,
            body.world_size,
            tuple(member.node for member in body.members),
            body.reason,
        )
        for record in records(run)
        if isinstance(body := record.body, Generation)
    ]
    plot_run(path, "A small transformer on Python's standard library", points, generations)


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
        f"                        {recovery.caught_up_s:.1f} s until they had done a new step "
        f"(steps lost: {lost_steps})",
        f"training, start to end  {disturbed.seconds:.0f} s disturbed, {undisturbed.seconds:.0f} s undisturbed",
    ]
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)
    if disturbed.digest == undisturbed.digest:
        console.print(Text("\nThe weights are equal, bit for bit.\n", "bold green"))
    console.print(Text(f"The model continues {PROMPT!r}:\n"))
    console.print(Text(text.rstrip() + "\n", "cyan"))
