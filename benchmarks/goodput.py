"""Goodput under fire: how much of what its living nodes could do a run does, while nodes are killed and join.

    python benchmarks/goodput.py --json FILE [--minutes 3] [--only every_29s,trace_aws] [--seed 7] [--quick]

    every_29s, every_60s    SIGKILL to one of three nodes at random moments, 29 and 60 s apart in the mean; a spare that
                            has imported takes its place
    trace_aws, trace_gcp    stretches of real spot traces in real time, with two to six nodes

`goodput` is the number of steps done, each once, divided by the steps of the capacity oracle: what as many living nodes
would have done undisturbed, if every change cost nothing. The rates of the oracle are measured in the same invocation
for each number of nodes. Each node has the same quota of the processor (cgroups, as root; otherwise one thread).
Stock torchrun with FSDP2 and DCP, tuned, trains the same model under the same schedule, against an oracle of its own
rates. The final weights are compared with those of an undisturbed run at the same step.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

# If this file is run as a script, Python searches modules in its folder. The imports start at the root of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.goodput_drive import Course, System, calibrate, drive
from benchmarks.goodput_ours import OurSystem, lost_steps, reference_digest
from benchmarks.goodput_peer import peer_system
from benchmarks.goodput_plan import Schedule, faults, read_aws, read_gcp, sizes_of, stretch_of
from benchmarks.goodput_report import TARGETS, print_report, rest_of, with_slower_steps
from benchmarks.goodput_run import GoodputRun
from benchmarks.processor_shares import ProcessorShares
from benchmarks.summary import exit_on_sigterm, machine, write_json
from benchmarks.synthetic import write_random_tokens
from benchmarks.torchrun_peer import VOCABULARY
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import Goodput

_TOKENS: Final = 1_000_000
_TRACES: Final = Path(__file__).with_name("spot_traces")
_NODES: Final = 3
_TRACE_NODES: Final = 4
_TRACE_NODES_MAX: Final = 6
_USED: Final = 0.95
"""The part of the cores that the nodes of a full run and one warming node may use together."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    json: Path | None
    minutes: float
    only: tuple[str, ...]
    seed: int
    calibration_s: float
    peer: bool
    directory: Path | None


