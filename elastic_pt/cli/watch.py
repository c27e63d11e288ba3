"""`elastic-pt watch`: is the run healthy? For cron jobs, probes and other eyes outside the run.

    0    healthy, or completed             one line on standard output
    1    sick                              one line for each reason on standard error
    2    cannot see: no run there, or the bucket or its credentials are away

Standard error has all that a person must know, so `> /dev/null` in a crontab mails only when something is wrong.
"""

import asyncio
import datetime
import sys
import time
import urllib.parse
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json
from elastic_pt.errors import ConfigError, ElasticPtError

if TYPE_CHECKING:
    from elastic_pt.report.health import Health, HealthFacts, HealthLimits

SICK: Final = 1
CANNOT_SEE: Final = 2
_STORE_TIMEOUT_S: Final = 30.0
_HEARTBEAT_TIMEOUT_S: Final = 10.0
_HEARTBEAT_TRIES: Final = 2


def watch(
    run_url: RunUrl,
    heartbeat_url: Annotated[
        str,
        typer.Option(
            "--heartbeat-url",
            metavar="URL",
            envvar="ELASTIC_PT_HEARTBEAT_URL",
            help="A dead-man's switch: a GET request goes there after each look at a healthy run, and only then.",
            show_default=False,
        ),
    ] = "",
    interval_s: Annotated[
        float,
        typer.Option(
            "--interval",
            metavar="SECONDS",
            min=0.0,
            max=86_400.0,
            help="Look again and again until the run has ended. 0: look once.",
        ),
    ] = 0.0,
    stall_s: Annotated[
        float,
        typer.Option(
            "--stall",
            metavar="SECONDS",
            min=0.0,
            help="So long without a new step is sick. 0: 10 slow steps, at least 300 s; longer for a start.",
        ),
    ] = 0.0,
    at_risk_steps: Annotated[
        int,
        typer.Option(
            "--at-risk",
            metavar="STEPS",
            min=0,
            help="More steps than these in no commit is sick. 0: twice checkpoint.every_steps, and none for 600 s.",
        ),
    ] = 0,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            metavar="N",
            min=1,
            help="So many restarts since the newest commit are sick if none did a new step, or if they take most of --window.",
        ),
    ] = 3,
    window_s: Annotated[
        float,
        typer.Option("--window", metavar="SECONDS", min=1.0, help="The window of --restarts."),
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Judge from outside whether a run is healthy: for cron jobs and probes.

    The exit code is 0 if it is healthy, completed, or paused by an operator, 1 if
    it is sick, and 2 if it cannot be seen. Reasons go to standard error, one a
    line: failed, down, no nodes, no new step, restarts, steps at risk, wrong clocks.

    Examples:
    elastic-pt watch s3://bucket/run
    elastic-pt watch s3://bucket/run --heartbeat-url https://hc-ping.com/UUID > /dev/null
    elastic-pt watch s3://bucket/run --interval 60 --stall 900
    """
    # The HTTP client is slow to import.
    from elastic_pt.report.health import HealthLimits

    if heartbeat_url and urllib.parse.urlsplit(heartbeat_url).scheme not in ("http", "https"):
        raise ConfigError("--heartbeat-url: expected an URL that begins with http:// or https://")
    limits = HealthLimits(stall_s, at_risk_steps, restarts, window_s)
    url = absolute_url(run_url, "RUN_URL")
    while True:
        exit_code, over = _look(url, limits, as_json)
        if exit_code == 0 and heartbeat_url:
            asyncio.run(_call(heartbeat_url))
        if over or not interval_s:
            raise typer.Exit(exit_code)
        time.sleep(interval_s)


def _look(url: str, limits: "HealthLimits", as_json: bool) -> tuple[int, bool]:
    """One verdict, told: its exit code, and whether the run has ended."""
    from elastic_pt.report.health import judge_health
    from elastic_pt.report.status import State, open_run
    from elastic_pt.report.watch import read_health

    try:
        facts = read_health(open_run(url, _STORE_TIMEOUT_S))
    except ElasticPtError as error:
        text = " ".join(str(error).split())
        if as_json:
            print_json(_entry(url, "cannot see", [{"kind": "cannot see", "text": text}], None))
        print(f"cannot see: {text}", file=sys.stderr)
        return CANNOT_SEE, False
    health = judge_health(facts, datetime.datetime.now(datetime.UTC), limits)
    _tell(url, facts, health, as_json)
    return (SICK if health.sick else 0), facts.state in (State.COMPLETED, State.FAILED)


def _tell(url: str, facts: "HealthFacts", health: "Health", as_json: bool) -> None:
    if as_json:
        reasons = [{"kind": str(each.kind), "text": each.text} for each in health.sick]
        print_json(_entry(url, "sick" if health.sick else "healthy", reasons, facts))
    elif not health.sick:
        typer.echo(f"healthy: {health.text}")
    for each in health.sick:
        print(f"sick: {each.kind}: {' '.join(each.text.split())}", file=sys.stderr)


def _entry(
    url: str, verdict: str, reasons: list[dict[str, str]], facts: "HealthFacts | None"
) -> dict[str, Any]:
    return {
        "url": url,
        "verdict": verdict,
        "reasons": reasons,
        "state": None if facts is None else str(facts.state),
        "step": None if facts is None else facts.step,
        "steps": None if facts is None else facts.steps,
        "committed_step": None if facts is None else facts.committed_step,
        "step_age_s": None if facts is None else facts.step_age_s,
        "restarts": None if facts is None else len(facts.restarts),
    }


async def _call(url: str) -> None:
    """Call the dead-man's switch. A failure is told and changes no verdict: the service itself raises the alarm."""
    import aiohttp

    trouble = ""
    timeout = aiohttp.ClientTimeout(total=_HEARTBEAT_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for _ in range(_HEARTBEAT_TRIES):
            try:
                async with session.get(url) as response:
                    if response.status < 400:
                        return
                    trouble = f"HTTP {response.status}"
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                # Only the kind: the text may have the URL, which is a secret.
                trouble = type(error).__name__
    host = urllib.parse.urlsplit(url).hostname
    print(f"the heartbeat URL at {host} could not be called: {trouble}", file=sys.stderr)
