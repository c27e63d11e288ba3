"""The command `data`: what a run reads, when it reads it, and whether the bytes are right. It does not need torch."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from elastic_pt.cli.data_text import (
    found_lines,
    ignored_line,
    overview_lines,
    plan_line,
    problem_line,
    row_lines,
    step_lines,
)
from elastic_pt.cli.options import (
    AsJson,
    DataUrl,
    Overrides,
    absolute_url,
    is_config_file,
    print_json,
)
from elastic_pt.errors import CheckpointError, ConfigError, StoreError

if TYPE_CHECKING:
    from elastic_pt.report.reads import Reads

STEPS_MAX: Final = 10**9
"""As that of `train.steps`: the arithmetic of a plan has 64 bits."""


def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|CONFIG",
            help="Prepared data, a run, or the TOML file of a run, begun or not.",
            show_default=False,
        ),
    ],
    show: Annotated[
        str | None,
        typer.Option(
            "--show",
            metavar="SOURCE:ROW",
            help="Print a row as text, with the borders of its tokens.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="TEXT|SHA256",
            help="Search documents by a piece of their text, or by the hash of all of it; tell which steps read them.",
            show_default=False,
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            "--step",
            metavar="N",
            min=1,
            help="List the documents that this step reads. Steps count from 1.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read every byte of the data; exit code 4 if anything is damaged."
        ),
    ] = False,
    until: Annotated[
        int | None,
        typer.Option(
            "--until",
            metavar="N",
            min=1,
            max=STEPS_MAX,
            help="Look ahead up to this step, instead of the run's last one.",
            show_default=False,
        ),
    ] = None,
    data_url: DataUrl = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run reads: its sources, how often it reads each, and which steps read which documents.

    Without an option it shows tokens and weights of each source, and the epochs
    and the mixture up to the run's present step and up to its last one. For
    prepared data, --set gives the keys of the run that would read them. --where
    reads and decodes the whole corpus, in bounded memory. docs/operations.md
    tells what that costs.

    Examples:
    elastic-pt data data/ --set data.sequence_length=16 --set train.steps=1000
    elastic-pt data runs/first
    elastic-pt data s3://bucket/run --show corpus:0
    elastic-pt data s3://bucket/run --verify
    elastic-pt data runs/first --where "a piece of the text"
    elastic-pt data runs/first --step 17 --json
    """
    chosen = [
        name
        for name, value in (("--show", show), ("--where", where), ("--step", step))
        if value is not None
    ] + ["--verify"] * verify
    if len(chosen) > 1:
        raise ConfigError(f"{' '.join(chosen)}: expected one of them")
    if where == "":
        raise ConfigError("--where '': expected a text or the SHA-256 of one")
    # The tokenizers library and the HTTP client are slow to import.
    from elastic_pt.report.reads import open_reads, reads_of_config
    from elastic_pt.report.rows import read_step, show_row

    # `Overrides` has no default of its own.
    overrides = overrides or []
    moved = None if data_url is None else absolute_url(data_url, "--data")
    if is_config_file(source):
        reads = reads_of_config(Path(source), overrides, moved)
    else:
        reads = open_reads(absolute_url(source, "URL"), overrides, moved)
    until = reads.config.train.steps if until is None else until
    if step is not None and step > until:
        raise ConfigError(
            f"--step {step}: the last step is {until}; expected one up to it, or a later --until"
        )
    if verify:
        _verify(reads, as_json)
    elif where is not None:
        _search(reads, where, until, as_json)
    elif show is not None:
        shown = show_row(reads, show)
        _print(reads, as_json, dataclasses.asdict(shown), lambda: row_lines(shown))
    elif step is not None:
        rows = list(read_step(reads, step))
        found = {"step": step, "rows": [dataclasses.asdict(row) for row in rows]}
        _print(reads, as_json, found, lambda: [plan_line(reads), *step_lines(rows)])
    else:
        _overview(reads, until, as_json)


def _print(
    reads: "Reads", as_json: bool, found: dict[str, Any], lines: Callable[[], list[str]]
) -> None:
    if as_json:
        of_all = {
            "url": reads.store.url,
            "run_url": reads.run_url,
            "fingerprint": reads.manifest.fingerprint,
            "sequence_length": reads.config.data.sequence_length,
            "order_version": reads.order_version,
        }
        print_json(of_all | found)
        return
    for line in lines():
        typer.echo(line)


