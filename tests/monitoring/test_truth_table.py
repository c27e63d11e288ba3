"""The truth table: each fault fires exactly its alert, in a real Prometheus and a real Alertmanager.

One Prometheus scrapes all runs at once. Each run has one fault, which is mended when its alert has fired. The rules are
scaled: an hour is a minute.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.monitoring.rules import alert_names, scaled
from tests.monitoring.toy_run import Exporter, ToyRun
from tests.services.fixtures import StartPrometheus
from tests.services.prometheus import Alertmanager, Prometheus

FACTOR: Final = 60.0
HEALTHY_STEPS: Final = 140
TIMEOUT_S: Final = 150.0


@dataclass(frozen=True)
class Fault:
    """How it is made, and how it is mended."""

    make: Callable[[ToyRun], object]
    mend: Callable[[ToyRun], object] = lambda run: None


def setting(**values: object) -> Callable[[ToyRun], None]:
    """Sets attributes of the run."""

    def apply(run: ToyRun) -> None:
        for name, value in values.items():
            assert hasattr(run, name)
            setattr(run, name, value)

    return apply


FAULTS: Final[Mapping[str, Fault]] = {
    "NoProgress": Fault(setting(stepping=False), setting(stepping=True)),
    "CommitTooOld": Fault(setting(committing=False), setting(committing=True)),
    "StepsAtRisk": Fault(
        lambda run: run.metrics.steps_at_risk.labels("node").set(200),
        lambda run: run.metrics.steps_at_risk.labels("node").set(1),
    ),
    "CrashLoop": Fault(lambda run: setting(crash_step=run.step)(run), setting(crash_step=0)),
    "NodeQuarantined": Fault(
        lambda run: run.metrics.nodes.labels("quarantined").set(1),
        lambda run: run.metrics.nodes.labels("quarantined").set(0),
    ),
    "FencedWriter": Fault(lambda run: run.metrics.fenced.inc()),
    "VerifyFailed": Fault(lambda run: run.metrics.verify_failures.inc()),
    "LossNonFinite": Fault(lambda run: run.metrics.steps_skipped.inc()),
    "StorageErrors": Fault(setting(requests_fail=True), setting(requests_fail=False)),
    "CapacityLow": Fault(
        setting(stepping=False, bucket="paused_below_minimum"),
        setting(stepping=True, bucket="productive"),
    ),
    "GoodputBurn": Fault(setting(bucket="recompute"), setting(bucket="productive")),
    "MetricsAbsent": Fault(setting(up=False), setting(up=True)),
    "ClockSkew": Fault(setting(clock_offset_s=-20.0), setting(clock_offset_s=0.0)),
    "NoticeSourceDown": Fault(
        lambda run: run.metrics.notice_source_up.labels("file").set(0),
        lambda run: run.metrics.notice_source_up.labels("file").set(1),
    ),
    "GpuErrors": Fault(lambda run: run.metrics.gpu_xid_errors.labels("0").inc()),
}


QUIET: Final[Mapping[str, Callable[[ToyRun], object]]] = {
    "healthy": lambda run: None,
    "paused": setting(stepping=False, bucket="paused_on_request"),
    "members change": lambda run: run.metrics.generation.inc(5),
    "completed": setting(up=False),
    "completed, last upload": lambda run: None,
}
"""What is no fault."""


@pytest.fixture
def runs() -> dict[str, ToyRun]:
    """A run for each fault, and for what is no fault, by name."""
    now_s = time.monotonic()
    runs = {name: ToyRun(name, now_s) for name in (*FAULTS, *QUIET)}
    # At its last scrape it has a few steps to do.
    runs["completed"].plan(HEALTHY_STEPS + 40)
    runs["completed, last upload"].plan(HEALTHY_STEPS + 40)
    return runs


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """Serves the metrics of all runs."""
    exporter = Exporter()
    yield exporter
    exporter.close()


def fired(prometheus: Prometheus) -> dict[str, set[str]]:
    """The alerts that each run ever fired."""
    alerts: dict[str, set[str]] = defaultdict(set)
    ever = 'count by (run, alertname) (count_over_time(ALERTS{alertstate="firing"}[1h]))'
    for sample in prometheus.query(ever):
        alerts[sample.labels["run"]].add(sample.labels["alertname"])
    return alerts


def test_each_fault_fires_exactly_its_alert(
    tmp_path: Path,
    runs: dict[str, ToyRun],
    exporter: Exporter,
    start_prometheus: StartPrometheus,
    start_alertmanager: Callable[[], Alertmanager],
) -> None:
    """A run with one fault fires that fault's alert, once mended none, and a run without a fault none at all."""
    alertmanager = start_alertmanager()
    exporter.update(runs.values())
    prometheus = start_prometheus(
        [exporter.target], rule_files=scaled(tmp_path, FACTOR), alertmanager=alertmanager.url
    )

    def run_until(what: str, done: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        def tick() -> bool:
            for run in runs.values():
                run.advance(time.monotonic(), time.time())
            exporter.update(runs.values())
            return done()

        prometheus.wait_until(what, tick, timeout_s)

    # Prometheus begins to scrape after five seconds.
    run_until("runs train", lambda: prometheus.value("min(elastic_pt:step:max)") > HEALTHY_STEPS)
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    for name, fault in FAULTS.items():
        fault.make(runs[name])
    for name, change in QUIET.items():
        change(runs[name])
    unmended, notified = set(FAULTS), set[str]()

    def all_fired() -> bool:
        notified.update(alertmanager.firing())
        for name in unmended & prometheus.firing():
            FAULTS[name].mend(runs[name])
            unmended.discard(name)
        return not unmended and notified >= set(FAULTS)

    try:
        run_until("every alert fires", all_fired)
    except TimeoutError as error:
        raise AssertionError(
            f"did not fire: {unmended}; not sent: {set(FAULTS) - notified}"
        ) from error
    run_until("no alert fires any more", lambda: not prometheus.firing())
    assert fired(prometheus) == {name: {name} for name in FAULTS}
    assert notified == set(FAULTS)
    assert {(rule.name, rule.health) for rule in prometheus.rules() if rule.health != "ok"} == set()


def test_every_alert_is_in_the_table() -> None:
    """A new alert needs a fault that fires it."""
    assert list(FAULTS) == alert_names()
