"""A proxy in front of an S3 server that declares faults at (method, which request) and counts requests.

    proxy.fault("PUT", Fault.status(503, "SlowDown"))      the next PUT is answered 503, the server never sees it
    proxy.fault("PUT", Fault.lost_response())              the next PUT is carried out, its answer is lost

    proxy.cut()                                            from now on nobody gets an answer, until proxy.mend()
    proxy.trouble(lambda method, path: Fault.slow(2.0))    from now on each request is asked, until proxy.mend()
    proxy.hold("shard-")                                   requests to write such keys wait, until proxy.release()

Faults are used up in the order in which they were declared, one per request of their method.
"""

import http.client
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_HOP_BY_HOP = frozenset(
    {"connection", "expect", "keep-alive", "transfer-encoding", "date", "server"}
)
_UPSTREAM_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Fault:
    """What happens to one request instead of passing it on, or after passing it on."""

    forward: bool
    answer: tuple[int, str] | None
    hang_s: float = 0.0
    body: str = ""
    passes: bool = False
    """Whether it is passed on as usual, after `hang_s`."""

    @classmethod
    def passed(cls) -> None:
        """No fault: this request is passed on, the next declared fault is for the one after it."""
        return

    @classmethod
    def answered_with(cls, status: int, body: str) -> "Fault":
        """Answer with this body; the server never sees the request."""
        return cls(forward=False, answer=(status, ""), body=body)

    @classmethod
    def status(cls, status: int, code: str) -> "Fault":
        """Answer with an S3 error; the server never sees the request."""
        return cls(forward=False, answer=(status, code))

    @classmethod
    def lost_response(cls) -> "Fault":
        """Let the server carry the request out, then cut the connection."""
        return cls(forward=True, answer=None)

    @classmethod
    def answered_late(cls, status: int, code: str) -> "Fault":
        """Let the server carry the request out, then answer with an S3 error."""
        return cls(forward=True, answer=(status, code))

    @classmethod
    def hang(cls, hang_s: float) -> "Fault":
        """Say nothing for that long (or until the proxy closes), then cut the connection."""
        return cls(forward=False, answer=None, hang_s=hang_s)

    @classmethod
    def slow(cls, seconds: float) -> "Fault":
        """Pass it on after that long."""
        return cls(forward=False, answer=None, hang_s=seconds, passes=True)


class FaultProxy:
    """Use as a context manager; `endpoint` is what clients should talk to."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.requests: dict[str, int] = defaultdict(int)
        self.closing = threading.Event()
        self._cut = threading.Event()
        self._held = ""
        self._released = threading.Event()
        self._faults: dict[str, deque[Fault | None]] = defaultdict(deque)
        self._trouble: Callable[[str, str], Fault | None] = lambda method, path: None
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def endpoint(self) -> str:
        """The URL that clients should talk to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fault(self, method: str, *faults: Fault | None) -> None:
        """Declare what happens to the next requests of this method."""
        with self._lock:
            self._faults[method].extend(faults)

    def cut(self) -> None:
        """Let the server disappear: every connection is closed without an answer."""
        self._cut.set()

    def mend(self) -> None:
        """Let it come back, and end the trouble."""
        self._cut.clear()
        self._trouble = lambda method, path: None

    def trouble(self, fault_of: Callable[[str, str], Fault | None]) -> None:
        """Ask `fault_of(method, path)` for the fault of each request that has no declared one."""
        self._trouble = fault_of

    def hold(self, part: str) -> None:
        """Let requests to write keys that contain `part` wait."""
        self._released.clear()
        self._held = part

    def release(self) -> None:
        """Let them pass, also those that wait."""
        self._held = ""
        self._released.set()

    def wait_if_held(self, method: str, path: str) -> None:
        """Wait while requests like this one are held, or until the proxy closes."""
        while self._held and self._held in path and method in ("PUT", "POST"):
            if self._released.wait(0.1) or self.closing.is_set():
                return

    def take(self, method: str, path: str) -> Fault | None:
        """The fault of the request that has just arrived, if any; counts the request."""
        with self._lock:
            self.requests[method] += 1
            if self._cut.is_set():
                return Fault(forward=False, answer=None)
            if self._faults[method]:
                return self._faults[method].popleft()
        return self._trouble(method, path)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.owner.wait_if_held(self.command, self.path)
        fault = self.owner.take(self.command, self.path)
        if fault is None:
            self._reply(*self._forward(body))
            return
        if fault.forward:
            self._forward(body)
        self.owner.closing.wait(fault.hang_s)
        if fault.passes:
            self._reply(*self._forward(body))
            return
        if fault.answer is None:
            self.close_connection = True
            return
        status, code = fault.answer
        text = fault.body or f"<Error><Code>{code}</Code><Message>declared fault</Message></Error>"
        self._reply(status, [("Content-Type", "application/xml")], text.encode())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            # The Host header stays the client's: it is part of the signature.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        sized = False
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                sized = sized or name.lower() == "content-length"
                self.send_header(name, value)
        if not sized and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest shows what matters."""
