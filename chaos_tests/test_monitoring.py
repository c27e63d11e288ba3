"""A real run with faults, scraped by a real Prometheus with the delivered rules, whose durations are scaled."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from elastic_pt.chaos.processes import workers_of
from elastic_pt.chaos.s3_faults import SLOW_DOWN
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.chaos.servers import free_port
from elastic_pt.checkpoint.layout import shard_key
from elastic_pt.failpoints import VARIABLE
from tests.monitoring.rules import rules, scaled
from tests.services.fixtures import StartPrometheus, point_aws_at
from tests.services.prometheus import Prometheus

pytestmark = [pytest.mark.chaos, pytest.mark.ceph, pytest.mark.timeout(600)]

FACTOR: Final = 20.0
"""A minute of the rules is three seconds: a recovery on a busy machine is then no lack of progress."""
STEPS: Final = 1_000_000
ERRORS_SHARE: Final = 0.4
KILLS: Final = 3
TIMEOUT_S: Final = 90.0
NODES: Final = ("node-0", "node-1")

LATE: Final = {"FencedWriter"}
"""A member that is slow may report its finding of the damaged checkpoint after the next generation: the log refuses it."""
Watched = tuple[Scenario, FaultProxy, Prometheus, dict[str, int]]

EMPTY_IN_A_HEALTHY_RUN: Final = {"elastic_pt:no_step_expected", "elastic_pt:paused:ratio"}


@pytest.fixture
def watched(
    start: StartScenario,
    start_prometheus: StartPrometheus,
    ceph: Ceph,
    ceph_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watched]:
    """Two nodes that reach their bucket through a proxy, and a Prometheus that scrapes them."""
    ports = {node: free_port() for node in NODES}
    prometheus = start_prometheus(
        [f"127.0.0.1:{port}" for port in ports.values()], rule_files=scaled(tmp_path, FACTOR)
    )
    with FaultProxy(ceph.endpoint, seed=7) as proxy:
        run = start("elastic.nodes_max=2", f"train.steps={STEPS}", run_url=f"{ceph_url}/run")
        # The test's own connection is made before the address changes.
        assert run.view().length == 0
        point_aws_at(proxy.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)
        for node, port in ports.items():
            run.fleet.start(node, settings=[f"telemetry.metrics_port={port}"])
        yield run, proxy, prometheus, ports


def ever_fired(prometheus: Prometheus) -> set[str]:
    """Names of the alerts that have fired at any time."""
    samples = prometheus.query('count_over_time(ALERTS{alertstate="firing"}[1h])')
    return {sample.labels["alertname"] for sample in samples}


def flip_a_bit(run: Scenario) -> None:
    """Damage a shard of the newest checkpoint."""
    key = shard_key(run.view().checkpoints[0].directory, 0)
    data = bytearray(run.store.read(key))
    data[len(data) // 2] ^= 1
    run.store.delete(key)
    run.store.create(key, bytes(data))


@pytest.mark.quick
def test_each_fault_of_a_real_run_fires_its_alert(
    watched: Watched,
) -> None:
    """Every rule is evaluated on a real run and returns data; each fault fires its alert, and nothing else fires."""
    run, proxy, prometheus, ports = watched
    run.until_step(20, nodes=2)
    recorded = {rule["record"] for rule in rules() if "record" in rule} - EMPTY_IN_A_HEALTHY_RUN
    missing = set(recorded)

    def all_have_data() -> bool:
        missing.difference_update([name for name in missing if prometheus.query(name)])
        return not missing

    prometheus.wait_until(f"data of {recorded}", all_have_data, TIMEOUT_S)
    assert ever_fired(prometheus) == set()

    proxy.strike(SLOW_DOWN, share=ERRORS_SHARE)
    prometheus.wait_until(
        "StorageErrors", lambda: "StorageErrors" in prometheus.firing(), TIMEOUT_S
    )
    proxy.mend()

    for _ in range(KILLS):
        generation, step = run.generation().number, run.step()
        run.until_step(step + 5, nodes=2)
        os.kill(workers_of(run.fleet.pid("node-1"), run.mark)[0], signal.SIGKILL)
        run.until("the next generation", lambda: run.generation().number > generation)  # noqa: B023
    prometheus.wait_until(
        "NodeQuarantined", lambda: "NodeQuarantined" in prometheus.firing(), TIMEOUT_S
    )

    for node in NODES:
        run.fleet.kill(node)
    prometheus.wait_until(
        "MetricsAbsent", lambda: "MetricsAbsent" in prometheus.firing(), TIMEOUT_S
    )

    flip_a_bit(run)
    for node, port in ports.items():
        # Half a minute for others to join would be ten minutes of the rules: NoProgress.
        settings = [f"telemetry.metrics_port={port}", "elastic.join_window_s=2"]
        run.fleet.start(node, settings=settings)
    prometheus.wait_until("VerifyFailed", lambda: "VerifyFailed" in prometheus.firing(), TIMEOUT_S)
    expected = {"StorageErrors", "NodeQuarantined", "MetricsAbsent", "VerifyFailed"}
    assert ever_fired(prometheus) - LATE == expected
    assert [rule for rule in prometheus.rules() if rule.health != "ok"] == []


INSIDE: Final[dict[str, tuple[str, list[str]]]] = {
    "CrashLoop": ("buffer.begun@1+:kill", []),
    "CapacityLow": ("", ["elastic.nodes_min=2", "elastic.nodes_max=2"]),
    "NoProgress": ("buffer.begun@9:delay=3600", ["elastic.hang_timeout_s=3600"]),
    "CommitTooOld": ("commit.collected@1+:store_error", []),
}
"""Failpoint and settings of a run of one agent, by the alert that they fire."""


def test_a_fault_inside_an_agent_fires_its_alert(
    start: StartScenario, start_prometheus: StartPrometheus, tmp_path: Path
) -> None:
    """A run for each fault, of one real agent. A crash loop, with its rests, is no lack of nodes."""
    ports = {alert: free_port() for alert in INSIDE}
    prometheus = start_prometheus(
        [f"127.0.0.1:{port}" for port in ports.values()], rule_files=scaled(tmp_path, FACTOR)
    )
    run = start(f"train.steps={STEPS}")
    urls = dict.fromkeys(INSIDE, run.config.run.url)
    for alert, (failpoint, settings) in INSIDE.items():
        if alert != "CrashLoop":
            urls[alert] = f"file://{tmp_path / alert}"
        run.fleet.start(
            alert.lower(),
            settings=[
                f"run.url={urls[alert]}",
                f"telemetry.metrics_port={ports[alert]}",
                *settings,
            ],
            prefix=("env", f"{VARIABLE}={failpoint}"),
        )

    def fired(alert: str) -> set[str]:
        ever = f'count_over_time(ALERTS{{alertstate="firing", run="{urls[alert]}"}}[1h])'
        return {sample.labels["alertname"] for sample in prometheus.query(ever)}

    def all_fired() -> bool:
        return all(alert in fired(alert) for alert in INSIDE)

    prometheus.wait_until("each run's alert", all_fired, TIMEOUT_S)
    found = {alert: fired(alert) for alert in INSIDE}
    # It rests for seconds: in the scaled rules, for minutes.
    found["CrashLoop"] -= {"NodeQuarantined", "NoProgress"}
    assert found == {alert: {alert} for alert in INSIDE}
    waited = 'elastic_pt_time_seconds_total{node="crashloop", state="paused_below_minimum"} > 0'
    assert prometheus.query(waited) == []
    assert prometheus.query('elastic_pt_time_seconds_total{node="crashloop", state="agree"} > 1')
