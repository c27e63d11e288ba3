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
    as_json: AsJson = False,
) -> None:
    """Let a run go on that has ended for another reason than completion.

    Appends a REOPEN record, which lifts the STOP and forgives the failures that
    led to it. Then start agents as usual; they go on from the newest checkpoint
    that verifies. With --platform the next nodes may be of another kind: the
    bits are then those of one platform up to that checkpoint and those of
    another one after it, and the log and `elastic-pt digest` say where. That
    works for a run that has not ended, too, once none of its agents is left.

    Examples:
    elastic-pt reopen runs/first --why "the learning rate is mended"
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
            "expected a run that has ended for another reason"
        )
    if view.stop is None and not platform:
        raise ConfigError(
            f"{run.store.url}: has not ended; expected a run that `elastic-pt status` calls failed, "
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
        typer.echo(f"reopened at step {step}; `elastic-pt run {run.store.url}` goes on from there")


def _require_abandoned(run: "Run") -> None:
    """Refuse another platform where it would have no effect: none is compared, or agents of the old one live.

    They would refuse every other node, and their next generation would bind the run to their platform again.
    """
    from elastic_pt.report.status import read_status

    if run.config is not None and run.config.train.numerics == "native":
        raise ConfigError(
            f"{run.store.url}: train.numerics = 'native', so a run without agents takes any platform; "
            "expected no --platform"
        )
    status = read_status(run)
    alive = [each.node for each in (*status.members, *status.waiting) if each.phase != "down"]
    if not alive and _pulse_moves(run):
        alive = ["agents that this machine does not reach"]
    if alive:
        raise ConfigError(
            f"--platform: {', '.join(alive)} still take part in {run.store.url}, on its platform; "
            "expected a run whose agents have all been stopped"
        )


def _pulse_moves(run: "Run") -> bool:
    """Whether the bucket shows a generation that trains, within the time after which others would take it over."""
    from elastic_pt.membership.pulse import Pulse

    pulse = Pulse(run.store, "")
    before = pulse.feel()
    if not before:
        return False
    takeover_s = _TAKEOVER_S if run.config is None else run.config.elastic.takeover_s
    time.sleep(min(takeover_s, _TAKEOVER_MAX_S))
    return pulse.feel() != before
