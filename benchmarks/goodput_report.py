"""What `goodput.py` prints and writes: the rest by bucket, the targets, the table. Pure, except `print_report`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from elastic_pt.report.goodput import Goodput
from elastic_pt.telemetry.goodput import Bucket

TARGETS: Final = {"every_29s": 0.965, "every_60s": 0.98, "trace_aws": 0.9, "trace_gcp": 0.9}
"""The least goodput of each run, as a share of the capacity oracle's steps."""
_STEADY: Final = 0.02
"""A change of the machine's speed from which on the report warns."""
SLOWER: Final = "slower_steps"
"""The part of the rest that no bucket has: productive time in which steps took longer than undisturbed."""


def rest_of(
    before: Goodput, after: Goodput, living_from_s: Mapping[str, float]
) -> dict[str, float]:
    """The share of the living nodes' seconds between two readings in each bucket, the largest first.

    Warming is left out: a node's `start` before it counts as living (Unix time), and all of `idle_spare`.
    """
    seconds = dict.fromkeys(Bucket, 0.0)
    known = {each.node: each for each in before.agents}
    for agent in after.agents:
        earlier = known.get(agent.node)
        for bucket, spent_s in agent.seconds.items():
            seconds[bucket] += spent_s - (earlier.seconds[bucket] if earlier else 0.0)
        if earlier is None:
            lives_s = living_from_s.get(agent.node, agent.ended_at_s)
            warming_s = min(max(0.0, lives_s - agent.started_at_s), agent.seconds[Bucket.START])
            seconds[Bucket.START] -= warming_s
    del seconds[Bucket.IDLE_SPARE]
    whole_s = sum(seconds.values())
    shares = {str(name): max(0.0, spent_s) / whole_s for name, spent_s in seconds.items()}
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def with_slower_steps(rest: Mapping[str, float], goodput: float) -> dict[str, float]:
    """The rest without the productive part, and what its shares leave unexplained of 1 - `goodput`; may be below 0.

    Buckets count node-seconds and the oracle counts steps, so with several world sizes that part is approximate.
    """
    lost = {name: share for name, share in rest.items() if name != Bucket.PRODUCTIVE}
    found = {name: round(share, 5) for name, share in lost.items() if share >= 0.5e-5}
    return found | {SLOWER: round(1.0 - goodput - sum(lost.values()), 5)}


def targets_of(report: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each target of the runs that were measured is met, by a line that says which."""
    return {
        f"{name}: at least {least:.1%} of the capacity oracle, {_percent(report[name])}": (
            report[name].get("goodput") or 0.0
        )
        >= least
        for name, least in TARGETS.items()
        if name in report
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of all runs, what the rest went to, and the targets."""
    table = Table()
    table.add_column("run", no_wrap=True)
    for title in ("kills, joins", "steps", "oracle", "goodput", "lost steps", "digest", "torchrun"):
        table.add_column(title)
    names = [name for name in TARGETS if name in report]
    for name in names:
        table.add_row(name, *_cells(report[name]))
    console.print(table)
    for name in names:
        run = report[name]
        if "failure" in run:
            console.print(f"{name}: {run['failure']}", markup=False)
            continue
        parts = ", ".join(f"{part} {share:.2%}" for part, share in run["rest"].items())
        console.print(f"{name}: the rest went to {parts}", highlight=False)
        console.print(f"{name}: imports took {run['import_s']['median']:.1f} s (median)")
        if (spread := uncertainty(run["speeds"])) > _STEADY:
            console.print(
                f"[red]{name}: the machine's speed changed by {spread:.1%} meanwhile; the goodput is no more exact "
                "than that[/red]"
            )
    for target, met in targets_of(report).items():
        console.print(f"{'met' if met else '[red]MISSED[/red]'}: {target}", highlight=False)


def uncertainty(speeds: Sequence[float]) -> float:
    """By how much the undisturbed rate differed before and after a run, as a share of their mean."""
    return (max(speeds) - min(speeds)) / statistics.fmean(speeds) if speeds else 0.0


def _cells(run: Mapping[str, Any]) -> list[str]:
    peer = "" if "torchrun" not in run else _percent(run["torchrun"])
    if "failure" in run:
        return ["", "", "", "failed", "", "", peer]
    equal = {True: "equal", False: "[red]DIFFERS[/red]", None: "not compared"}
    return [
        f"{run['faults']}, {run['joins']}",
        str(run["steps"]),
        f"{run['oracle_steps']:.1f}",
        _percent(run),
        str(run["lost_steps"]),
        equal[run["digest_equal"]],
        peer,
    ]


def _percent(run: Mapping[str, Any]) -> str:
    goodput = run.get("goodput")
    return run.get("failure", "none").partition("\n")[0] if goodput is None else f"{goodput:.2%}"
