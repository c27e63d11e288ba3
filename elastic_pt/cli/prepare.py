"""`prepare`: from a corpus to token shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_pt.cli.options import absolute_url

if TYPE_CHECKING:
    from elastic_pt.data.manifest import Manifest
    from elastic_pt.data.prepare import Progress


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
            "--out", metavar="URL", help="Where to write; an empty place.", show_default=False
        ),
    ],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", metavar="N", help="Tokens that the tokenizer learns.")
    ] = 8192,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out", metavar="FRACTION", help="Share of documents kept for evaluation."
        ),
    ] = 0.01,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="A tokenizer.json to use instead of learning one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn text into token shards: filter, drop duplicates, hold out, learn a tokenizer, tokenize.

    What cannot be used (invalid UTF-8, broken lines, empty or repeated
    documents) is left out and counted.

    \b
    [bold]Examples[/bold]
    elastic-pt prepare books/ --out data
    elastic-pt prepare web=crawl.jsonl.zst@0.8 code=src/@0.2 --out s3://bucket/data --vocab-size 32768
    elastic-pt prepare more/ --out data2 --tokenizer tokenizer.json --held-out 0.05
    """
    # Tokenizer and parquet libraries take a moment to import.
    from elastic_pt.data.documents import parse_source
    from elastic_pt.data.prepare import prepare as prepare_data
    from elastic_pt.store.open import open_store

    specs = [parse_source(source) for source in sources]
    store = open_store(absolute_url(out, "--out"), patient=False)
    with progress_bars() as show:
        manifest = prepare_data(
            specs,
            store,
            vocab_size=vocab_size,
            held_out=held_out,
            tokenizer_file=tokenizer,
            progress=show,
        )
    for line in summary(manifest):
        typer.echo(line)
    typer.echo(f"wrote        {store.url}")


@contextmanager
def progress_bars() -> Iterator[Callable[["Progress"], None]]:
    """A bar per stage on standard error, if that is a terminal; gives what moves them."""
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
        stages = {stage: bars.add_task(stage, total=None) for stage in ("scan", "learn", "encode")}

        def show(progress: "Progress") -> None:
            total = progress.documents_total
            bars.update(stages[progress.stage], completed=progress.documents, total=total)

        yield show


def summary(manifest: "Manifest") -> list[str]:
    """What was prepared, for people."""
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
