"""The metrics port: both paths, other paths and methods, and askers that do not behave, over real sockets."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from structlog.testing import capture_logs

from elastic_pt.config import TelemetrySection
from elastic_pt.errors import ConfigError
from elastic_pt.telemetry import exporter
from elastic_pt.telemetry.exporter import MetricsServer
from elastic_pt.telemetry.protection import Protection

TARGETS = [{"targets": ["10.0.0.7:9400"], "labels": {}}]
DEADLINE_S = 10.0
NONE = Protection(TelemetrySection())

Serve = Callable[..., MetricsServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on a free port with one counter, and closes it at the end."""
    with ExitStack() as stack:

        def start(
            address: str = "127.0.0.1",
            discover: Callable[[str], Sequence[Mapping[str, Any]] | None] = lambda _: TARGETS,
            node_address: str = "10.0.0.7",
            **telemetry: str,
        ) -> MetricsServer:
            registry = CollectorRegistry()
            Counter("elastic_pt_steps", "Steps.", registry=registry).inc(3)
            protection = Protection(TelemetrySection(**telemetry))  # type: ignore[arg-type]
            server = MetricsServer(registry, address, 0, node_address, protection)
            stack.callback(server.close)
            server.start(discover)
            return server

        yield start


def port_of(server: MetricsServer) -> int:
    """The port in its URL."""
    return int(server.url.rpartition(":")[2].partition("/")[0])


def ask(
    server: MetricsServer, path: str, method: str = "GET", host: str = "127.0.0.1"
) -> http.client.HTTPResponse:
    """One request; the body is left to be read."""
    connection = http.client.HTTPConnection(host, port_of(server), timeout=DEADLINE_S)
    connection.request(method, path)
    return connection.getresponse()


def test_both_paths_are_served(serve: Serve) -> None:
    """/metrics has the metrics, and /sd is a JSON list with the type that Prometheus demands."""
    server = serve()
    metrics = ask(server, "/metrics")
    assert metrics.status == 200
    assert b"elastic_pt_steps_total 3.0" in metrics.read()
    targets = ask(server, "/sd?x=1")
    assert targets.status == 200
    assert targets.headers["Content-Type"] == "application/json"
    assert json.loads(targets.read()) == TARGETS


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/metrics/", "GET", 404),
        ("/sd/../metrics", "GET", 404),
        ("/nothing", "POST", 404),
        ("/sd", "POST", 405),
        ("/sd", "DELETE", 405),
        ("/metrics", "BREW", 405),
        ("/nothing", "HEAD", 404),
    ],
)
def test_other_paths_and_methods_are_refused(
    path: str, method: str, status: int, serve: Serve
) -> None:
    """An unknown path is 404, another method than GET or HEAD 405, and the server goes on."""
    server = serve()
    assert ask(server, path, method).status == status
    assert ask(server, "/sd").status == 200


@pytest.mark.parametrize("path", ["/metrics", "/sd"])
def test_head_is_get_without_the_body(path: str, serve: Serve) -> None:
    """HEAD has the status, the type and the length of GET, and no body."""
    server = serve()
    full, head = ask(server, path), ask(server, path, "HEAD")
    assert head.status == 200
    assert head.headers["Content-Type"] == full.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) == len(full.read())
    assert head.read() == b""


def test_unknown_targets_are_503(serve: Serve) -> None:
    """While the nodes cannot be found out, /sd fails: Prometheus then keeps its targets. /metrics goes on."""
    server = serve(discover=lambda _: None)
    assert ask(server, "/sd").status == 503
    assert ask(server, "/metrics").status == 200


