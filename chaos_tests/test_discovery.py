"""A real Prometheus finds the nodes of a run by /sd, on separate networks, with the configuration that is shipped."""

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos_tests.conftest import MakeNetwork, StartScenario
from elastic_pt.chaos.servers import start as start_server
from elastic_pt.chaos.servers import stop, wait_until
from elastic_pt.fleet.network import Network
from tests.services.fixtures import left_out

pytestmark = pytest.mark.chaos

SHIPPED = Path(__file__).parents[1] / "deploy" / "monitoring"
PORT = 9400
FOR_ALL = ("telemetry.metrics_address=0.0.0.0", f"telemetry.metrics_port={PORT}")
PROMETHEUS_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 5.0


class Prometheus:
    """A Prometheus on the network's hub, with the shipped files and other places to ask for nodes."""

    def __init__(self, network: Network, directory: Path, nodes: list[str]) -> None:
        self._network = network
        shutil.copytree(SHIPPED, directory)
        for name in ("recording-rules.yml", "alert-rules.yml"):
            (directory / name).touch()
        shipped = (directory / "prometheus.yml").read_text()
        (place,) = (line for line in shipped.splitlines() if "http://127.0.0.1:9400/sd" in line)
        places = [place.replace("127.0.0.1", network.address(node)) for node in nodes]
        between = "\n        refresh_interval: 15s\n"
        text = shipped.replace(place, between.join(places)).replace(": 15s", ": 1s")
        (directory / "prometheus.yml").write_text(text)
        log = directory / "prometheus.log"
        command = [
            "prometheus",
            f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data",
            "--web.listen-address=127.0.0.1:9090",
        ]
        with network.on_hub():
            self._server = start_server(command, log, dict(os.environ))
            wait_until("Prometheus", self._is_ready, PROMETHEUS_TIMEOUT_S, log)

    def stop(self) -> None:
        """End it."""
        stop(self._server, PROMETHEUS_TIMEOUT_S)

    def targets(self) -> list[tuple[str, str]]:
        """Instance and health of each target of the job `elastic-pt`."""
        with self._network.on_hub():
            active = _json("http://127.0.0.1:9090/api/v1/targets?state=active")["data"]
        return sorted(
            (each["labels"]["instance"], each["health"])
            for each in active["activeTargets"]
            if each["labels"]["job"] == "elastic-pt"
        )

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:9090/-/ready", timeout=ANSWER_TIMEOUT_S):
                return True
        except OSError:
            return False


def _json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:
        return json.loads(answer.read())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test has started."""
    with ExitStack() as opened:
        yield opened


def test_prometheus_follows_the_nodes_that_it_can_reach(
    make_network: MakeNetwork, start: StartScenario, tmp_path: Path, stack: ExitStack
) -> None:
    """Each node is scraped from another machine once, a lost one no longer, a new one too, and none on loopback."""
    if shutil.which("prometheus") is None:
        left_out("tests with a real Prometheus")
    network = make_network(4)
    run = start("elastic.nodes_max=4", "elastic.join_window_s=1", "train.steps=5000")
    run.ask_from = network.on_hub

    def add(node: str, *settings: str) -> None:
        run.fleet.start(
            node,
            address=network.address(node),
            prefix=network.prefix(node),
            settings=settings,
        )

    def scraped(*nodes: str) -> list[tuple[str, str]]:
        return sorted((f"{network.address(node)}:{PORT}", "up") for node in nodes)

    add("node-0", *FOR_ALL)
    add("node-1", *FOR_ALL)
    # Its metrics are on its own loopback, at the port that the others have too.
    add("node-2", f"telemetry.metrics_port={PORT}")
    run.until_step(2, nodes=3)
    prometheus = Prometheus(network, tmp_path / "prometheus", ["node-0", "node-2", "node-0"])
    stack.callback(prometheus.stop)
    run.until("two nodes are scraped", lambda: prometheus.targets() == scraped("node-0", "node-1"))
    with network.on("node-2"):
        told = _json(f"http://127.0.0.1:{PORT}/sd")
    assert sorted(each["targets"][0] for each in told) == [
        f"10.77.0.1:{PORT}",
        f"10.77.0.2:{PORT}",
        f"127.0.0.1:{PORT}",
    ]
    assert run.store.read("token").decode() not in json.dumps(told)
    run.fleet.kill("node-1")
    run.until("the lost node is no target", lambda: prometheus.targets() == scraped("node-0"))
    add("node-3", *FOR_ALL)
    run.until(
        "the new node is scraped", lambda: prometheus.targets() == scraped("node-0", "node-3")
    )