def parse_arguments() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each run")
    parser.add_argument("--only", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--no-peer", action="store_true", help="without stock torchrun")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every_29s for a minute, without torchrun: does it work?",
    )
    parser.add_argument("--directory", type=Path, help="keep runs and logs here")
    given = parser.parse_args()
    only = tuple(given.only.split(","))
    if unknown := set(only) - set(TARGETS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; expected some of {', '.join(TARGETS)}")
    if given.minutes < 0.5:
        parser.error("--minutes: expected at least 0.5")
    return Options(
        json=given.json,
        minutes=1.0 if given.quick else given.minutes,
        only=("every_29s",) if given.quick else only,
        seed=given.seed,
        calibration_s=6.0 if given.quick else 15.0,
        peer=not given.quick and not given.no_peer,
        directory=given.directory,
    )


def schedule_of(name: str, seconds: float, seed: int) -> Schedule:
    """The schedule of a run."""
    match name:
        case "every_29s" | "every_60s":
            mean_s = 29.0 if name == "every_29s" else 60.0
            return faults(name, mean_s=mean_s, seconds=seconds, nodes=_NODES, seed=seed)
        case "trace_aws":
            changes = read_aws((_TRACES / "aws-p3.csv").read_text())
        case _:
            changes = read_gcp((_TRACES / "gcp-a100-east1b.txt").read_text())
    return stretch_of(
        name, changes, seconds=seconds, nodes=_TRACE_NODES, nodes_max=_TRACE_NODES_MAX, seed=seed
    )


def cores_of(schedule: Schedule) -> float:
    """Each node's share of the processor: all nodes and one that warms up fit on this machine."""
    return _USED * len(os.sched_getaffinity(0)) / (schedule.nodes_max + 1)


def calibrate_ours(
    schedules: Sequence[Schedule], seconds: float, directory: Path, data_url: str
) -> dict[int, float]:
    """The undisturbed rates that these schedules need. They have the same most nodes."""
    with open_run(schedules[0], directory, data_url) as run:
        system = OurSystem(run, spares=False, tell=tell)
        return calibrate(system, sizes_of(schedules), seconds, tell)


def run_ours(
    schedule: Schedule, rates: dict[int, float], seconds: float, directory: Path, data_url: str
) -> dict[str, Any]:
    """One disturbed run: its entry in the JSON."""
    with open_run(schedule, directory, data_url) as run:
        system = OurSystem(run, spares=schedule.replaced, tell=tell)
        spent: list[Goodput] = []
        course = drive(system, schedule, rates, seconds, read=lambda: spent.append(run.spent()))
        run.stop()
        lost = lost_steps(run.records(), course.begin.time_s, course.end.time_s)
        imports_s, final = run.import_seconds(), run.final()
    entry = entry_of(schedule, course, system, rates)
    entry["lost_steps"] = lost
    entry["digest_equal"] = None
    entry["rest"] = with_slower_steps(
        rest_of(spent[0], spent[1], system.living_from_s), entry["goodput"]
    )
    entry["import_s"] = {
        "median": round(statistics.median(imports_s), 3),
        "worst": max(imports_s),
        "nodes": len(imports_s),
    }
    entry["digest_step"], entry["digest"] = final
    return entry


def calibrate_peer(
    schedules: Sequence[Schedule], seconds: float, directory: Path
) -> dict[int, float]:
    """The undisturbed rates of torchrun."""
    most = schedules[0].nodes_max
    with peer_system(directory, most, cores_of(schedules[0])) as system:
        return calibrate(
            system, sizes_of(schedules), seconds, lambda line: tell(f"torchrun: {line}")
        )


def run_peer(
    schedule: Schedule, rates: dict[int, float], seconds: float, directory: Path
) -> dict[str, Any]:
    """One disturbed job of torchrun: its entry in the JSON."""
    with peer_system(directory, schedule.nodes_max, cores_of(schedule)) as system:
        course = drive(system, schedule, rates, seconds, read=lambda: None)
        entry = entry_of(schedule, course, system, rates)
        return entry | {"lost_steps": system.lost_steps, "restarts": system.restarts}


def open_run(schedule: Schedule, directory: Path, data_url: str) -> GoodputRun:
    """A run for a schedule, or for the calibration of its rates."""
    return GoodputRun(directory, data_url, cores_of(schedule), schedule.nodes_max)


def entry_of(
    schedule: Schedule, course: Course, system: System, rates: dict[int, float]
) -> dict[str, Any]:
    """What the JSON says of a run, ours or torchrun's."""
    possible = course.oracle_steps(system, schedule, rates)
    return {
        "goodput": round(course.steps / possible, 5),
        "steps": course.steps,
        "oracle_steps": round(possible, 3),
        "faults": sum(event.lost for event in schedule.events),
        "joins": sum(not event.lost for event in schedule.events),
        "seconds": round(course.end.time_s - course.begin.time_s, 3),
        "rates": rates,
        "speeds": [round(speed, 4) for speed in course.speeds],
        "events": [{"at_s": round(event.at_s, 3), "lost": event.lost} for event in schedule.events],
    }


def compare(report: dict[str, Any], directory: Path, data_url: str) -> None:
    """Compare the final state of each run with that of an undisturbed one."""
    for name in TARGETS:
        run = report.get(name, {})
        if "digest" in run:
            tell(f"{name}: reference of {run['digest_step']} steps")
            with failures_in(run, "reference"):
                wanted = reference_digest(directory / name, data_url, run["digest_step"])
                run["digest_equal"] = run["digest"] == wanted


@contextmanager
def failures_in(report: dict[str, Any], name: str) -> Iterator[None]:
    """If the run inside fails, say so in its entry, and go on with the next run."""
    try:
        yield
    except ElasticPtError as error:
        tell(f"{name}: {error}")
        report[name] = {"failure": str(error)}


@contextmanager
def working_directory(kept: Path | None) -> Iterator[Path]:
    """The directory of runs and logs: that of --directory, or a temporary one."""
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="goodput-") as directory:
        yield Path(directory)


def tell(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    exit_on_sigterm()
    console = Console()
    console.print(f"seed {options.seed}")
    report: dict[str, Any] = {"machine": machine(), "seed": options.seed}
    schedules = [schedule_of(name, 60 * options.minutes, options.seed) for name in options.only]
    seconds = options.calibration_s
    began_s = time.monotonic()
    with ProcessorShares(1.0) as shares:
        report["machine"]["quotas"] = shares.limited
    with working_directory(options.directory) as directory:
        data_url = write_random_tokens(directory / "data", VOCABULARY, _TOKENS)
        for nodes_max in sorted({each.nodes_max for each in schedules}):
            alike = [each for each in schedules if each.nodes_max == nodes_max]
            place = directory / f"{nodes_max}-nodes"
            place.mkdir()
            rates = calibrate_ours(alike, seconds, place / "calibration", data_url)
            for each in alike:
                tell(f"{each.name}: {len(each.events)} changes in {each.seconds:g} s")
                with failures_in(report, each.name):
                    report[each.name] = run_ours(each, rates, seconds, place / each.name, data_url)
                write_json(options.json, report)
            if options.peer:
                rates = calibrate_peer(alike, seconds, place / "torchrun")
                for each in alike:
                    tell(f"torchrun, {each.name}")
                    with failures_in(report[each.name], "torchrun"):
                        report[each.name]["torchrun"] = run_peer(
                            each, rates, seconds, place / f"torchrun-{each.name}"
                        )
                    write_json(options.json, report)
        compare(report, directory / "reference", data_url)
    report["seconds"] = round(time.monotonic() - began_s, 1)
    write_json(options.json, report)
    print_report(report, console)


if __name__ == "__main__":
    main()
