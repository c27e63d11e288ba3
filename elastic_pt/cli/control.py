"""Commands that change what a run does: `reopen`."""

from typing import Annotated, Final

import typer

from elastic_pt.cli.options import RunUrl, absolute_url
from elastic_pt.errors import ConfigError

_WHY_CHARACTERS_MAX: Final = 500


def reopen(
    run_url: RunUrl,
    why: Annotated[
        str,
        typer.Option(
            "--why", metavar="TEXT", help="What has changed; the log keeps it.", show_default=False
        ),
    ],
    platform: Annotated[
        bool,
        typer.Option(
            "--platform",
            help="Also accept another kind of processor, accelerator or torch from the newest checkpoint on.",
        ),
    ] = False,
) -> None:
    """Let a run go on that has ended for another reason than completion.

    Appends a REOPEN record, which lifts the STOP and forgives the failures that
    led to it. Then start agents as usual; they go on from the newest checkpoint
    that verifies. With --platform the next nodes may be of another kind: the
    bits are then those of one platform up to that checkpoint and those of
    another one after it, and the log says where. That works for a run that has
    not ended, too, when its kind of machine is no longer to be had.

    \b
    [bold]Examples[/bold]
    elastic-pt reopen runs/first --why "the learning rate is mended"
    elastic-pt reopen s3://bucket/run --platform --why "only AMD nodes are left"
    """
    from elastic_pt.elastic.log import RunView
    from elastic_pt.elastic.records import COMPLETED, Reopen
    from elastic_pt.inspection import open_run

    reason = " ".join(why.split())
    if not 0 < len(reason) <= _WHY_CHARACTERS_MAX:
        raise ConfigError(f"--why {why!r}: expected 1 to {_WHY_CHARACTERS_MAX} characters of text")
    run = open_run(absolute_url(run_url, "RUN_URL"))
    view = run.log.refresh()
    if view.stop is not None and view.stop.reason == COMPLETED:
        raise ConfigError(
            f"{run.store.url}: completed at step {view.stop.step}; "
            "expected a run that has ended for another reason"
        )
    if view.stop is None and not platform:
        raise ConfigError(
            f"{run.store.url}: has not ended; expected a run that `elastic-pt status` calls failed, "
            "or --platform"
        )

    def make(view: RunView) -> Reopen:
        step = view.checkpoints[0].step if view.checkpoints else 0
        return Reopen(reason, platform, step)

    view = run.log.append(make, generation=view.generation_number)
    step = view.checkpoints[0].step if view.checkpoints else 0
    typer.echo(f"reopened at step {step}; `elastic-pt run {run.store.url}` goes on from there")
