"""The metrics port of an agent: an HTTP server with two paths, for Prometheus. Agent process.

    GET /metrics   this node's metrics, in the format that the asker prefers
    GET /sd        the nodes that are up, as targets of Prometheus' HTTP service discovery; 503 while they cannot be
                   found out (Prometheus then keeps the targets that it has)

Both only read, and neither has a secret; `protection` may want a token, and may encrypt. A slow asker never delays training: each connection has a thread of its own,
a connection that stands still is closed, and at `_CONNECTIONS_MAX` open ones the oldest is closed for the newest.
"""

import errno
import json
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.registry import Collector

from elastic_pt.errors import ConfigError
from elastic_pt.telemetry.protection import Protection

Discover = Callable[[str], Sequence[Mapping[str, Any]] | None]
"""From the asker's address to the targets that it can reach; None while they cannot be found out."""
_Environment = dict[str, Any]
_StartResponse = Callable[..., Any]
_Application = Callable[[_Environment, _StartResponse], Iterable[bytes]]

log = structlog.get_logger("elastic_pt.exporter")

_CONNECTIONS_MAX: Final = 16
_STANDSTILL_TIMEOUT_S: Final = 10.0
_EVICT_TIMEOUT_S: Final = 1.0
_CLOSE_CHECK_S: Final = 0.1


class MetricsServer:
    """The server. Bound when it is created, so that its URL is known; it answers from `start` on."""

    def __init__(
        self,
        registry: Collector,
        address: str,
        port: int,
        node_address: str,
        protection: Protection,
    ) -> None:
        """Bind `address:port`; port 0 takes a free one. Raises `ConfigError`.

        The URL of a server on all addresses (0.0.0.0, ::) names `node_address`, where others can reach it.
        """
        self._metrics: _Application = make_wsgi_app(registry)
        self._discover: Discover = lambda _: None
        self._protection = protection
        self._thread: threading.Thread | None = None
        try:
            family, bound = _family_of(address, port)
            kind = _BoundedServer6 if family is socket.AF_INET6 else _BoundedServer
            self._server: _BoundedServer = make_server(bound, port, self._guarded, kind, _Handler)
        except (OSError, ValueError) as error:
            raise _mistake(address, port, error) from error
        self._server.context = protection.context
        own = str(self._server.server_address[0])
        reachable = node_address if own in ("0.0.0.0", "::") else own
        host = f"[{reachable}]" if ":" in reachable else reachable
        self.url = f"{protection.scheme}://{host}:{self._server.server_port}/metrics"

    def start(self, discover: Discover) -> None:
        """Answer from now on, in a thread of its own."""
        self._discover = discover
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_CLOSE_CHECK_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        if self._thread is not None:
            self._server.shutdown()
        self._server.server_close()

    # ---- answering, in the threads of the server --------------------------------------------------------

    def _guarded(self, environ: _Environment, start_response: _StartResponse) -> Iterable[bytes]:
        """As `_answer`. A defect becomes an event; the library would write a traceback between the events."""
        try:
            return self._answer(environ, start_response)
        except Exception as error:
            log.exception("metrics_failed", path=environ.get("PATH_INFO", ""), error=repr(error))
            return _respond(start_response, "500 Internal Server Error", "see this node's events\n")

    def _answer(self, environ: _Environment, start_response: _StartResponse) -> Iterable[bytes]:
        """Both paths. HEAD is answered like GET, without the body."""
        if not self._protection.allows(environ.get("HTTP_AUTHORIZATION", "")):
            text = "expected Authorization: Bearer with the token of telemetry.metrics_token_file\n"
            headers = {"WWW-Authenticate": "Bearer"}
            return _respond(start_response, "401 Unauthorized", text, **headers)
        if environ["REQUEST_METHOD"] == "HEAD":
            return self._without_body(environ, start_response)
        match environ.get("PATH_INFO", ""):
            case "/metrics":
                return self._metrics(environ, start_response)
            case "/sd":
                return self._targets(environ, start_response)
            case _:
                text = "expected /metrics or /sd\n"
                return _respond(start_response, "404 Not Found", text)

    def _targets(self, environ: _Environment, start_response: _StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET":
            text = "expected GET\n"
            return _respond(start_response, "405 Method Not Allowed", text, Allow="GET, HEAD")
        targets = self._discover(environ.get("REMOTE_ADDR", ""))
        if targets is None:
            text = "no node that knows all others answers\n"
            return _respond(start_response, "503 Service Unavailable", text)
        return _respond(start_response, "200 OK", json.dumps(targets), "application/json")

    def _without_body(
        self, environ: _Environment, start_response: _StartResponse
    ) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]]) -> None:
            told.append((status, [each for each in headers if each[0] != "Content-Length"]))

        told: list[tuple[str, list[tuple[str, str]]]] = []
        body = self._answer({**environ, "REQUEST_METHOD": "GET"}, start)
        ((status, headers),) = told
        length = str(sum(map(len, body)))
        start_response(status, [*headers, ("Content-Length", length)])
        return []


def _respond(
    start_response: _StartResponse, status: str, text: str, form: str = "text/plain", **headers: str
) -> list[bytes]:
    start_response(status, [("Content-Type", form), *headers.items()])
    return [text.encode()]


class _Handler(WSGIRequestHandler):
    """Writes nothing to standard error, and gives up a connection that stands still."""

    timeout = _STANDSTILL_TIMEOUT_S

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write nothing."""

    def address_string(self) -> str:
        """The asker's address, without the look-up of a name."""
        return str(self.client_address[0])


class _BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, and a bound on their number."""

    daemon_threads = True
    request_queue_size = 64
    """Askers that may wait for their connection. The library's 5 makes the kernel drop some, who then retry after a second."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free = threading.BoundedSemaphore(_CONNECTIONS_MAX)
        self._open: deque[socket.socket] = deque()
        self.context: Callable[[], ssl.SSLContext | None] = lambda: None
        """For a new connection; None for plain HTTP."""

    def get_request(self) -> tuple[Any, Any]:
        """A new connection. The handshake is for the thread of the connection."""
        connection, address = super().get_request()
        context = self.context()
        if context is not None:
            connection = context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def server_bind(self) -> None:
        """As the library does, without the look-up of this machine's name, which may wait for a DNS server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread; if all places are taken, close the oldest connection first."""
        if not self._free.acquire(blocking=False):
            with suppress(IndexError, OSError):
                self._open[0].shutdown(socket.SHUT_RDWR)
            if not self._free.acquire(timeout=_EVICT_TIMEOUT_S):
                self.shutdown_request(request)
                return
        self._open.append(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection and give its place back."""
        try:
            if isinstance(request, ssl.SSLSocket):
                request.settimeout(_STANDSTILL_TIMEOUT_S)
                request.do_handshake()
            super().process_request_thread(request, client_address)
        except OSError:
            # The handshake failed; nothing else gets here.
            self.shutdown_request(request)
        finally:
            with suppress(ValueError):
                self._open.remove(request)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An asker that went away is no event."""


class _BoundedServer6(_BoundedServer):
    """The same with IPv6."""

    address_family = socket.AF_INET6


def _family_of(address: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The kind of an address, and the address itself if a name was given."""
    found = socket.getaddrinfo(
        address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, place = found[0]
    return family, str(place[0])


def _mistake(address: str, port: int, error: OSError | ValueError) -> ConfigError:
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        return ConfigError(
            f"telemetry.metrics_port = {port}: {error.strerror} on {address}; expected a free port or 0"
        )
    return ConfigError(
        f"telemetry.metrics_address = {address!r}: {getattr(error, 'strerror', None) or error}; "
        "expected an address of this machine"
    )
