"""Who may read the metrics: the token, the certificate, both renewed while the agent runs, over real sockets."""

import http.client
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from elastic_pt.config import TelemetrySection
from elastic_pt.errors import ConfigError
from elastic_pt.runlog.access import new_authority
from elastic_pt.telemetry.exporter import MetricsServer
from elastic_pt.telemetry.protection import Protection

DEADLINE_S = 10.0

Serve = Callable[..., MetricsServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on a free port with these keys of `[telemetry]`, and closes it at the end."""
    with ExitStack() as stack:

        def start(**telemetry: str) -> MetricsServer:
            protection = Protection(TelemetrySection(**telemetry))  # type: ignore[arg-type]
            server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, "127.0.0.1", protection)
            stack.callback(server.close)
            server.start(lambda _: [])
            return server

        yield start


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate in one file."""
    path = tmp_path / "tls.pem"
    path.write_bytes(new_authority())
    return path


def status(
    server: MetricsServer, token: str = "", trusted: Path | None = None, path: str = "/metrics"
) -> int:
    """Ask once, over TLS if a certificate is trusted."""
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    if trusted is not None:
        context = ssl.create_default_context(cadata=certificate_of(trusted))
        context.check_hostname = False
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=DEADLINE_S, context=context
        )
    connection.request("GET", path, headers={"Authorization": token} if token else {})
    return connection.getresponse().status


def certificate_of(path: Path) -> str:
    """The certificate alone."""
    return path.read_text().partition("-----END PRIVATE KEY-----\n")[2]


def change(path: Path, content: bytes) -> None:
    """Replace a file, later than before by the clock of any file system."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("path", ["/metrics", "/sd", "/nothing"])
@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secret2"]
)
def test_a_request_without_the_token_is_401(
    path: str, given: str, serve: Serve, tmp_path: Path
) -> None:
    """Each path, whatever else is sent."""
    (tmp_path / "token").write_text("secret\n")
    server = serve(metrics_token_file=str(tmp_path / "token"))
    assert status(server, given, path=path) == 401
    assert status(server, "Bearer secret") == 200


def test_a_renewed_token_counts_at_once(serve: Serve, tmp_path: Path) -> None:
    """The old one is refused. While the file is away or empty, the last one counts."""
    path = tmp_path / "token"
    path.write_text("first")
    server = serve(metrics_token_file=str(path))
    path.write_text("second")
    assert status(server, "Bearer first") == 401
    assert status(server, "Bearer second") == 200
    with capture_logs() as events:
        for away in (path.unlink, path.touch):
            away()
            assert status(server, "Bearer second") == 200
            assert status(server, "Bearer ") == 401
    assert {each["event"] for each in events} == {"metrics_token_not_read"}


def test_tls_is_served_and_plain_http_is_not(serve: Serve, certificate: Path) -> None:
    """The URL says https, which `/sd` and `elastic-pt targets` hand on."""
    server = serve(metrics_certificate_file=str(certificate))
    assert server.url.startswith("https://127.0.0.1:")
    assert status(server, trusted=certificate) == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        status(server)
    assert status(server, trusted=certificate) == 200


def test_the_key_may_be_in_a_file_of_its_own(
    serve: Serve, certificate: Path, tmp_path: Path
) -> None:
    """As cert-manager writes them."""
    whole = certificate.read_text()
    (tmp_path / "tls.key").write_text(whole.removesuffix(certificate_of(certificate)))
    (tmp_path / "tls.crt").write_text(certificate_of(certificate))
    server = serve(
        metrics_certificate_file=str(tmp_path / "tls.crt"),
        metrics_key_file=str(tmp_path / "tls.key"),
    )
    assert status(server, trusted=certificate) == 200


def test_a_renewed_certificate_counts_at_once(
    serve: Serve, certificate: Path, tmp_path: Path
) -> None:
    """A file that is half written, or away, leaves the last one in use."""
    old, new = tmp_path / "old.pem", tmp_path / "new.pem"
    old.write_bytes(certificate.read_bytes())
    new.write_bytes(new_authority())
    server = serve(metrics_certificate_file=str(certificate))
    with capture_logs() as events:
        change(certificate, new.read_bytes()[:300])
        assert status(server, trusted=old) == 200
    assert [each["event"] for each in events] == ["metrics_certificate_not_read"]
    change(certificate, new.read_bytes())
    assert status(server, trusted=new) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        status(server, trusted=old)
    certificate.unlink()
    assert status(server, trusted=new) == 200


def test_slow_handshakes_delay_nobody(serve: Serve, certificate: Path) -> None:
    """F48: who connects and says nothing takes a place for a moment, and the newest asker gets one."""
    server = serve(metrics_certificate_file=str(certificate))
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
        assert status(server, trusted=certificate) == 200


@pytest.mark.parametrize("content", [None, "", " \n"], ids=["missing", "empty", "blank"])
def test_an_unusable_token_is_named(content: str | None, tmp_path: Path) -> None:
    """At the start: one line with the key and the file."""
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"telemetry\.metrics_token_file = '{path}': .*expected"):
        Protection(TelemetrySection(metrics_token_file=str(path)))


@pytest.mark.parametrize("content", [None, b"", new_authority()[:300]])
def test_an_unusable_certificate_is_named(content: bytes | None, tmp_path: Path) -> None:
    """At the start: one line with the key and the file."""
    path = tmp_path / "tls.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"telemetry\.metrics_certificate_file = '{path}': .*expected"
    ):
        Protection(TelemetrySection(metrics_certificate_file=str(path)))


def test_a_key_without_a_certificate_is_a_mistake() -> None:
    """It would be served in plain text, which nobody meant."""
    with pytest.raises(ConfigError, match=r"telemetry\.metrics_key_file = 'x': .*expected"):
        Protection(TelemetrySection(metrics_key_file="x"))
