"""The command `report`: one HTML page about a run."""

import time
from pathlib import Path
from typing import Annotated

import typer

from elastic_pt.cli.options import RunUrl, absolute_url
from elastic_pt.errors import ConfigError


def report(
    run_url: RunUrl,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The page. An existing file is replaced.")
    ] = Path("report.html"),
) -> None:
    """Write one HTML page about a run, which opens without a network.

    It has the loss with each failure, the nodes over time, where the node time
    went, what each failure cost, checkpoints, throughput and the data mixture.
    All of it comes from the run's URL.

    Examples:
    elastic-pt report runs/first
    elastic-pt report s3://bucket/run --out report.html
    """
    if str(out) == "-":
        raise ConfigError("--out -: a page is no text for a terminal; expected a file")
    # Reading a run needs the HTTP client, which is slow to import.
    from elastic_pt.report.page.write import write_report
    from elastic_pt.report.status import open_run

    run = open_run(absolute_url(run_url, "RUN_URL"))
    size_bytes = write_report(run, out, time.time())
    typer.echo(f"{out}  {size_bytes / 1000:.0f} kB")
