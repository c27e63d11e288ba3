"""The webhook accepts only signed requests, and each of them once."""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from elastic_pt.notices.notice import CheckpointNow, Leave, Stay
from elastic_pt.notices.webhook import PATH, SIGNATURE, TIMESTAMP, Webhook, sign
from tests.notices.servers import USUAL_LEAD_S, Heard, watched

KEY = b"5f6a7b"
NOW_S = 1_764_248_000
PREEMPT = {"kind": "preempt", "lead_s": 30, "event_id": "e", "node": "a"}
WITHDRAWN = {"event_id": "e", "withdrawn": True, "node": "a"}
ADVICE = {"kind": "rebalance", "event_id": "f", "node": "a"}


def free_port() -> int:
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Hook:
    """A webhook that listens, and the decisions after its notices."""

    port: int
    heard: Heard
    clock: list[float]

    def post(self, body: object, *, key: bytes = KEY, at_s: object = NOW_S) -> int:
        """Send a signed request; returns the status."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {TIMESTAMP: str(at_s), SIGNATURE: sign(key, str(at_s), data)}
        return self.send("POST", PATH, data, headers)

    def send(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> int:
        """Send any request; returns the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, data, headers)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    """The webhook of node a, with a fixed clock."""
    port, clock = free_port(), [float(NOW_S)]
    source = Webhook("127.0.0.1", port, "a", KEY, lambda: clock[0])
    with structlog.testing.capture_logs(), watched(source, often=False) as heard:
        wait_for(port)
        yield Hook(port, heard, clock)


def wait_for(port: int) -> None:
    """Wait until the webhook listens."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s


@pytest.mark.parametrize("lead_s", [120, 30, 15, 5, 0])
def test_a_signed_request_has_an_effect_and_can_be_withdrawn(hook: Hook, lead_s: int) -> None:
    """The node leaves with the lead of the request; another request withdraws the event by its id."""
    assert hook.post(PREEMPT | {"lead_s": lead_s}) == 200
    decision = hook.heard.next()
    assert isinstance(decision, Leave)
    assert (decision.notice.source, decision.notice.lead_s) == ("webhook", lead_s)
    assert hook.post(WITHDRAWN | {"event_id": "other"}) == 200
    assert hook.post(WITHDRAWN) == 200
    assert hook.heard.next() == Stay()


def test_the_name_of_the_node_is_enough(hook: Hook) -> None:
    """All fields but the node's name are optional."""
    assert hook.post({"node": "a"}) == 200
    decision = hook.heard.next()
    assert isinstance(decision, Leave)
    assert decision.notice.lead_s == USUAL_LEAD_S


def test_an_event_that_is_sent_twice_counts_once(hook: Hook) -> None:
    """A tool may repeat an event with a new signature; it counts once."""
    assert hook.post(PREEMPT) == 200
    assert hook.post(PREEMPT, at_s=NOW_S + 1) == 200
    assert isinstance(hook.heard.next(), Leave)
    assert hook.post(ADVICE) == 200
    assert hook.post(WITHDRAWN) == 200
    assert isinstance(hook.heard.next(), CheckpointNow)


@pytest.mark.parametrize(
    ("headers", "at_s"),
    [
        ({}, NOW_S),
        ({SIGNATURE: "é"}, NOW_S),
        ({SIGNATURE: sign(b"another", str(NOW_S), b"{}")}, NOW_S),
        ({SIGNATURE: sign(KEY, str(NOW_S), b"{} ")}, NOW_S),
        ({SIGNATURE: sign(KEY, str(NOW_S + 1), b"{}")}, NOW_S),
        ({SIGNATURE: sign(KEY, str(NOW_S - 301), b"{}")}, NOW_S - 301),
        ({SIGNATURE: sign(KEY, str(NOW_S + 301), b"{}")}, NOW_S + 301),
        ({SIGNATURE: sign(KEY, "now", b"{}")}, "now"),
    ],
    ids=["none", "no ascii", "other key", "other body", "other time", "old", "future", "no time"],
)
def test_an_unsigned_request_has_no_effect(
    hook: Hook, headers: dict[str, str], at_s: object
) -> None:
    """A request without a valid signature by the run's key cannot make a node leave."""
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    assert hook.send("POST", PATH, b"{}", encoded | {TIMESTAMP: str(at_s)}) == 401  # type: ignore[arg-type]
    assert hook.post(ADVICE) == 200
    assert isinstance(hook.heard.next(), CheckpointNow)


def test_a_replayed_request_is_refused(hook: Hook) -> None:
    """F17: a signature is accepted once within its five minutes, and never after them."""
    assert hook.post(PREEMPT) == 200
    assert hook.post(WITHDRAWN) == 200
    assert hook.post(PREEMPT) == 401
    hook.clock[0] += 299.0
    assert hook.post(PREEMPT) == 401
    hook.clock[0] += 2.0
    assert hook.post(PREEMPT) == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"\xff", 400),
        ({"kind": "dance"}, 400),
        ({"lead_s": -1}, 400),
        ({"whatever": 1}, 400),
        ({"event_id": "x" * 201}, 400),
        ({"withdrawn": True, "node": "a"}, 400),
        ({}, 404),
        (b'{"lead_s": NaN}', 400),
        ({"node": "b"}, 404),
        (b"x" * 20_000, 413),
    ],
)
def test_malformed_requests_and_other_nodes_have_no_effect(
    hook: Hook, body: object, status: int
) -> None:
    """The answer tells the sender what is wrong, and the node continues."""
    assert hook.post(body) == status
    assert hook.send("GET", PATH, b"", {}) == 405
    assert hook.post(ADVICE) == 200
    assert isinstance(hook.heard.next(), CheckpointNow)


def test_a_client_that_sends_no_body_delays_no_other(hook: Hook) -> None:
    """F17: a request that hangs keeps only its own connection."""
    with socket.create_connection(("127.0.0.1", hook.port)) as hanging:
        hanging.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode())
        assert hook.post(PREEMPT) == 200
        assert isinstance(hook.heard.next(), Leave)


def test_the_command_of_the_documentation_works(hook: Hook, tmp_path: Path) -> None:
    """The command line for the signature in docs/notices.md gives a valid signature."""
    page = Path(__file__).parents[2] / "docs" / "notices.md"
    (line,) = [each for each in page.read_text().splitlines() if "openssl dgst" in each]
    script = f'body=\'{{"node": "a"}}\'; now={NOW_S}; token={KEY.decode()}; {line.strip()}; echo "$signature"'
    made = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    headers = {TIMESTAMP: str(NOW_S), SIGNATURE: made.stdout.strip()}
    assert hook.send("POST", PATH, b'{"node": "a"}', headers) == 200


def test_a_port_in_use_is_retried() -> None:
    """If the port is in use, the webhook is retried, and the node trains."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        source = Webhook("127.0.0.1", taken.getsockname()[1], "a", KEY)
        with structlog.testing.capture_logs() as events, watched(source) as heard:
            heard.until_up("webhook", 0)
            taken.close()
            heard.until_up("webhook", 1)
    causes = [each["cause"] for each in events if each["event"] == "notice_source_failed"]
    assert len(causes) == 1
