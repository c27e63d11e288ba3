"""Each fault of the proxy as a plain HTTP client sees it; the rest passes unchanged."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from elastic_pt.chaos.s3_answers import without_newest
from elastic_pt.chaos.s3_faults import (
    LOST_ANSWER,
    SLOW_DOWN,
    Bandwidth,
    Cut,
    Delay,
    FlipBit,
    Hang,
    HideNewest,
    Reset,
    S3Fault,
    Truncate,
)
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.errors import NotFound
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.store.open import open_store
from tests.services.fixtures import left_out

OBJECT = bytes(range(256)) * 1024
KEY = "/bucket/run/shard-0"
WAIT_S = 10.0


class Objects(BaseHTTPRequestHandler):
    """An upstream with one object, and what was written to it."""

    protocol_version = "HTTP/1.1"
    written: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        status, body = (200, OBJECT) if "shard" in self.path else (404, b"<Error/>")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        self.written.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def written() -> list[bytes]:
    """What PUTs have brought to the server, in order."""
    Objects.written = []
    return Objects.written


@pytest.fixture
def upstream(written: list[bytes]) -> Iterator[str]:
    """The URL of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Objects)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    """In front of it."""
    with FaultProxy(upstream, seed=1) as opened:
        yield opened


def ask(proxy: FaultProxy, method: str, path: str = KEY, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    with connected(proxy) as client:
        client.request(method, path, body or None)
        answer = client.getresponse()
        return answer.status, answer.read()


@contextmanager
def connected(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=WAIT_S)
    try:
        yield client
    finally:
        client.close()


def test_rule_chooses_requests_by_method_key_count_and_place(proxy: FaultProxy) -> None:
    """Only GETs of such keys are struck, the first one passes, and two more are struck; then all pass."""
    rule = proxy.strike(SLOW_DOWN, methods=["GET"], key="run/*-0", after=1, times=2)
    assert ask(proxy, "GET")[0] == 200
    assert ask(proxy, "GET", "/bucket/run/shard-1?x=/run/a-0")[0] == 200
    assert ask(proxy, "HEAD")[0] == 200
    assert [ask(proxy, "GET")[0] for _ in range(4)] == [503, 503, 200, 200]
    assert rule.struck == 2
    assert proxy.requests == {"GET": 6, "HEAD": 1}


def test_share_replays_from_the_seed_and_ends_when_mended(upstream: str) -> None:
    """The same seed strikes the same requests, another one others; a mended rule strikes none."""

    def struck(seed: int) -> list[int]:
        with FaultProxy(upstream, seed=seed) as proxy:
            rule = proxy.strike(SLOW_DOWN, share=0.5)
            statuses = [ask(proxy, "HEAD")[0] for _ in range(40)]
            assert rule.struck == statuses.count(503)
            rule.mend()
            assert ask(proxy, "HEAD")[0] == 200
            return statuses

    first, again, other = struck(1), struck(1), struck(2)
    assert first == again != other
    assert 10 <= first.count(503) <= 30


@pytest.mark.parametrize("fault", [SLOW_DOWN, Cut(), LOST_ANSWER, Reset(), Reset(in_answer=True)])
def test_only_some_faults_let_the_server_act(
    fault: S3Fault, proxy: FaultProxy, written: list[bytes]
) -> None:
    """A PUT whose answer is lost or reset was carried out; the others have never reached the server."""
    rule = proxy.strike(fault, methods=["PUT"], times=1)
    try:
        assert ask(proxy, "PUT", body=OBJECT) == (
            503,
            b"<Error><Code>SlowDown</Code><Message>declared fault</Message></Error>",
        )
    except (http.client.HTTPException, ConnectionError):
        assert fault != SLOW_DOWN
    assert rule.struck == 1
    assert written == ([OBJECT] if fault in (LOST_ANSWER, Reset(in_answer=True)) else [])
    assert ask(proxy, "PUT", body=b"again") == (200, b"")
    assert written[-1] == b"again"


@pytest.mark.parametrize("in_answer", [False, True])
@pytest.mark.parametrize("path", [KEY, "/bucket/none"])
def test_reset_is_an_rst(proxy: FaultProxy, in_answer: bool, path: str) -> None:
    """The client's kernel says "connection reset", and half of the answer has arrived before."""
    rule = proxy.strike(Reset(in_answer), times=1)
    host, port = proxy.endpoint.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while piece := client.recv(1 << 16):
                received += piece
    assert rule.struck == 1
    assert bool(received) == in_answer
    assert len(received) < len(OBJECT)


def test_cut_is_a_proper_end(proxy: FaultProxy) -> None:
    """The connection is closed without an answer and without an RST."""
    proxy.strike(Cut(), times=1)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "GET")


