"""The bound for what mirrors read, and what a reader does with a busy peer."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.agent.pace import Pace
from elastic_pt.checkpoint.peer import RANGE_BYTES_MAX, Peer, PeerAddress
from elastic_pt.errors import StoreError
from tests.access import PLAIN


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.integers(1, 1 << 25), st.floats(0.0, 5.0)), min_size=1, max_size=20),
)
def test_requests_never_exceed_the_bound(
    bytes_per_s: int, requests: list[tuple[int, float]]
) -> None:
    """Whatever the pauses between requests, the bytes before a request have had their time at the bound."""
    pace, now_s, sent = Pace(bytes_per_s), 0.0, 0
    for size, pause_s in requests:
        now_s += pause_s
        now_s += pace.wait_s(size, now_s)
        assert sent <= bytes_per_s * now_s * (1 + 1e-9) + 1e-6
        sent += size


def test_without_a_bound_nothing_waits() -> None:
    """0 is the default: the link is the bound."""
    pace = Pace(0)
    assert pace.chunk_bytes == RANGE_BYTES_MAX
    assert [pace.wait_s(1 << 40, 0.0) for _ in range(3)] == [0.0] * 3


def test_chunks_are_short_at_a_low_bound() -> None:
    """A request takes about a quarter of a second, so that other readers see no bursts."""
    assert Pace(4 << 20).chunk_bytes == 1 << 20
    assert Pace(1).chunk_bytes == 64 << 10
    assert Pace(1 << 40).chunk_bytes == RANGE_BYTES_MAX


class _Busy(BaseHTTPRequestHandler):
    """Answers 503 twice, then 429, then the content. Paths below /broken answer 500."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:
        """One answer."""
        _Busy.asked += 1
        status = 500 if self.path == "/broken" else (503, 503, 429, 206)[min(_Busy.asked, 4) - 1]
        self.send_response(status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"rows")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def busy() -> Iterator[Peer]:
    """A peer that is busy at first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Busy.asked = 0
    yield Peer(PeerAddress("127.0.0.1", server.server_port), PLAIN, 5.0)
    server.shutdown()
    server.server_close()


def four_bytes(peer: Peer, path: str) -> bytes:
    """The first bytes of a shard file."""
    found = bytearray(4)
    peer.read_into(path, 0, memoryview(found))
    return bytes(found)


def test_busy_peer_is_asked_again(busy: Peer) -> None:
    """503 and 429 mean that the peer sends to others now. No copy is given up for that."""
    assert four_bytes(busy, "/rows") == b"rows"
    assert _Busy.asked == 4


def test_other_error_is_not_asked_again(busy: Peer) -> None:
    """The caller takes another copy, if there is one."""
    with pytest.raises(StoreError, match="500"):
        four_bytes(busy, "/broken")
    assert _Busy.asked == 1


def test_closed_peer_answers_nothing_more(busy: Peer) -> None:
    """A mirror that was stopped must not wait for its neighbour."""
    assert four_bytes(busy, "/rows") == b"rows"
    busy.close()
    with pytest.raises(StoreError):
        four_bytes(busy, "/rows")
