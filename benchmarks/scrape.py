"""Processor time of one scrape of an agent, and its share of the time between two scrapes.

    python benchmarks/scrape.py [--members 32] [--interval-s 15] [--json FILE]

The agent is a member of a generation whose members each hold the states of 8 workers and of a neighbour. It has a value in
every series, with 64 sources and 8 GPUs. A scrape is what the server does for Prometheus: read what is read at a scrape,
write the text, compress it. Workers are other processes: a scrape can cost a step no more than this time, and only where no
core is free.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import make_wsgi_app

from elastic_pt.agent.counting import ReadAtScrape
from elastic_pt.data.plan import SOURCES_SHOWN_MAX
from elastic_pt.membership.decision.node_states import NodeState
from elastic_pt.membership.decision.status import Held, NodePhase, NodeStatus, Peer
from elastic_pt.membership.decision.view import View
from elastic_pt.membership.node import Node
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import CauseKind, Generation, Member
from elastic_pt.store.observer import Operation, Result
from elastic_pt.telemetry.catalogue import Metrics, catalogue
from elastic_pt.telemetry.flops import ModelFlops
from elastic_pt.telemetry.goodput import Bucket

WORKERS = 8
GPUS = 8
REPEATS = 50
_VALUES: dict[str, tuple[str, ...]] = {
    "source": tuple(f"source-{index}" for index in range(SOURCES_SHOWN_MAX)),
    "gpu": tuple(map(str, range(GPUS))),
    "phase": ("data", "compute", "communicate", "optimizer", "checkpoint"),
    "operation": tuple(Operation),
    "result": tuple(Result),
    "cause": tuple(CauseKind),
    "state": tuple(Bucket),
    "reason": ("power_cap", "hardware_slowdown", "software_thermal", "hardware_thermal"),
    "direction": ("read", "written"),
    "formula": ("parameters", "palm"),
}
"""The values of a label. Other labels have one."""


def filled() -> Metrics:
    """Metrics with a value in every series."""
    metrics = Metrics(
        "s3://bucket/run", "node-0", price_per_hour=2.0, flops=ModelFlops({"palm": 6e9}, 989e12)
    )
    for each in catalogue():
        series: list[tuple[str, ...]] = [()]
        for label in each.labels:
            series = [(*before, value) for before in series for value in _VALUES.get(label, ("x",))]
        collector: Any = getattr(metrics, each.name)
        for values in series:
            child = collector.labels(*values) if values else collector
            match each.kind:
                case "counter":
                    child.inc(1234.5)
                case "gauge":
                    child.set(1234.5)
                case "histogram":
                    child.observe(1.5)
    return metrics


def member_of(members: int) -> Node:
    """A member of a generation in which each member holds its own states and its neighbour's."""
    everyone = tuple(
        Member(f"n{index}", f"{index:016x}", "127.0.0.1", 1, index, WORKERS)
        for index in range(members)
    )
    generation = Generation(1, everyone, (), "127.0.0.1", 1, None, "started")
    ranks = generation.worker_ranks()

    def status_of(index: int) -> NodeStatus:
        held = tuple(
            Held(1, step, ranks[at].start, ranks[at].stop, generation.world_size)
            for step in (90, 100)
            for at in (index, (index - 1) % members)
        )
        return NodeStatus(everyone[index], NodePhase.RUNNING, 1, 1, 0, None, {}, held=held)

    peers = {
        each.incarnation: Peer(status_of(index), 0.0, 0.0, False)
        for index, each in enumerate(everyone)
        if index
    }
    facts = View(status_of(0), generation, None, None, peers)
    states = dict.fromkeys(NodeState, 1)
    return cast(
        Node,
        SimpleNamespace(
            view=RunView(generations=(generation,)),
            facts=facts,
            member=everyone[0],
            node_states=lambda: states,
        ),
    )


def scrape(metrics: Metrics) -> bytes:
    """What the server does for one request of Prometheus."""
    environment = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/metrics",
        "QUERY_STRING": "",
        "HTTP_ACCEPT_ENCODING": "gzip",
    }
    application = make_wsgi_app(metrics.registry)
    body = application(environment, lambda *_: lambda _: None)  # type: ignore[arg-type,return-value]
    return b"".join(body)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--interval-s", type=float, default=15.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    metrics = filled()
    metrics.before_scrape(ReadAtScrape(metrics, member_of(options.members), lambda: 1))
    series = sum(len(family.samples) for family in metrics.registry.collect())
    seconds, size = [], 0
    for _ in range(REPEATS):
        began_s = time.process_time()
        size = len(scrape(metrics))
        seconds.append(time.process_time() - began_s)
    median_s = statistics.median(seconds)
    result = {
        "members": options.members,
        "series": series,
        "compressed_bytes": size,
        "scrape_s": median_s,
        "share": median_s / options.interval_s,
    }
    print(
        f"{series} series, {size} bytes: {1e3 * median_s:.1f} ms of processor time, "
        f"{median_s / options.interval_s:.3%} of a core at a scrape every {options.interval_s:g} s"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
