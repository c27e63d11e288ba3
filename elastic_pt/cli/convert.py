"""`convert`: from the token files of other trainers to token shards."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_pt.cli.options import AsJson, absolute_url, print_json
from elastic_pt.cli.prepare import summary, summary_json, with_progress
from elastic_pt.data import HELD_OUT


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES…",
            help="PREFIX of Megatron's PREFIX.bin and PREFIX.idx, or a folder with nanoGPT's train.bin and val.bin; "
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
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="The tokenizer.json that made the ids. It also has the end token and the vocabulary's size.",
            show_default=False,
        ),
    ],
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            metavar="FRACTION",
            help="Share of documents kept for evaluation, where there is no val.bin.",
        ),
    ] = HELD_OUT,
    as_json: AsJson = False,
) -> None:
    """Turn token files of Megatron or nanoGPT into token shards, without tokenizing again.

    The ids stay as they are. A document that has no end token gets one.
    Documents of no other token are left out and counted.

    Examples:
    elastic-pt convert corpus_text_document --out data --tokenizer tokenizer.json
    elastic-pt convert web=openwebtext@0.8 code=code_text_document@0.2 --out s3://bucket/data --tokenizer tokenizer.json
    """
    from elastic_pt.data.convert import convert as convert_data
    from elastic_pt.data.sources import parse_source
    from elastic_pt.store.open import open_store

    specs = [parse_source(source) for source in sources]
    store = open_store(absolute_url(out, "--out"), patient=False)
    done = with_progress(
        ("convert",),
        store.url,
        lambda show: convert_data(
            specs, store, tokenizer_file=tokenizer, held_out=held_out, progress=show
        ),
    )
    if as_json:
        json = summary_json(done.manifest, store.url)
        print_json({**json, "end_tokens_added": done.end_tokens_added})
        return
    for line in summary(done.manifest):
        typer.echo(line)
    typer.echo(f"end tokens   added to {done.end_tokens_added:,} documents")
    typer.echo(f"wrote        {store.url}")
