"""Disturbs a run for hours and looks whether what its oldest agent holds stays flat.

    python -m chaos_tests.soak --minutes 120 [--mean-seconds-between-faults 20] [--seed 1]

Three nodes train. Nodes 1 and 2 are killed and come back, workers of all nodes are killed or stopped, but the agent of
node-0 lives from the begin to the end, through every generation. Once a second its open files, threads and memory are
read, and the shared memory of all agents. Each must not grow: the median of the last quarter may be above that of the
second quarter by a margin for noise. The exit code is 1 if one grows, or if the run is not whole at its end.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos_tests.scenario import Scenario, make_config, scenario
from elastic_pt.chaos.processes import workers_of
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Request, Verb
from elastic_pt.store.open import open_store

STEPS = 10**8
NODES = 3
BACK_AFTER_S = 2.0
SAMPLE_S = 1.0
MARGINS = {"files": 4.0, "threads": 4.0, "memory_mb": 24.0, "shared_mb": 4.0}
"""By how much the last quarter may be above the second one."""


@dataclass(frozen=True)
class Sample:
    """What is held at one moment."""

    files: int
    """Open files of the oldest agent."""
    threads: int
    memory_mb: float
    """Its anonymous memory."""
    shared_mb: float
    """Files of all agents in /dev/shm."""


def sample(agent: int) -> Sample:
    """Read it from /proc."""
    status = Path(f"/proc/{agent}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    shared = 0
    for path in Path("/dev/shm").glob("elastic_pt-*/**/*"):
        try:
            shared += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return Sample(
        files=len(os.listdir(f"/proc/{agent}/fd")),
        threads=int(fields["Threads"]),
        memory_mb=int(fields["RssAnon"].split()[0]) / 1024,
        shared_mb=shared / 2**20,
    )


def growth(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """For each value: the medians of the second and of the last quarter."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: (
            statistics.median(getattr(each, name) for each in second),
            statistics.median(getattr(each, name) for each in last),
        )
        for name in MARGINS
    }


def disturb(run: Scenario, choices: random.Random) -> Iterator[str]:
    """One disturbance, and what undoes it: the second value comes when the time has passed."""
    node = f"node-{choices.randrange(NODES)}"
    kind = choices.choice(["kill_node", "kill_worker", "stop_worker", "kill_agent"])
    if node == "node-0" and kind in ("kill_node", "kill_agent"):
        kind = "kill_worker"
    workers = workers_of(run.fleet.pid(node), run.mark)
    if kind in ("kill_worker", "stop_worker") and not workers:
        return
    match kind:
        case "kill_worker":
            os.kill(choices.choice(workers), signal.SIGKILL)
        case "stop_worker":
            os.kill(choices.choice(workers), signal.SIGSTOP)
        case "kill_node":
            run.fleet.kill(node)
        case "kill_agent":
            os.kill(run.fleet.pid(node), signal.SIGKILL)
    yield f"{kind} {node}"
    if kind in ("kill_node", "kill_agent"):
        time.sleep(BACK_AFTER_S)
        run.fleet.start(node)


def soak(run: Scenario, minutes: float, mean_s: float, choices: random.Random) -> list[Sample]:
    """Disturb it for so long. Returns the samples, from the first step on."""
    for number in range(NODES):
        run.fleet.start(f"node-{number}")
    run.until_step(1, nodes=NODES)
    agent = run.fleet.pid("node-0")
    samples: list[Sample] = []
    end_s = time.monotonic() + minutes * 60
    due_s = time.monotonic() + choices.expovariate(1 / mean_s)
    faults = 0
    while time.monotonic() < end_s:
        samples.append(sample(agent))
        if time.monotonic() >= due_s:
            for told in disturb(run, choices):
                faults += 1
                print(f"{len(samples):6} s  {told}  {samples[-1]}", flush=True)
            due_s = time.monotonic() + choices.expovariate(1 / mean_s)
        time.sleep(SAMPLE_S)
    print(f"{faults} faults; generation {run.generation().number}; step {run.step()}")
    return samples


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--mean-seconds-between-faults", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="elastic_pt-soak-") as folder:
        directory = Path(folder)
        data = f"file://{directory / 'data'}"
        prepare([standard_library_source(300_000)], open_store(data), vocab_size=320, held_out=0.05)
        config = make_config(
            f"file://{directory / 'run'}",
            data,
            NODES,
            f"train.steps={STEPS}",
            "elastic.join_window_s=1",
            # Nodes that fail this often would be kept out, and then nothing happens for minutes.
            "elastic.flaps_max=1000000",
        )
        with scenario(config, directory / "nodes", patience_s=120.0) as run:
            samples = soak(
                run,
                options.minutes,
                options.mean_seconds_between_faults,
                random.Random(options.seed),
            )
            log = RunLog(run.store, writer="soak")
            log.refresh()
            stop = Request(Verb.STOP, by="soak", why="the time is over")
            log.append(lambda view: ask(view, stop), generation=log.view.generation_number)
            codes = run.fleet.wait(120.0)
            goodput = run.check_goodput()
    grows = 0
    for name, (second, last) in growth(samples).items():
        verdict = "GROWS" if last > second + MARGINS[name] else "flat"
        grows += verdict == "GROWS"
        print(f"{name:10} {second:10.1f} {last:10.1f}  {verdict}")
    productive = goodput.buckets["productive"] / goodput.node_seconds
    print(
        f"exit codes {codes}; productive {productive:.1%} of {goodput.node_seconds:.0f} node-seconds"
    )
    return int(grows > 0 or set(codes.values()) != {7})


if __name__ == "__main__":
    sys.exit(main())
