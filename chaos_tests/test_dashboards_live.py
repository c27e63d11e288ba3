"""Every query of every dashboard, asked of a real Prometheus that has scraped a real run with faults."""

import math
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.noticed import File
from chaos_tests.scenario import Scenario
from dashboards.layout import ANNOTATIONS
from dashboards.panels import expanded
from elastic_pt.chaos.processes import workers_of
from elastic_pt.chaos.servers import free_port
from tests.monitoring.panels import dashboards, filled, queries
from tests.services.fixtures import StartPrometheus
from tests.services.prometheus import SCRAPE_INTERVAL_S, Prometheus, Series

pytestmark = pytest.mark.chaos

STEPS: Final = 1_000_000
BETWEEN_FAULTS_STEPS: Final = 6
TIMEOUT_S: Final = 60.0
LEAD_S: Final = 20.0
NODES: Final = ("node-0", "node-1", "node-2", "node-3")
OVERRIDES: Final = (
    f"train.steps={STEPS}",
    "telemetry.price_per_hour=2.5",
    "telemetry.peak_flops=1e11",
    "elastic.nodes_max=3",
)
OPTIONAL: Final = frozenset({"held out {{run}}"})
"""Legends of queries that have no data unless a feature is on; another query of the same panel has some."""


@dataclass(frozen=True)
class Watched:
    """A disturbed run as Prometheus has seen it."""

    prometheus: Prometheus
    run: str
    began_s: float
    ended_s: float

    def filled(self, expression: str) -> str:
        """The query as Grafana would send it for the whole run."""
        return filled(
            expression,
            self.run,
            range_s=self.ended_s - self.began_s,
            step_s=SCRAPE_INTERVAL_S,
            scrape_s=SCRAPE_INTERVAL_S,
        )

    def answer(self, expression: str) -> list[Series]:
        """What a panel over the whole run would get."""
        return self.prometheus.query_range(
            self.filled(expression), self.began_s, self.ended_s, SCRAPE_INTERVAL_S
        )


def values_of(answer: Sequence[Series]) -> list[float]:
    """All values that a panel would show; NaN is not shown."""
    values = [value for series in answer for _, value in series.points]
    return [value for value in values if not math.isnan(value)]


def disturb(run: Scenario, ports: Sequence[int], notice: Path) -> None:
    """Three nodes; one is killed, one joins, a worker of one is killed, one leaves because of a notice."""
    source = File(notice)

    def begin(number: int) -> None:
        run.fleet.start(
            NODES[number],
            settings=[
                f"telemetry.metrics_port={ports[number]}",
                f"elastic.notices={source.setting if number == 2 else 'off'}",
            ],
        )

    def train(nodes: int, generation: int) -> None:
        """Some steps of a later generation with this many members, the first of which may have been done before."""
        run.until("the next generation", lambda: run.generation().number > generation)
        run.until(f"{nodes} members", lambda: len(run.generation().members) == nodes)
        run.until_step(run.step() + BETWEEN_FAULTS_STEPS, nodes)

    for number in range(3):
        begin(number)
    run.until_step(BETWEEN_FAULTS_STEPS, nodes=3)
    run.fleet.kill("node-1")
    train(2, generation=1)
    begin(3)
    train(3, generation=2)
    workers: list[int] = []

    def found() -> bool:
        workers[:] = workers_of(run.fleet.pid("node-3"), run.mark)
        return bool(workers)

    run.until("workers of node-3", found)
    generation = run.generation().number
    os.kill(workers[0], signal.SIGKILL)
    train(3, generation)
    generation = run.generation().number
    source.notice(LEAD_S)
    train(2, generation)


@pytest.fixture
def watched(start: StartScenario, start_prometheus: StartPrometheus, tmp_path: Path) -> Watched:
    """The disturbed run, still training."""
    ports = [free_port() for _ in NODES]
    prometheus = start_prometheus([f"127.0.0.1:{port}" for port in ports])
    run = start(*OVERRIDES)
    began_s = time.time()
    disturb(run, ports, tmp_path / "notice.yml")
    # Nodes are scraped one after the other, and only the one that has appended a record has counted it.
    prometheus.wait_for('elastic_pt_generation{node="node-0"} >= 5', TIMEOUT_S)
    counted = 'max_over_time(elastic_pt_changes_total{cause="left"}[10m]) >= 1'
    prometheus.wait_for(counted, TIMEOUT_S)
    return Watched(prometheus, run.config.run.url, began_s, time.time())


def test_every_panel_shows_a_run_with_faults(watched: Watched) -> None:
    """No panel outside the rows of GPUs is empty, annotations name the faults, and stats count each of them once."""
    asked = [query for dashboard in dashboards() for query in queries(dashboard)]
    empty, unnamed = [], []
    for query in asked:
        names = set(re.findall(r"{{(\w+)}}", query.legend))
        answer = watched.answer(query.expression)
        if any(not names <= series.labels.keys() for series in answer):
            unnamed.append(query)
        optional = query.row.startswith("GPUs") or query.legend in OPTIONAL
        if not optional and not values_of(answer):
            empty.append(query)
    assert empty == []
    assert unnamed == []

    # Annotations tell of the faults, and of the planned changes.
    annotated = {name: watched.answer(expanded(query)) for name, _, query, *_ in ANNOTATIONS}
    causes = {
        name: {series.labels["cause"] for series in annotated[name]}
        for name in ("Fault", "Members changed as planned")
    }
    assert causes == {"Fault": {"lost", "failed"}, "Members changed as planned": {"joined", "left"}}
    assert values_of(annotated["Generation"])

    # The variables offer the run and every node that was there.
    info = watched.prometheus.series("elastic_pt_run_info", watched.began_s, watched.ended_s)
    assert {labels["run"] for labels in info} == {watched.run}
    assert {labels["node"] for labels in info} == set(NODES)

    # Sums over nodes count no event twice.
    stats = {
        query.panel: query.expression
        for dashboard in dashboards()
        if dashboard["uid"] == "elastic-pt-faults"
        for query in queries(dashboard)
        if query.row == "In the visible range"
    }
    shown = {
        panel: watched.prometheus.query(watched.filled(expression), watched.ended_s)[0].value
        for panel, expression in stats.items()
    }
    assert shown["Faults"] == 2
    assert shown["Planned changes"] == 2
    assert shown["Quarantines"] == 0
    assert shown["Worker failures"] >= 1
    assert 0 < shown["Median recovery"] <= shown["95th percentile"]
