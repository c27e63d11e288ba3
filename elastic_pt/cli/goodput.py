"""The command `goodput`: what the node-seconds of a run were spent on, and what each failure cost."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json

if TYPE_CHECKING:
    from elastic_pt.report.goodput import FailureCost, Goodput

_MINUTE_S: Final = 60.0
_HOUR_S: Final = 3600.0


def goodput(run_url: RunUrl, as_json: AsJson = False) -> None:
    """Show what the node-seconds of a run were spent on, and what each failure cost.

    Each second from the start of an agent's process to its end counts in one
    bucket, over all restarts. Goodput is the share of new steps. With
    telemetry.price_per_hour it also shows USD.

    Examples:
    elastic-pt goodput runs/first
    elastic-pt goodput s3://bucket/run --json | jq .goodput
    """
    # Reading a run needs the HTTP client, which is slow to import.
    from elastic_pt.report.goodput import read_goodput
    from elastic_pt.report.status import open_run

    run = open_run(absolute_url(run_url, "RUN_URL"))
    found = read_goodput(run, list(run.log.records()))
    if as_json:
        print_json(goodput_as_json(found))
        return
    for line in goodput_lines(found):
        typer.echo(line)


def goodput_as_json(found: "Goodput") -> dict[str, Any]:
    """A goodput for programs: its fields, numbers rounded to six digits after the point."""
    stored: dict[str, Any] = _rounded(dataclasses.asdict(found))
    return stored


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 6)
        case Mapping():
            return {str(key): _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
    return value


def goodput_lines(found: "Goodput") -> list[str]:
    """A goodput for people: the buckets with time in them, and each failure."""
    if found.goodput is None:
        return [
            "no agent of this run has left an account of its time: "
            "its agents are of an earlier version, or torchrun's"
        ]
    run_s, priced = found.node_seconds, found.cost is not None
    running = sum(agent.running for agent in found.agents)
    agents = f"{len(found.agents)} agent{'' if len(found.agents) == 1 else 's'}"
    lines = [
        f"goodput     {100 * found.goodput:.1f} %",
        f"node time   {_duration(run_s)}, {agents}, {running} of them running",
    ]
    if found.cost is not None:
        priced_of = (
            f", of {len(found.agents) - found.unpriced} of {agents}: the others have no price"
        )
        lines.append(f"cost        {found.cost:.2f} USD{priced_of if found.unpriced else ''}")
    lines.append("")
    for bucket, seconds in sorted(found.buckets.items(), key=lambda each: -each[1]):
        if seconds > 0.0:
            price = f"{found.cost_of(bucket):>12.2f} USD" if priced else ""
            share = 100 * seconds / run_s if run_s else 0.0
            name = bucket.replace("_", " ")
            lines.append(f"{name:<22}{share:>6.1f} %{_duration(seconds):>14}{price}")
    if found.failures:
        # The log does not say which agents paid for a failure: there is a price for it only if all have one.
        dollars = 0.0 if found.cost is None or found.unpriced else found.cost / run_s
        lines += ["", "failures    node time by phase"]
        lines += [_failure_line(each, dollars) for each in found.failures]
    return lines


def _failure_line(failure: "FailureCost", dollars: float) -> str:
    phases = ", ".join(
        f"{phase.replace('_', ' ')} {_duration(seconds)}"
        for phase, seconds in failure.cost_s.items()
        if seconds
    )
    total_s = sum(failure.cost_s.values())
    title = f"generation {failure.generation}: {'; '.join(failure.causes)}"
    if not phases:
        return f"{title}: its cost is not known"
    price = f", {dollars * total_s:.2f} USD" if dollars else ""
    return f"{title}: {_duration(total_s)}{price} ({phases})"


def _duration(seconds: float) -> str:
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.1f} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / _MINUTE_S:.1f} min"
    return f"{seconds / _HOUR_S:.1f} h"