def test_truncated_body_is_shorter_than_announced(proxy: FaultProxy) -> None:
    """The headers promise the whole object; half of it comes. An answer without a body is not struck."""
    rule = proxy.strike(Truncate())
    assert ask(proxy, "HEAD") == (200, b"")
    assert rule.struck == 0
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy, "GET")
    assert caught.value.partial == OBJECT[: len(OBJECT) // 2]
    assert rule.struck == 1


def test_one_bit_of_an_object_flips(proxy: FaultProxy) -> None:
    """One bit differs, and not always the same one. An answer that is no object is left alone."""
    rule = proxy.strike(FlipBit())
    assert ask(proxy, "GET", "/bucket/none") == (404, b"<Error/>")
    assert ask(proxy, "PUT", body=OBJECT)[0] == 200
    assert rule.struck == 0
    places = []
    for _ in range(4):
        status, body = ask(proxy, "GET")
        assert status == 200
        difference = int.from_bytes(body, "big") ^ int.from_bytes(OBJECT, "big")
        assert difference.bit_count() == 1
        places.append(difference.bit_length())
    assert len(set(places)) > 1
    assert rule.struck == 4


@pytest.mark.parametrize("fault", [Hang(), Delay()])
def test_mending_ends_every_wait(proxy: FaultProxy, written: list[bytes], fault: S3Fault) -> None:
    """A hanging request gets no answer at all, a delayed one is served; until then neither reaches the server."""
    outcome: list[object] = []

    def put() -> None:
        try:
            outcome.append(ask(proxy, "PUT", body=b"late"))
        except http.client.RemoteDisconnected as error:
            outcome.append(type(error))

    rule = proxy.strike(fault)
    thread = threading.Thread(target=put)
    thread.start()
    give_up_s = time.monotonic() + WAIT_S
    while rule.struck == 0:
        assert time.monotonic() < give_up_s
    assert outcome == []
    assert written == []
    proxy.mend()
    thread.join(WAIT_S)
    assert outcome == [http.client.RemoteDisconnected if fault == Hang() else (200, b"")]
    assert written == ([] if fault == Hang() else [b"late"])


def test_delay_and_bandwidth_add_to_another_fault(proxy: FaultProxy, written: list[bytes]) -> None:
    """Each direction of a limited body takes its time, and a delayed, slow answer may be wrong too."""
    limit = len(OBJECT) * 4  # a quarter of a second
    slow = proxy.strike(Bandwidth(limit))
    late = proxy.strike(Delay(0.2))
    wrong = proxy.strike(FlipBit())
    began_s = time.monotonic()
    assert ask(proxy, "PUT", body=OBJECT)[0] == 200
    put_s = time.monotonic() - began_s
    assert ask(proxy, "GET")[1] != OBJECT
    get_s = time.monotonic() - began_s - put_s
    assert min(put_s, get_s) >= 0.44
    assert written == [OBJECT]
    assert (slow.struck, late.struck, wrong.struck) == (2, 2, 1)


@pytest.mark.moto
def test_stale_listing_hides_the_newest_keys(
    moto_endpoint: str, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing lacks the keys written last, whatever their names; they can be read by name."""
    store = open_store(f"{moto_url}/run")
    for key in ("log/2", "log/3", "log/1"):
        store.create(key, b"1")
        time.sleep(1.0)  # moto's listings count in seconds
    with FaultProxy(moto_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(f"{moto_url}/run")
        rule = proxy.strike(HideNewest(2), times=1)
        assert store.keys("log/") == ["log/2"]
        assert sorted(store.keys("log/")) == ["log/1", "log/2", "log/3"]
        assert rule.struck == 1
        assert store.read("log/1") == b"1"
        with pytest.raises(NotFound):
            store.read("log/4")


def test_listing_counts_what_it_has() -> None:
    """`KeyCount` agrees with the keys; a listing with fewer keys becomes empty."""
    contents = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-0{day}</LastModified></Contents>"
        for key, day in (("a", 2), ("b", 1))
    )
    listing = f"<R><KeyCount>2</KeyCount>{contents}</R>".encode()
    assert b"<Key>b</Key>" in without_newest(listing, 1)
    assert b"<KeyCount>1</KeyCount>" in without_newest(listing, 1)
    assert without_newest(listing, 5) == b"<R><KeyCount>0</KeyCount></R>"


def test_nodes_in_namespaces_reach_the_proxy_on_their_hub(upstream: str) -> None:
    """A listener that was opened on the hub serves nodes, while the proxy reaches a server of this machine."""
    if missing := missing_for_networks():
        left_out(f"tests on networks of their own, {missing}")
    with Network(["node-0"], versions=(6,)) as network:
        with network.on_hub():
            address = (network.address_of_hub(), 0)
            listener = socket.create_server(address, family=socket.AF_INET6)
        with FaultProxy(upstream, listener=listener) as proxy:
            assert proxy.endpoint.startswith("http://[fd77::254]:")
            with network.on("node-0"):
                assert ask(proxy, "GET") == (200, OBJECT)
