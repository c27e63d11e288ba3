"""Commands that change what a run does: `checkpoint`, `pause`, `resume`, `drain`, `stop`, `reopen`.

The first five append a CONTROL record to the run's log (`runlog.control`), which its agents obey at a step boundary.
"""

import getpass
import os
import platform as machine
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

import structlog
import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json
from elastic_pt.errors import ConfigError, LogDamaged, NotDone, StoreError
from elastic_pt.telemetry.redaction import Redactor, secrets_in

if TYPE_CHECKING:
    from elastic_pt.report.status import Run
    from elastic_pt.runlog.log import RunView
    from elastic_pt.runlog.records import Request, Verb

_WHY_CHARACTERS_MAX: Final = 500
_TAKEOVER_S: Final = 3.0
_TAKEOVER_MAX_S: Final = 30.0
_POLL_S: Final = 0.3

log = structlog.get_logger("elastic_pt.cli")

Wait = Annotated[
    bool, typer.Option("--wait", help="Return when it is done, not when it is recorded.")
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.0,
        max=1e6,
        help="How long --wait may take; exit code 9 after that, and the request still holds.",
    ),
]


def checkpoint(
    run_url: RunUrl, wait: Wait = False, timeout: Timeout = 600.0, as_json: AsJson = False
) -> None:
    """Have a run commit a checkpoint now, and train on.

    The agents notice the request within two seconds and checkpoint after the
    step that they do then, or once the checkpoint before is uploaded. Agents
    that start later do so after their first step.

    Examples:
    elastic-pt checkpoint runs/live
    elastic-pt checkpoint s3://bucket/live --json
    """
    from elastic_pt.runlog.records import Verb

    _steer(run_url, Verb.CHECKPOINT, wait_s=timeout if wait else None, as_json=as_json)


def pause(
    run_url: RunUrl,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why; the log and `status` tell it.")
    ] = "",
    wait: Wait = False,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Have a run commit a checkpoint and train no more until `resume`.

    The agents stay, without workers, and go on at once after `resume`. Agents
    that start meanwhile wait as well.

    Examples:
    elastic-pt pause runs/live --reason "the cluster is needed until noon"
    elastic-pt pause s3://bucket/live --json
    """
    from elastic_pt.runlog.records import Verb

    wait_s = timeout if wait else None
    _steer(run_url, Verb.PAUSE, why=reason, wait_s=wait_s, as_json=as_json)


def resume(
    run_url: RunUrl, wait: Wait = False, timeout: Timeout = 600.0, as_json: AsJson = False
) -> None:
    """Let a run go on that was paused. With --wait, return after its first step.

    Examples:
    elastic-pt resume runs/live
    elastic-pt resume s3://bucket/live --json
    """
    from elastic_pt.runlog.records import Verb

    _steer(run_url, Verb.RESUME, wait_s=timeout if wait else None, as_json=as_json)


def drain(
    run_url: RunUrl,
    node: Annotated[
        str,
        typer.Option(
            "--node", metavar="NAME", help="The node, as `status` names it.", show_default=False
        ),
    ],
    deadline: Annotated[
        float,
        typer.Option(
            "--deadline",
            metavar="SECONDS",
            min=0.0,
            max=1e6,
            help="How long the node may take; 0 is its elastic.leave_timeout_s.",
        ),
    ] = 0.0,
    wait: Wait = False,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Have one node leave in good order, as with SIGTERM: its agent ends with 0.

    All workers stop after the same step, that step is committed, and the other
    nodes go on. The request holds until an agent of that name has left; the
    next one may join.

    Examples:
    elastic-pt drain runs/live --node node-2
    elastic-pt drain s3://bucket/live --node node-2 --deadline 30
    """
    from elastic_pt.runlog.records import Verb

    if not node.strip() or len(node) > _WHY_CHARACTERS_MAX:
        raise ConfigError(f"--node {node!r}: expected the name of a node")
    _steer(
        run_url,
        Verb.DRAIN,
        node=node,
        seconds=deadline,
        wait_s=timeout if wait else None,
        as_json=as_json,
    )


