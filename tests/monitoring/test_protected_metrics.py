"""A real Prometheus, configured as docs/monitoring.md says, reads agents that want a token and serve TLS."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge

from elastic_pt.config import TelemetrySection
from elastic_pt.membership.endpoints import Endpoint, as_targets, reachable
from elastic_pt.telemetry.exporter import MetricsServer
from elastic_pt.telemetry.protection import Protection
from tests.services.fixtures import StartPrometheus, left_out

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "monitoring.md").read_text()
SHIPPED: Final = (ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text()
HERE: Final = "127.0.0.1"
DEADLINE_S: Final = 30.0


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with token, certificate and key, made by the commands of the page."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    make(folder)
    return folder


def make(folder: Path) -> None:
    """Run the page's commands, which replace what is there."""
    if shutil.which("openssl") is None:
        left_out("tests of protected metrics, without openssl")
    found = re.search(r"^    openssl req .*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    subprocess.run(["sh", "-ec", found[0]], cwd=folder, capture_output=True, timeout=60, check=True)


def uncommented() -> dict[str, Any]:
    """The job of the shipped configuration with its lines about secrets."""
    text = re.sub(r"# (?=.*secrets/\w)", "", SHIPPED)
    text = text.replace("http://127.0.0.1:9400/sd", "https://10.0.0.4:9400/sd")
    job: dict[str, Any] = yaml.safe_load(text)["scrape_configs"][0]
    return job


def of_the_page() -> dict[str, Any]:
    """The job that the page shows."""
    found = re.search(r"^    - job_name: elastic-pt\n.*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    (job,) = yaml.safe_load(found[0])
    return dict(job)


@pytest.fixture
def agents(secrets: Path) -> Iterator[list[tuple[MetricsServer, Gauge]]]:
    """Metrics ports of two nodes, one of which answers `/sd`; the second serves plain HTTP, with the token."""
    with ExitStack() as stack:
        token = {"metrics_token_file": str(secrets / "metrics-token")}
        files = {
            "metrics_certificate_file": str(secrets / "metrics.crt"),
            "metrics_key_file": str(secrets / "metrics.key"),
        }
        found = []
        for settings in (token | files, token):
            registry = CollectorRegistry()
            gauge = Gauge("elastic_pt_step", "Steps done.", registry=registry)
            protection = Protection(TelemetrySection(**settings))  # type: ignore[arg-type]
            server = MetricsServer(registry, HERE, 0, HERE, protection)
            stack.callback(server.close)
            found.append((server, gauge))
        endpoints = [Endpoint(f"node-{n}", HERE, each.url) for n, (each, _) in enumerate(found)]
        for server, _ in found:
            server.start(lambda asker: as_targets(reachable(endpoints, asker, [])))
        yield found


def test_the_shipped_configuration_is_that_of_the_page() -> None:
    """Whoever uncomments the lines has what the page shows, and a source of targets from files beside it."""
    shipped, shown = uncommented(), of_the_page()
    shipped.pop("file_sd_configs")
    shipped["http_sd_configs"][0].pop("refresh_interval")
    assert shipped == shown


def test_promtool_accepts_the_uncommented_configuration(tmp_path: Path, secrets: Path) -> None:
    """The files that it names are found below its own folder."""
    if shutil.which("promtool") is None:
        left_out("checks with promtool")
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump({"scrape_configs": [uncommented()]}))
    (tmp_path / "targets").mkdir()
    command = ["promtool", "check", "config", str(path)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    (secrets / "metrics-token").unlink()
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1


def test_prometheus_finds_and_scrapes_protected_agents(
    secrets: Path, agents: list[tuple[MetricsServer, Gauge]], start_prometheus: StartPrometheus
) -> None:
    """Over `/sd`, with the token, each node by its own scheme; also after token and certificate were renewed."""
    (first, step), (second, other) = agents
    step.set(1)
    other.set(2)
    job = uncommented()
    (sd,) = job["http_sd_configs"]
    for section in (job, sd):
        section["authorization"]["credentials_file"] = str(secrets / "metrics-token")
        section["tls_config"]["ca_file"] = str(secrets / "metrics.crt")
    sd |= {"url": first.url.removesuffix("/metrics") + "/sd", "refresh_interval": "1s"}
    del job["file_sd_configs"]
    prometheus = start_prometheus(scrape_configs=[job])
    prometheus.wait_for("elastic_pt_step == 1", DEADLINE_S)
    prometheus.wait_for("elastic_pt_step == 2", DEADLINE_S)
    assert prometheus.targets() == {first.url: "up", second.url: "up"}
    assert (first.url.partition(":")[0], second.url.partition(":")[0]) == ("https", "http")
    make(secrets)
    step.set(3)
    prometheus.wait_for("elastic_pt_step == 3", DEADLINE_S)


@pytest.mark.parametrize("missing", ["authorization", "tls_config"])
def test_prometheus_without_token_or_certificate_reads_nothing(
    missing: str,
    secrets: Path,
    agents: list[tuple[MetricsServer, Gauge]],
    start_prometheus: StartPrometheus,
) -> None:
    """The scrape of such a job is down."""
    (first, _), _ = agents
    target = {"targets": [first.url.split("/")[2]], "labels": {"__scheme__": "https"}}
    job = {
        "job_name": "elastic-pt",
        "static_configs": [target],
        "authorization": {"type": "Bearer", "credentials_file": str(secrets / "metrics-token")},
        "tls_config": {"ca_file": str(secrets / "metrics.crt"), "server_name": "elastic-pt"},
    }
    del job[missing]
    prometheus = start_prometheus(scrape_configs=[job])
    prometheus.wait_for("up == 0", DEADLINE_S)
