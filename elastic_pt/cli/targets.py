"""The command `targets`: the nodes of a run as scrape targets for Prometheus' file_sd. It does not need torch."""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from elastic_pt.cli.options import RunUrl, absolute_url, wait_for_run
from elastic_pt.errors import ConfigError, LogDamaged, StoreError

if TYPE_CHECKING:
    from elastic_pt.report.status import Run

log = structlog.get_logger("elastic_pt.cli.targets")


def targets(
    run_url: RunUrl,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the list to this file, in place of the one before; by default it is printed.",
            show_default=False,
        ),
    ] = None,
    follow_s: Annotated[
        float | None,
        typer.Option(
            "--follow",
            metavar="SECONDS",
            min=1.0,
            max=3600.0,
            help="With --out: write the list again after so many seconds, until this command is ended.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the nodes that are up, as scrape targets for Prometheus' file_sd.

    Any agent serves the same list at /sd of its metrics port. This command needs
    no agent with a known port, only the run's URL. A node that serves metrics on
    loopback is listed on its own machine only. docs/monitoring.md explains both.
    With --follow, it waits for a run that is not there yet, and the file stays as
    it is while the bucket does not answer.

    Examples:
    elastic-pt targets runs/first
    elastic-pt targets s3://bucket/run --out targets.json
    """
    # The HTTP client is slow to import.
    from elastic_pt.report.status import open_run

    if follow_s is not None and out is None:
        raise ConfigError("--follow: nothing is written; expected --out FILE too")
    url = absolute_url(run_url, "RUN_URL")
    run = wait_for_run(lambda: open_run(url), follow_s)
    _tell(run, out)
    while follow_s is not None:
        time.sleep(follow_s)
        try:
            _tell(run, out)
        except LogDamaged:
            raise
        except (StoreError, ConfigError) as error:
            log.warning("targets_not_told", cause=str(error))


def _tell(run: "Run", out: Path | None) -> None:
    from elastic_pt.membership.endpoints import as_targets
    from elastic_pt.report.targets import read_endpoints

    text = json.dumps(as_targets(read_endpoints(run)), indent=1)
    if out is None:
        typer.echo(text)
        return
    try:
        _replace(out, f"{text}\n")
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {error.strerror}; expected a file that this user may write to"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Replace a file at once: Prometheus must never read half a list."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        # Prometheus is another user.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
