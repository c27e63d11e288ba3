"""The Prometheus of the tests scrapes, evaluates and alerts as a user's would."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from tests.services.fixtures import StartPrometheus
from tests.services.prometheus import Alertmanager, QueryError

RULES = """\
groups:
- name: example
  rules:
  - {record: "elastic_pt:double", expr: 2 * elastic_pt_step}
  - {alert: Low, expr: elastic_pt_step < 3, labels: {severity: page}, annotations: {summary: "step {{ $value }}"}}
"""


def test_scrape_to_alertmanager(
    tmp_path: Path,
    start_prometheus: StartPrometheus,
    start_alertmanager: Callable[[], Alertmanager],
) -> None:
    """A value on an exporter reaches queries, recording rules, alerts and the Alertmanager, and changes with it."""
    rules = tmp_path / "example.yml"
    rules.write_text(RULES)
    registry = CollectorRegistry()
    step = Gauge("elastic_pt_step", "Steps done.", registry=registry)
    step.set(2)
    exporter, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    alertmanager = start_alertmanager()
    target = f"127.0.0.1:{exporter.server_port}"
    prometheus = start_prometheus([target], rule_files=[rules], alertmanager=alertmanager.url)
    try:
        (double,) = prometheus.wait_for("elastic_pt:double", timeout_s=30.0)
        assert (double.value, double.labels["instance"]) == (4.0, target)
        assert prometheus.targets() == {f"http://{target}/metrics": "up"}
        prometheus.wait_until("Low", lambda: alertmanager.firing() == {"Low"}, 30.0)
        (alert,) = prometheus.alerts()
        assert (alert.state, alert.annotations) == ("firing", {"summary": "step 2"})
        assert [(rule.name, rule.health) for rule in prometheus.rules()] == [
            ("elastic_pt:double", "ok"),
            ("Low", "ok"),
        ]
        step.set(3)
        prometheus.wait_until("nothing", lambda: prometheus.firing() == set(), 30.0)
    finally:
        exporter.shutdown()
        exporter.server_close()


def test_wrong_query_is_an_error(start_prometheus: StartPrometheus) -> None:
    """A query with a mistake fails in Prometheus's words, and is not an empty answer."""
    prometheus = start_prometheus()
    assert prometheus.query("elastic_pt_step") == []
    with pytest.raises(QueryError, match="parse error"):
        prometheus.query("sum(")
