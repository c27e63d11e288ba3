"""The part of the fault proxy that serves one request: it reads, forwards and answers, and does what the faults say."""

import http.client
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from elastic_pt.chaos.s3_answers import first, flipped, without_newest
from elastic_pt.chaos.s3_faults import (
    Answer,
    Bandwidth,
    Cut,
    Delay,
    FlipBit,
    Hang,
    HideNewest,
    Request,
    Reset,
    Rule,
    Truncate,
)

_HOP_BY_HOP: Final = frozenset(
    {"connection", "expect", "keep-alive", "transfer-encoding", "date", "server"}
)
_WITHOUT_BODY: Final = (204, 304)
_UPSTREAM_TIMEOUT_S: Final = 60.0
_PIECE_BYTES: Final = 1 << 16
_PIECES_PER_S: Final = 20
"""A limited body passes in so many pieces a second."""
_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_WITH_OBJECT: Final = (200, 206)


class Relay(BaseHTTPRequestHandler):
    """One connection of a client. `FaultProxy` makes a subclass that has the two attributes below."""

    upstream: str
    """Host and port of the server."""
    take: Callable[[Request], list[Rule]]
    """Asked once for each request: the rules that strike it, at most the last of which does not only slow it."""
    protocol_version = "HTTP/1.1"
    _rules: list[Rule]
    """Those that strike the request which is being served."""

    def _serve(self) -> None:
        self._rules = self.take(Request.of(self.command, self.path))
        for rule in self._rules:
            if isinstance(rule.fault, Delay):
                rule.wait(rule.fault.seconds)
        try:
            self._act()
        except (OSError, http.client.HTTPException):
            # The client or the server is gone. The client sees a closed connection.
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _act(self) -> None:
        rule = self._rules[-1] if self._rules else None
        match rule.fault if rule else None:
            case Answer() as fault:
                self._consume(fault.carried_out)
                text = f"<Error><Code>{fault.code}</Code><Message>declared fault</Message></Error>"
                body = (fault.body or text).encode()
                headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
                self._send_head(fault.status, headers)
                self._send_body([] if self.command == "HEAD" else [body])
            case Hang() as fault if rule:
                self._consume(carry_out=False)
                rule.wait(fault.seconds)
                self.close_connection = True
            case Cut() as fault:
                self._consume(fault.carried_out)
                self.close_connection = True
            case Reset(in_answer=False):
                self._reset()
            case _:
                self._forward(self._relay)

    def _consume(self, carry_out: bool) -> None:
        """Read the request and do not answer it."""
        if carry_out:
            self._forward(lambda answer: answer.read())
        else:
            for _ in self._body():
                pass

    def _forward(self, use: Callable[[http.client.HTTPResponse], object]) -> None:
        """Let the server carry the request out, and `use` its answer."""
        upstream = http.client.HTTPConnection(self.upstream, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            # The Host header stays the client's: it is part of the signature.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.endheaders()
            for piece in self._body():
                upstream.send(piece)
            use(upstream.getresponse())
        finally:
            upstream.close()

    def _body(self) -> Iterator[bytes]:
        """The pieces of the request's body."""
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(left, self._piece_bytes()))  # type: ignore[attr-defined]
            if not piece:
                raise ConnectionError("the client has gone")
            left -= len(piece)
            self._limit(len(piece), up=True)
            yield piece

    def _relay(self, answer: http.client.HTTPResponse) -> None:
        """Answer as the server did, but for the fault."""
        rule = self._rules[-1] if self._rules else None
        fault = rule.fault if rule else None
        headers = [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP_BY_HOP]
        if self.command == "HEAD" or answer.status in _WITHOUT_BODY or answer.length == 0:
            if isinstance(fault, Reset):
                self.wfile.write(b"HTTP/1.1 ")
                self._reset()
                return
            if rule and isinstance(fault, Truncate | HideNewest | FlipBit):
                rule.spare()
            self._send_head(answer.status, headers)
            return
        pieces: Iterable[bytes] = iter(lambda: answer.read(self._piece_bytes()), b"")
        size = answer.length
        if size is None or isinstance(fault, HideNewest):
            body = answer.read()
            if rule and isinstance(fault, HideNewest):
                before, body = body, without_newest(body, fault.keys)
                if body == before:
                    rule.spare()
            pieces, size = [body], len(body)
        if rule and isinstance(fault, FlipBit):
            if answer.status in _WITH_OBJECT:
                pieces = flipped(pieces, rule.any_of(8 * size))
            else:
                rule.spare()
        others = [pair for pair in headers if pair[0].lower() != "content-length"]
        self._send_head(answer.status, [*others, ("Content-Length", str(size))])
        if isinstance(fault, Truncate | Reset):
            pieces = first(pieces, size // 2)
        sent = self._send_body(pieces)
        if isinstance(fault, Reset):
            self._reset()
        elif sent < size:
            self.close_connection = True

    def _send_head(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, pieces: Iterable[bytes]) -> int:
        sent = 0
        for piece in pieces:
            self._limit(len(piece), up=False)
            self.wfile.write(piece)
            sent += len(piece)
        return sent

    def _reset(self) -> None:
        """Let the kernel send an RST when the connection is closed."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self.close_connection = True

    def _limits(self) -> list[tuple[Rule, int]]:
        return [
            (rule, rule.fault.bytes_per_s)
            for rule in self._rules
            if isinstance(rule.fault, Bandwidth)
        ]

    def _piece_bytes(self) -> int:
        rates = [rate // _PIECES_PER_S for _, rate in self._limits()]
        return max(1, min([_PIECE_BYTES, *rates]))

    def _limit(self, size: int, *, up: bool) -> None:
        """Wait until so many bytes may pass."""
        for rule, _ in self._limits():
            rule.wait((rule.up if up else rule.down).after_s(size))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: each rule counts."""
