"""Command `chaos live`: disturb a run on one's own cluster, within limits, and see it go on."""

import json
import random
import time
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_pt.cli.control import operator
from elastic_pt.cli.ending import ends_in_order
from elastic_pt.cli.options import AsJsonLines, RunUrl, absolute_url
from elastic_pt.errors import ConfigError

if TYPE_CHECKING:
    from elastic_pt.chaos.live import LiveKind

_TIMEOUT_S = 600.0


def live(
    run_url: RunUrl,
    kinds: Annotated[
        str,
        typer.Option(
            "--kinds",
            metavar="LIST",
            help="What may be done: pause, drain, kill. Kill only where elastic.chaos is true.",
        ),
    ] = "drain",
    count: Annotated[
        int, typer.Option("--count", min=1, max=10**6, help="How many disturbances.")
    ] = 1,
    mean: Annotated[
        float,
        typer.Option(
            "--mean-seconds-between-faults",
            metavar="SECONDS",
            min=1.0,
            max=1e6,
            help="From one recovery to the next disturbance, on average.",
        ),
    ] = 60.0,
    at_once: Annotated[
        int,
        typer.Option(
            "--nodes-at-once", min=1, max=1000, help="Nodes that each drain or kill strikes."
        ),
    ] = 1,
    pause_s: Annotated[
        float,
        typer.Option("--pause-seconds", min=0.0, max=1e6, help="How long a pause lasts."),
    ] = 10.0,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=1.0,
            max=1e6,
            help="By when the run must train again; exit code 9 after that.",
        ),
    ] = _TIMEOUT_S,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Decides what is done to whom.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before it begins.")] = False,
    as_json: AsJsonLines = False,
) -> None:
    """Disturb a run that trains on your own cluster, and see that it goes on.

    It strikes only members of this run, never more than --nodes-at-once at a
    time, never so many that fewer than elastic.nodes_min are left, and waits
    after each until the run trains again. A kill is a SIGKILL by the agent to
    itself; it needs elastic.chaos = true in the run's configuration. A drained
    or killed node comes back only if your cluster starts it anew.

    Examples:
    elastic-pt chaos live s3://bucket/run
    elastic-pt chaos live s3://bucket/run --kinds pause,drain,kill --count 20
    """
    from elastic_pt.chaos.live import choose, strike
    from elastic_pt.report.status import open_run

    wanted = _kinds(kinds)
    run = open_run(absolute_url(run_url, "RUN_URL"))
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    choices = random.Random(seed)
    for number in range(count):
        if number:
            time.sleep(choices.expovariate(1.0 / mean))
        disturbance = choose(run, wanted, at_once, choices)
        if not number and not yes:
            every = f", then {count - 1} more" if count > 1 else ""
            training = ", ".join(each.node for each in disturbance.generation.members)
            what = str(disturbance) if disturbance.members else f"pause all nodes for {pause_s:g} s"
            typer.confirm(
                f"{run.store.url} (training: {training})\n{what}{every}; drain or kill at most {at_once} at a time. Go on?",
                abort=True,
            )
        with ends_in_order():
            recovered = strike(run, disturbance, by=operator(), pause_s=pause_s, timeout_s=timeout)
        if as_json:
            told = {
                "url": run.store.url,
                "seed": seed,
                "kind": disturbance.kind,
                "nodes": [each.node for each in disturbance.members],
                "seconds": round(recovered.seconds, 3),
                "generation": recovered.generation,
                "members": list(recovered.nodes),
                "lost_steps": recovered.lost_steps,
            }
            typer.echo(json.dumps(told))
        else:
            lost = "" if recovered.lost_steps is None else f", {recovered.lost_steps} steps lost"
            typer.echo(
                f"{disturbance}: {len(recovered.nodes)} nodes train again after "
                f"{recovered.seconds:.1f} s{lost} (generation {recovered.generation})"
            )


def _kinds(text: str) -> "list[LiveKind]":
    from elastic_pt.chaos.live import LiveKind

    names = [each.strip() for each in text.split(",")]
    known = [each.value for each in LiveKind]
    for name in names:
        if name not in known:
            raise ConfigError(f"--kinds {name!r}: expected some of {', '.join(known)}")
    return [LiveKind(name) for name in names]