def test_a_defect_is_500_and_an_event(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """An error in one answer is that answer's only. The asker is told nothing of the inside; the events are."""

    def broken(_: str) -> None:
        raise RuntimeError("out of order")

    server = serve(discover=broken)
    with capture_logs() as events:
        for method in ("GET", "HEAD"):
            answer = ask(server, "/sd", method)
            assert answer.status == 500
            assert b"order" not in answer.read()
    assert {each["event"] for each in events} == {"metrics_failed"}
    assert ask(server, "/metrics").status == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("address", "host", "url"),
    [
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1:{}/metrics"),
        ("localhost", "127.0.0.1", "http://127.0.0.1:{}/metrics"),
        ("::1", "::1", "http://[::1]:{}/metrics"),
        ("0.0.0.0", "127.0.0.1", "http://10.0.0.7:{}/metrics"),
        ("", "127.0.0.1", "http://10.0.0.7:{}/metrics"),
        ("::", "::1", "http://10.0.0.7:{}/metrics"),
    ],
)
def test_url_names_an_address_that_others_can_use(
    address: str, host: str, url: str, serve: Serve
) -> None:
    """The URL has the server's own address, in brackets with IPv6; on all addresses it has the node's."""
    server = serve(address)
    if address == "localhost" and server.url.startswith("http://[::1]"):
        host, url = "::1", "http://[::1]:{}/metrics"
    assert server.url == url.format(port_of(server))
    assert ask(server, "/metrics", host=host).status == 200


def test_the_asker_is_known_by_its_address(serve: Serve) -> None:
    """Discovery gets the address from which the asker connected."""
    askers: list[str] = []

    def discover(asker: str) -> list[Mapping[str, Any]]:
        askers.append(asker)
        return []

    server = serve("::", discover)
    ask(server, "/sd", host="127.0.0.1")
    ask(server, "/sd", host="::1")
    assert askers == ["::ffff:127.0.0.1", "::1"]


@pytest.mark.parametrize("sends", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_slow_askers_are_closed_for_others(sends: bytes, serve: Serve) -> None:
    """F48: connections that ask nothing, or never finish, take a bounded number of threads and delay nobody."""
    server = serve()
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(3 * exporter._CONNECTIONS_MAX):
            slow = stack.enter_context(
                socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S)
            )
            slow.sendall(sends)
        began_s = time.monotonic()
        assert ask(server, "/metrics").status == 200
        assert time.monotonic() - began_s < exporter._STANDSTILL_TIMEOUT_S / 2
        assert threading.active_count() - before <= exporter._CONNECTIONS_MAX + 1


def test_a_connection_that_stands_still_is_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without a request ends after the timeout."""
    assert exporter._Handler.timeout == exporter._STANDSTILL_TIMEOUT_S
    monkeypatch.setattr(exporter._Handler, "timeout", 0.1)
    server = serve()
    with socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S) as still:
        assert still.recv(1) == b""


@pytest.mark.parametrize("noise", [b"\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET " + b"x" * 70_000])
def test_noise_writes_nothing_and_ends_nothing(
    noise: bytes, serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no request leave standard error empty, and the server goes on."""
    server = serve()
    with socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S) as client:
        client.sendall(noise)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    assert ask(server, "/metrics").status == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_named(serve: Serve) -> None:
    """F23: the error names the key, the port and what would be right."""
    taken = port_of(serve())
    with pytest.raises(ConfigError, match=rf"telemetry.metrics_port = {taken}: .*expected a free"):
        MetricsServer(CollectorRegistry(), "127.0.0.1", taken, "127.0.0.1", NONE)


@pytest.mark.parametrize("address", ["192.0.2.1", "no such name."])
def test_an_address_of_another_machine_is_named(address: str) -> None:
    """The error names the key and the address."""
    with pytest.raises(ConfigError, match=f"telemetry.metrics_address = '{address}': .*expected"):
        MetricsServer(CollectorRegistry(), address, 0, "127.0.0.1", NONE)


def test_a_server_that_never_started_can_be_closed() -> None:
    """An agent that fails between binding and starting closes the port at once."""
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, "127.0.0.1", NONE)
    server.close()
    MetricsServer(CollectorRegistry(), "127.0.0.1", port_of(server), "127.0.0.1", NONE).close()
