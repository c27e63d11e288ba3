"""A person is told the few things that one wants to know at night, and a bad receiver harms nobody."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

import pytest
from structlog.testing import capture_logs

from elastic_pt.errors import ConfigError
from elastic_pt.telemetry import webhook
from elastic_pt.telemetry.webhook import VARIABLE, Webhook, notification, webhook_from

DEADLINE_S = 30.0
STOP = {
    "event": "stop",
    "run": "s3://bucket/run",
    "node": "a",
    "step": 40,
    "reason": "b and c: IndexError",
}


@contextmanager
def receiver(answer: Callable[[int], int]) -> Iterator[tuple[str, Queue[str]]]:
    """A real HTTP server: `answer` maps the number of a request to its status. Yields the URL and the texts."""
    texts: Queue[str] = Queue()
    count = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = answer(next(count))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            if status == 200:
                texts.put(json.loads(body)["text"])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/services/T0/secretpath", texts
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between messages and attempts."""
    monkeypatch.setattr(webhook, "_INTERVAL_S", 0.0)
    monkeypatch.setattr(Webhook, "_pause", lambda self, seconds: None)


def test_the_end_of_a_run_is_told_in_words() -> None:
    """The message has the run, the node, the step, the reason, and what to do."""
    told = notification(STOP)
    assert told is not None
    for part in ("ended at step 40", "b and c: IndexError", "s3://bucket/run", "node a"):
        assert part in told
    assert "elastic-pt log s3://bucket/run --explain" in told


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ({"event": "stop", "reason": "completed", "step": 48}, "is complete at step 48"),
        ({"event": "stop", "reason": "diverged: loss is inf", "step": 9}, "training diverged"),
        (
            {"event": "node_kept_out", "kept_out": "spot-3", "seconds": 600, "reason": "it failed"},
            "spot-3 is quarantined for 10 minutes: it failed",
        ),
        (
            {"event": "checkpoint_quarantined", "directory": "ckpt/6", "why": "a wrong CRC"},
            "ckpt/6 is quarantined and will not be used: a wrong CRC",
        ),
        (
            {"event": "below_minimum", "seconds": 300, "reason": "paused: 1 of at least 2 nodes"},
            "not trained for 5 minutes: paused: 1 of at least 2 nodes. Start more nodes",
        ),
    ],
)
def test_each_alarm_says_what_happened(event: dict[str, object], part: str) -> None:
    """Each of the few alarms names its object and its cause."""
    assert part in (notification(event) or "")


@pytest.mark.parametrize("event", ["worker_failed", "generation", "commit", "store_retry", "x"])
def test_what_the_run_mends_itself_wakes_nobody(event: str) -> None:
    """A lost node or a failed worker is no alarm: the run continues."""
    assert notification({"event": event, "reason": "lost b"}) is None


def test_a_message_arrives_after_errors_of_the_receiver() -> None:
    """A receiver that answers 500 twice gets the message once it recovers."""
    with receiver(lambda number: 500 if number < 2 else 200) as (url, texts):
        hook = Webhook(url)
        hook.take(STOP)
        assert "ended at step 40" in texts.get(timeout=DEADLINE_S)
        hook.close()
    assert hook.failures == 0


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_failing_receiver_is_reported_once(status: int) -> None:
    """Messages that are given up are counted; an outage is one event, which does not show the URL."""
    with receiver(lambda _: status) as (url, _), capture_logs() as logs:
        hook = Webhook(url)
        for _ in range(3):
            hook.take(STOP)
        hook.close()
    told = [each for each in logs if each["event"] == "webhook_failed"]
    assert len(told) == 1
    assert str(status) in told[0]["cause"]
    assert "secretpath" not in str(told)
    assert hook.failures == 3


def test_a_hanging_receiver_delays_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the receiver does not answer, messages wait in a bounded queue; those beyond are counted."""
    released = threading.Event()
    monkeypatch.setattr(webhook, "_QUEUE_MESSAGES_MAX", 2)

    def answer(_: int) -> int:
        released.wait(DEADLINE_S)
        return 200

    with receiver(answer) as (url, _):
        hook = Webhook(url)
        began_s = time.monotonic()
        for _ in range(1000):
            hook.take(STOP)
        hook.close(0.1)
        assert time.monotonic() - began_s < webhook._TIMEOUT_S
        assert hook.failures >= 1000 - 3
        released.set()


def test_a_receiver_that_is_away_is_reported_once() -> None:
    """A refused connection is an outage like any other."""
    with receiver(lambda _: 200) as (url, _):
        pass
    with capture_logs() as logs:
        hook = Webhook(url)
        hook.take(STOP)
        hook.take(STOP)
        hook.close()
    assert [each["event"] for each in logs] == ["webhook_failed"]


@pytest.mark.parametrize(
    "url",
    [
        "hooks.example/T0/secretpath",
        "ftp://h/secretpath",
        "https:///secretpath",
        "https://h:x/secretpath",
    ],
)
def test_a_malformed_url_is_refused_without_showing_it(url: str) -> None:
    """The error names the variable, and not its value: the URL is a secret."""
    with pytest.raises(ConfigError, match=VARIABLE) as caught:
        webhook_from({VARIABLE: url})
    assert "secretpath" not in str(caught.value)
    assert webhook_from({}) is None
