"""Commands that change what a run does: `reopen`."""

import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json
from elastic_pt.errors import ConfigError

if TYPE_CHECKING:
    from elastic_pt.report.status import Run

_WHY_CHARACTERS_MAX: Final = 500
_TAKEOVER_S: Final = 3.0
_TAKEOVER_MAX_S: Final = 30.0


def reopen(
    run_url: RunUrl,
    why: Annotated[
        str,
        typer.Option(
            "--why",
            metavar="TEXT",
            help="What has changed; it is stored in the log.",
            show_default=False,
        ),
    ],
    platform: Annotated[
        bool,
        typer.Option(
            "--platform",
            help="Also accept another kind of processor, accelerator or torch from the newest checkpoint on.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run that ended without completing.

    Appends a REOPEN record: it lifts the STOP, and earlier failures no longer
    count. Then start agents as usual; they resume from the newest checkpoint
    that verifies. With --platform the next nodes may run on another platform:
    the bits are those of the old platform up to that checkpoint, and those of
    the new one after it. The log and `elastic-pt digest` show that step.
    --platform also works for a run that has not ended, once all of its agents
    have stopped.

    Examples:
    elastic-pt reopen runs/first --why "the learning rate is fixed"
    elastic-pt reopen s3://bucket/run --platform --why "only AMD nodes are left"
    """
    from elastic_pt.report.status import open_run
    from elastic_pt.runlog.log import RunView
    from elastic_pt.runlog.records import COMPLETED, Reopen

    reason = " ".join(why.split())
    if not 0 < len(reason) <= _WHY_CHARACTERS_MAX:
        raise ConfigError(f"--why {why!r}: expected 1 to {_WHY_CHARACTERS_MAX} characters of text")
    run = open_run(absolute_url(run_url, "RUN_URL"))
    view = run.log.refresh()
    if view.stop is not None and view.stop.reason == COMPLETED:
        raise ConfigError(
            f"{run.store.url}: completed at step {view.stop.step}; "
            "expected a run that ended without completing"
        )
    if view.stop is None and not platform:
        raise ConfigError(
            f"{run.store.url}: has not ended; expected a run that is failed in `elastic-pt status`, "
            "or --platform"
        )
    if view.stop is None:
        _require_abandoned(run)

    def newest_step(view: RunView) -> int:
        newest = next(run.log.usable(view), None)
        return 0 if newest is None else newest.step

    view = run.log.append(
        lambda view: Reopen(reason, platform, newest_step(view)), generation=view.generation_number
    )
    step = newest_step(view)
    if as_json:
        print_json({"url": run.store.url, "step": step, "platform": platform, "why": reason})
    else:
        typer.echo(
            f"reopened at step {step}; `elastic-pt run {run.store.url}` continues from there"
        )


def _require_abandoned(run: "Run") -> None:
    """Refuse --platform where it has no effect: with native numerics, or while agents of the old platform live.

    Such agents refuse nodes of another platform, and their next generation binds the run to their own again.
    """
    from elastic_pt.report.status import read_status

    if run.config is not None and run.config.train.numerics == "native":
        raise ConfigError(
            f"{run.store.url}: train.numerics = 'native': once its agents have stopped, the run accepts any platform; "
            "expected no --platform"
        )
    status = read_status(run)
    alive = [each.node for each in (*status.members, *status.waiting) if each.phase != "down"]
    if not alive and _pulse_moves(run):
        alive = ["agents that this machine does not reach"]
    if alive:
        raise ConfigError(
            f"--platform: {', '.join(alive)} still take part in {run.store.url}, on its platform; "
            "expected that all agents of the run have stopped"
        )


def _pulse_moves(run: "Run") -> bool:
    """Whether the pulse in the bucket changes within the takeover timeout: then a generation trains."""
    from elastic_pt.membership.pulse import Pulse

    pulse = Pulse(run.store, "")
    before = pulse.feel()
    if not before:
        return False
    takeover_s = _TAKEOVER_S if run.config is None else run.config.elastic.takeover_s
    time.sleep(min(takeover_s, _TAKEOVER_MAX_S))
    return pulse.feel() != before
