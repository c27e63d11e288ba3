"""Requests to a store are counted by operation and result, whatever serves them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elastic_pt.errors import AlreadyExists, NotFound
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.requests import CountRequests


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """One counter; 0 if it was never raised."""
    return metrics.registry.get_sample_value(f"elastic_pt_store_{name}", labels) or 0.0


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_requests_and_bytes_are_counted(protocol: str, tmp_path: Path) -> None:
    """Each operation counts with its result, and bytes count once they are written or read."""
    metrics = Metrics()
    store = open_store(f"{protocol}://{tmp_path}/run", observer=CountRequests(metrics))
    store.write("a", b"12345")
    assert store.read("a") == b"12345"
    store.size("a")
    store.keys("")
    store.delete("a")
    with pytest.raises(NotFound):
        store.read("missing")
    for operation in ("write", "read", "list", "delete", "size"):
        assert value(metrics, "requests_total", operation=operation, result="ok") == 1, operation
    assert value(metrics, "requests_total", operation="read", result="missing") == 1
    assert value(metrics, "bytes_total", direction="written") == 5
    assert value(metrics, "bytes_total", direction="read") == 5
    assert value(metrics, "request_seconds_count", operation="read") == 2
    assert value(metrics, "retries_total", operation="read") == 0


def test_a_lost_create_is_an_answer(tmp_path: Path) -> None:
    """A writer that comes second is no error of the storage: it has its own result."""
    metrics = Metrics()
    store = open_store(f"file://{tmp_path}", observer=CountRequests(metrics))
    store.create("log/0", b"1")
    with pytest.raises(AlreadyExists):
        store.create("log/0", b"2")
    assert value(metrics, "requests_total", operation="create", result="ok") == 1
    assert value(metrics, "requests_total", operation="create", result="exists") == 1
    assert value(metrics, "bytes_total", direction="written") == 1


@contextmanager
def server(statuses: list[int]) -> Iterator[str]:
    """A web server that answers with these statuses in turn, then with 200 and three bytes."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses.pop(0) if statuses else 200
            body = b"abc" if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_retries_are_counted() -> None:
    """A server that fails twice costs three attempts and two retries, and the bytes count once."""
    metrics = Metrics()
    with server([503, 500]) as url:
        assert open_store(url, observer=CountRequests(metrics)).read("x") == b"abc"
    assert value(metrics, "requests_total", operation="read", result="transient") == 2
    assert value(metrics, "requests_total", operation="read", result="ok") == 1
    assert value(metrics, "retries_total", operation="read") == 2
    assert value(metrics, "bytes_total", direction="read") == 3
