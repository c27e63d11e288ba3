"""A proxy in front of an S3 server that injects declared faults and counts what they struck.

    with FaultProxy(ceph.endpoint, seed=7) as proxy:       agents talk to proxy.endpoint
        proxy.strike(SLOW_DOWN, methods=["PUT"], times=2)       the next two PUTs are answered 503
        outage = proxy.strike(Cut())                            from now on nobody gets an answer
        outage.struck                                           how many requests did not
        outage.mend()                                           or proxy.mend() for all rules

`s3_faults` lists the faults. Rules strike in the order in which they were declared. Bodies are streamed. To serve nodes in
network namespaces, listen there: `with network.on_hub(): listener = socket.create_server((address, 0))`.
"""

import random
import socket
import threading
from collections import Counter
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from elastic_pt.chaos.s3_faults import Request, Rule, S3Fault
from elastic_pt.chaos.s3_relay import Relay

_POLL_S: Final = 0.05


class FaultProxy:
    """Use as a context manager; it serves in threads of this process."""

    def __init__(
        self, upstream: str, *, listener: socket.socket | None = None, seed: int = 0
    ) -> None:
        """`upstream` is the URL of the server, reached from this process. By default it listens on loopback."""
        self.requests: Counter[str] = Counter()
        """Requests that have arrived, by method."""
        self._seed = seed
        self._declared = 0
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        host = urlsplit(upstream).netloc
        handler = type("Handler", (Relay,), {"upstream": host, "take": self._take})
        self._server = _Server(listener or socket.create_server(("127.0.0.1", 0)), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="fault proxy", daemon=True
        )

    @property
    def endpoint(self) -> str:
        """The URL that clients talk to."""
        host, port = self._server.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def strike(
        self,
        fault: S3Fault,
        *,
        methods: Collection[str] = (),
        key: str = "*",
        share: float = 1.0,
        after: int = 0,
        times: int | None = None,
    ) -> Rule:
        """From now on let `fault` strike requests, until the rule is mended.

        `methods`: which ones, by default all. `key`: a pattern as of a shell (`*` matches any characters) for the key inside
        the bucket; requests about the bucket have the key "". Of the requests that match, the first `after` pass, then each is
        struck with the probability `share`, at most `times`.
        """
        with self._lock:
            self._declared += 1
            draw = random.Random(f"{self._seed} {self._declared}")
            choice = {"methods": methods, "key": key, "share": share}
            rule = Rule(fault, **choice, after=after, times=times, draw=draw)  # type: ignore[arg-type]
            self._rules.append(rule)
        return rule

    def mend(self) -> None:
        """Mend all rules."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.mend()

    def _take(self, request: Request) -> list[Rule]:
        """The rules that strike a request which has just arrived: those that slow it, then at most one other."""
        with self._lock:
            self.requests[request.method] += 1
            rules = list(self._rules)
        struck: list[Rule] = []
        for rule in rules:
            if rule.take(request):
                struck.append(rule)
                if not rule.slows:
                    break
        return struck

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mend()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, listener: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_activate()

    def shutdown_request(self, request: Any) -> None:
        """Only close it: a FIN before the RST would look like a proper end."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that are killed break their connections, and each client sees a broken one itself."""