def _overview(reads: "Reads", until: int, as_json: bool) -> None:
    from elastic_pt.report.mixture import ignored_rows, sources_of

    sources, ignored = sources_of(reads, until), ignored_rows(reads)
    manifest = reads.manifest
    found = {
        "schema": manifest.schema,
        "block_tokens": manifest.block_tokens,
        "vocab_size": manifest.vocab_size,
        "end_token": manifest.end_token,
        "global_batch": reads.config.train.global_batch,
        "open_tokens": reads.plan.open_tokens(reads.config.train.slots),
        "step": reads.step,
        "until": until,
        "sources": [dataclasses.asdict(each) for each in sources],
        "ignored": [dataclasses.asdict(each) for each in ignored],
    }
    lines = [*overview_lines(reads, until, sources), *map(ignored_line, ignored)]
    _print(reads, as_json, found, lambda: lines)


def _search(reads: "Reads", where: str, until: int, as_json: bool) -> None:
    from elastic_pt.report.damage import Problem
    from elastic_pt.report.search import DOCUMENTS_MAX, search

    began_s, complete = time.monotonic(), True
    documents: list[dict[str, Any]] = []
    unsearched: list[dict[str, Any]] = []

    def tell(*lines: str) -> None:
        if not as_json:
            typer.echo("\n".join(lines))

    tell(plan_line(reads))
    with _reading("search", reads) as reading:
        # Each is told when it is found: the search may take hours, and end early.
        for found in search(reads, where, until, reading.count):
            if isinstance(found, Problem):
                unsearched.append(dataclasses.asdict(found))
                tell(f"not searched: {problem_line(found)}")
            elif len(documents) == DOCUMENTS_MAX:
                complete = False
                break
            else:
                documents.append(dataclasses.asdict(found))
                tell(*found_lines(found, reads.step, until))
    took_s = time.monotonic() - began_s
    text = f"{len(documents):,} documents" if len(documents) != 1 else "1 document"
    text += "" if complete else "; there are more: expected a longer text"
    text += f"; damaged parts not searched: {len(unsearched):,}" if unsearched else ""
    text += "; the search ended early" if reading.error is not None else ""
    text += f"; read and decoded {reading.part()} of tokens in {took_s:.1f} s"
    told = {
        "wanted": where,
        "step": reads.step,
        "until": until,
        "complete": complete and not unsearched and reading.error is None,
        "read_bytes": reading.bytes,
        "seconds": round(took_s, 3),
        "documents": documents,
        "unsearched": unsearched,
    }
    _print(reads, as_json, told, lambda: [text])
    reading.end()
    if unsearched:
        raise typer.Exit(CheckpointError.exit_code)


def _verify(reads: "Reads", as_json: bool) -> None:
    from elastic_pt.report.damage import verify

    number = 0
    problems: list[dict[str, Any]] = []
    with _reading("verify", reads) as reading:
        for problem in verify(reads, reading.count):
            number += 1
            if as_json:
                problems.append(dataclasses.asdict(problem))
            else:
                typer.echo(problem_line(problem))
    found = {
        "complete": reading.error is None,
        "bytes": reads.tokens.size_bytes,
        "compared_bytes": reading.bytes,
        "problems": problems,
    }
    verdict = "1 problem" if number == 1 else f"{number:,} problems"
    if not number:
        verdict = "verified" if reading.error is None else "not verified to the end"
    _print(
        reads,
        as_json,
        found,
        lambda: [f"{verdict}: compared {reading.part()} of {reads.store.url}"],
    )
    reading.end()
    if number:
        # As `checkpoints --verify`: stored bytes are not those that were written.
        raise typer.Exit(CheckpointError.exit_code)


class _Reading:
    """How far a command has read the data, and what ended it early."""

    def __init__(self, bytes_total: int, on_progress: Callable[[int], None]) -> None:
        self.bytes = 0
        self.error: BaseException | None = None
        self._total, self._on_progress = bytes_total, on_progress

    def count(self, size: int) -> None:
        """Count bytes that have been read."""
        self.bytes += size
        self._on_progress(size)

    def part(self) -> str:
        """How much was read, for people."""
        return f"{self.bytes:,} of {self._total:,} bytes"

    def end(self) -> None:
        """Raise what ended the reading early."""
        if self.error is not None:
            raise self.error


@contextmanager
def _reading(title: str, reads: "Reads") -> Iterator[_Reading]:
    """Reads all data, with a bar of the time that is left on standard error if that is a terminal.

    What was found before an outage or Ctrl-C must not be lost, so these end the block without an error: `end` raises it.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console,
        disable=not console.is_terminal,
        transient=True,
        # Lines for a terminal go above the bar. Those for a file must not go to standard error.
        redirect_stdout=sys.stdout.isatty(),
    ) as bars:
        size = reads.tokens.size_bytes
        task = bars.add_task(f"{title} {size:,} bytes", total=size)
        reading = _Reading(size, lambda done: bars.advance(task, done))
        try:
            yield reading
        except (StoreError, KeyboardInterrupt) as error:
            reading.error = error
