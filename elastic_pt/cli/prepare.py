"""`prepare`: from a corpus to token shards."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from elastic_pt.cli.options import INTERRUPTED, AsJson, absolute_url, print_json
from elastic_pt.data import HELD_OUT, LEFT_OUT_MAX, VOCABULARY
from elastic_pt.errors import ConfigError, StoreError

LISTED_FILES = 10
"""Lines of left-out.jsonl that the summary shows."""

if TYPE_CHECKING:
    from elastic_pt.data.manifest import Manifest
    from elastic_pt.data.scan import Progress

_Result = TypeVar("_Result")


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES…",
            help="Files, folders or URLs of .txt .md .py .jsonl(.gz|.zst) .parquet; "
            "as PATH, NAME=PATH or NAME=PATH@WEIGHT.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="URL",
            help="Empty directory to write to: a path or a URL.",
            show_default=False,
        ),
    ],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size",
            metavar="N",
            help="Tokens that the tokenizer learns.",
            show_default=str(VOCABULARY),
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out", metavar="FRACTION", help="Share of documents kept for evaluation."
        ),
    ] = HELD_OUT,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="A tokenizer.json to use instead of learning one.",
            show_default=False,
        ),
    ] = None,
    allow_left_out: Annotated[
        float,
        typer.Option(
            "--allow-left-out",
            metavar="SHARE",
            help="Share of a source's files that may be left out.",
        ),
    ] = LEFT_OUT_MAX,
    as_json: AsJson = False,
) -> None:
    """Turn text into token shards: filter, drop duplicates, hold out, learn a tokenizer, tokenize.

    Unusable input (invalid UTF-8, broken lines, empty or repeated documents,
    files of other kinds) is left out, counted, and listed in left-out.jsonl. A
    source with more left-out files than allowed is refused.

    Examples:
    elastic-pt prepare books/ --out data
    elastic-pt prepare web=crawl.jsonl.zst@0.8 code=src/@0.2 --out s3://bucket/data --vocab-size 2000
    elastic-pt prepare more/ --out data2 --tokenizer tokenizer.json --held-out 0.05
    """
    # Tokenizer and parquet libraries are slow to import.
    from elastic_pt.data.left_out import LEFT_OUT_KEY
    from elastic_pt.data.prepare import prepare as prepare_data
    from elastic_pt.data.sources import parse_source
    from elastic_pt.store.open import open_store

    if tokenizer and vocab_size is not None:
        raise ConfigError(
            f"--vocab-size {vocab_size}: expected no --vocab-size with --tokenizer, which has its own vocabulary"
        )
    specs = [parse_source(source) for source in sources]
    store = open_store(absolute_url(out, "--out"), patient=False)
    manifest = with_progress(
        ("scan", "learn", "encode"),
        store.url,
        lambda show: prepare_data(
            specs,
            store,
            vocab_size=VOCABULARY if vocab_size is None else vocab_size,
            held_out=held_out,
            tokenizer_file=tokenizer,
            allow_left_out=allow_left_out,
            progress=show,
        ),
    )
    if as_json:
        print_json(summary_json(manifest, store.url))
        return
    for line in summary(manifest):
        typer.echo(line)
    with suppress(StoreError):  # the data is prepared all the same
        for line in listed_files(store.read(LEFT_OUT_KEY), f"{store.url}/{LEFT_OUT_KEY}"):
            typer.echo(line)
    typer.echo(f"wrote        {store.url}")


def with_progress(
    stages: Sequence[str], url: str, work: Callable[[Callable[["Progress"], None]], _Result]
) -> _Result:
    """Call `work` with a function that shows its progress. Ctrl-C ends the process and tells what is at `url`."""
    from elastic_pt.data.manifest import MANIFEST_KEY

    try:
        with _progress_bars(stages) as show:
            return _in_a_thread(lambda: work(show))
    except KeyboardInterrupt:
        told = f"interrupted; the data is prepared only if {url}/{MANIFEST_KEY} exists"
        print(told, file=sys.stderr, flush=True)
        # A normal exit would wait for the compiled code in the thread.
        os._exit(INTERRUPTED)


def _in_a_thread(work: Callable[[], _Result]) -> _Result:
    """Call `work` in a thread: Python handles no signal while the main thread runs compiled code."""
    outcome: Future[_Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="work", daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a second Ctrl-C must not cut the message about the first
        raise


@contextmanager
def _progress_bars(stages: Sequence[str]) -> Iterator[Callable[["Progress"], None]]:
    """Show a bar per stage on standard error, if that is a terminal; yields the function that updates them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with ProgressBars(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {stage: bars.add_task(stage, total=None) for stage in stages}

        def show(progress: "Progress") -> None:
            total = progress.documents_total
            bars.update(tasks[progress.stage], completed=progress.documents, total=total)

        yield show


def summary_json(manifest: "Manifest", url: str) -> dict[str, Any]:
    """The summary of the prepared data, for programs."""
    from elastic_pt.data.left_out import LEFT_OUT_KEY

    return {
        "url": url,
        "fingerprint": manifest.fingerprint,
        "vocab_size": manifest.vocab_size,
        "end_token": manifest.end_token,
        "sources": [
            {
                "name": source.name,
                "weight": source.weight,
                "documents": source.documents,
                "tokens": source.tokens("train"),
                "held_out_documents": source.held_out_documents,
                "held_out_tokens": source.tokens("held_out"),
                "held_out_bytes": source.held_out_bytes,
            }
            for source in manifest.sources
        ],
        "skipped": manifest.skipped,
        "left_out_url": f"{url}/{LEFT_OUT_KEY}",
    }


def summary(manifest: "Manifest") -> list[str]:
    """The summary of the prepared data, for people."""
    lines = [
        f"source       {source.name}: {source.documents:,} documents, {source.tokens('train'):,} tokens to train on "
        f"(weight {source.weight:.4g}); {source.held_out_documents:,} documents, "
        f"{source.tokens('held_out'):,} tokens held out"
        for source in manifest.sources
    ]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    return [
        *lines,
        f"skipped      {skipped or 'nothing'}",
        f"vocabulary   {manifest.vocab_size:,} tokens; a document ends with {manifest.end_token}",
        f"fingerprint  {manifest.fingerprint}",
    ]


def listed_files(lines: bytes, url: str) -> list[str]:
    """The first lines of left-out.jsonl, for people."""
    records = [json.loads(line) for line in lines.splitlines()]
    shown = [
        f"left out     {_printable(record['file'])}: "
        + (f"{record['documents']:,} " if "documents" in record else "")
        + record["reason"]
        for record in records[:LISTED_FILES]
    ]
    if len(records) > LISTED_FILES:
        shown.append(f"left out     … {len(records) - LISTED_FILES:,} more lines in {url}")
    return shown


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]
