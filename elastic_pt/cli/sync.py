"""`sync`: copy a run's committed steps to TensorBoard, a JSONL file or Weights & Biases."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Annotated, Final

import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json, wait_for_run
from elastic_pt.errors import LogDamaged, StoreError

POLL_INTERVAL_S: Final = 2.0


def sync(
    run_url: RunUrl,
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="SINK",
            help="tensorboard:DIR, jsonl:FILE or wandb:PROJECT. May be given several times.",
        ),
    ],
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Wait for the run if it is not there yet, and go on until it has ended. Ctrl-C ends it sooner.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a run's committed steps to TensorBoard, a JSONL file or Weights & Biases.

    It reads the bucket only, so training does not notice it. Call it as often as you
    like, also after a kill: each step is written once. A sink belongs to one run.
    W&B needs the extra `wandb` and a login (docs/operations.md).

    Examples:
    elastic-pt sync runs/first --to tensorboard:tb/first
    elastic-pt sync s3://bucket/run --to tensorboard:tb/run --to jsonl:steps.jsonl --follow
    """
    # The HTTP client and TensorBoard are slow to import.
    from elastic_pt.report.sinks.sync import Copy, check_name, open_sink
    from elastic_pt.report.status import open_run

    for name in to:
        check_name(name)
    url = absolute_url(run_url, "RUN_URL")
    run = wait_for_run(lambda: open_run(url), POLL_INTERVAL_S if follow else None)
    poll = _Poll()
    while follow and run.log.view.head is None:
        poll(run.log.refresh)
    with ExitStack() as stack:
        run_id = run.log.view.run_id
        # Before its first record a run has no id, and no step.
        names = to if run_id else []
        sinks = [stack.enter_context(closing(open_sink(name, run_id))) for name in names]
        copy = Copy(run, sinks, lambda text: typer.echo(f"warning: {text}", err=True))
        copy()
        if follow and copy.end is None:
            step = min(each.position.step for each in sinks)
            text = f"copied up to step {step}; follows the run until it has ended"
            typer.echo(text, err=True)
        while follow and copy.end is None:
            poll(copy)
        if as_json:
            written = [
                {"name": each.name, "steps": copy.steps[each.name], "step": each.position.step}
                for each in sinks
            ]
            ended = None if copy.end is None else copy.end.reason
            print_json({"url": run.store.url, "run_id": run_id, "ended": ended, "sinks": written})
            return
        for sink in sinks:
            newest = f"up to step {sink.position.step}" if sink.position.step else "none yet"
            typer.echo(f"{sink.name}: {copy.steps[sink.name]} steps written, {newest}")
    if not names:
        typer.echo("the run has not begun: no step is committed yet")
    if copy.end is not None:
        typer.echo(f"the run has ended: {copy.end.reason} at step {copy.end.step}")


class _Poll:
    """Waits, and tries again. A store that fails for a while ends nothing: one warning, and the next poll."""

    def __init__(self) -> None:
        self._fails = False

    def __call__(self, action: Callable[[], object]) -> None:
        time.sleep(POLL_INTERVAL_S)
        try:
            action()
            self._fails = False
        except LogDamaged:
            raise
        except StoreError as error:
            if not self._fails:
                warning = f"warning: {error}; tried again every {POLL_INTERVAL_S:g} s"
                typer.echo(warning, err=True)
            self._fails = True