def stop(
    run_url: RunUrl,
    reason: Annotated[
        str,
        typer.Option(
            "--reason",
            metavar="TEXT",
            help="Why; the log and `status` tell it.",
            show_default=False,
        ),
    ],
    wait: Wait = False,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Have a run commit a checkpoint and end. `reopen` lifts that.

    All agents end with exit code 7. Without agents, the next one that starts
    ends the run instead of training.

    Examples:
    elastic-pt stop runs/live --reason "the loss is too high"
    elastic-pt stop s3://bucket/live --reason "out of budget" --json
    """
    from elastic_pt.runlog.records import Verb

    if not reason.strip():
        raise ConfigError(f"--reason {reason!r}: expected some text")
    wait_s = timeout if wait else None
    _steer(run_url, Verb.STOP, why=reason, wait_s=wait_s, as_json=as_json)


def _steer(
    run_url: str,
    verb: "Verb",
    *,
    why: str = "",
    node: str = "",
    seconds: float = 0.0,
    wait_s: float | None,
    as_json: bool,
) -> None:
    """Record a request, and wait `wait_s` until it is carried out (None: do not wait)."""
    from elastic_pt.report.status import open_run
    from elastic_pt.runlog.control import ask, is_done
    from elastic_pt.runlog.records import Control, Request

    reason = _words("--reason", why)
    run = open_run(absolute_url(run_url, "RUN_URL"))
    _require_steerable(run, verb)
    request = Request(verb, by=operator(), why=reason, node=node, seconds=seconds)
    made: list[tuple[RunView, Control]] = []

    def make(view: "RunView") -> Control:
        made[:] = [(view, ask(view, request))]
        return made[0][1]

    view = run.log.append(make, generation=run.log.view.generation_number)
    before, request = made[0][0], made[0][1].request
    done = False
    if wait_s is not None:
        view = _await(run, lambda view: is_done(view, request, before), wait_s, request)
        done = True
    ended = None if view.stop is None else view.stop.reason
    step = view.checkpoints[0].step if view.checkpoints else 0
    if as_json:
        fields = {name: getattr(request, name) for name in ("verb", "node", "by", "why", "index")}
        print_json({"url": run.store.url, **fields, "done": done, "step": step, "ended": ended})
    elif ended is not None:
        typer.echo(f"the run has ended at step {step}: {ended}")
    elif done:
        typer.echo(f"done: {request}; step {step} is committed")
    else:
        typer.echo(f"recorded: {request}; `elastic-pt status {run.store.url}` shows what follows")


def _words(option: str, text: str) -> str:
    """What an operator wrote, in one line and without secrets: all readers of the run see it, and it stays in the log."""
    words = Redactor(secrets_in(os.environ)).text(" ".join(text.split()))
    if len(words) > _WHY_CHARACTERS_MAX:
        raise ConfigError(
            f"{option} {text!r}: expected at most {_WHY_CHARACTERS_MAX} characters of text"
        )
    return words


def _require_steerable(run: "Run", verb: "Verb") -> None:
    from elastic_pt.runlog.records import Verb

    view = run.log.view
    if view.stop is not None:
        raise ConfigError(
            f"{run.store.url}: has ended: {view.stop.reason}; expected a run that has not"
        )
    if run.config is None and verb in (Verb.CHECKPOINT, Verb.DRAIN):
        raise ConfigError(
            f"{run.store.url}: a run of stock torchrun, which has no {verb}; "
            "expected pause, resume or stop"
        )


def operator() -> str:
    """Who gives the command, for people: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return ascii(f"{user}@{machine.node()}")[1:-1][:_WHY_CHARACTERS_MAX]


def _await(
    run: "Run", done: "Callable[[RunView], bool]", timeout_s: float, request: "Request"
) -> "RunView":
    """The first view of the log in which it is done. Raises `NotDone` after the timeout, also if the bucket is away."""
    give_up_at_s = time.monotonic() + timeout_s
    while True:
        try:
            if done(view := run.log.refresh()):
                return view
        except LogDamaged:
            raise
        except StoreError as error:
            log.warning("log_not_read", cause=str(error))
        left_s = give_up_at_s - time.monotonic()
        if left_s <= 0:
            raise NotDone(
                f"{run.store.url}: {request}: recorded, but not done within {timeout_s:g} s (--timeout); "
                "expected an agent to do it; it still holds"
            )
        time.sleep(min(_POLL_S, left_s))


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

    reason = _words("--why", why)
    if not reason:
        raise ConfigError(f"--why {why!r}: expected some text")
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
