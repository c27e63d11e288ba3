"""Notices that an operator's tool sends: an HTTP server of this agent, for signed requests only.

    POST /v1/notices                           the fields of `message.Message`, as JSON
    X-Elastic-PT-Timestamp: 1764248000         Unix time in whole seconds, at most five minutes off
    X-Elastic-PT-Signature: 9f86d0...          HMAC-SHA256, in hex, over TIMESTAMP "." BODY

The key is the run's token (the object `secret/token` in the run directory), so anyone who may read it can send a
notice. The key is never sent. A signature is accepted once, and `node` must name this node. So a recorded
request cannot be replayed, here or at another node.

    200 accepted   400 malformed   401 not signed, wrongly signed, too old, or used before   404 for another node
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
from aiohttp import web

from elastic_pt.notices.http import json_object
from elastic_pt.notices.message import Message, id_of, parse_message
from elastic_pt.notices.notice import Announcement, SourceError
from elastic_pt.telemetry.http_log import http_logger

PATH: Final = "/v1/notices"
TIMESTAMP: Final = "X-Elastic-PT-Timestamp"
SIGNATURE: Final = "X-Elastic-PT-Signature"
_WINDOW_S: Final = 300.0
_BODY_BYTES_MAX: Final = 16 * 1024
_BODY_TIMEOUT_S: Final = 5.0
_EVENTS_MAX: Final = 64
_CLOSING_S: Final = 0.1


def sign(key: bytes, timestamp: str, body: bytes) -> str:
    """The signature of a request."""
    return hmac.new(key, _bytes(timestamp) + b"." + body, hashlib.sha256).hexdigest()


def _bytes(header: str) -> bytes:
    """The bytes of a header as they were sent."""
    return header.encode("utf-8", "surrogateescape")


class Webhook:
    """The server, and the events that it received and that were not withdrawn."""

    name = "webhook"
    interval_s = 0.0

    def __init__(
        self,
        address: str,
        port: int,
        node: str,
        key: bytes,
        unix_time_s: Callable[[], float] = time.time,
    ) -> None:
        """`key` is that of the signatures."""
        self._address = address
        self._port = port
        self._node = node
        self._key = key
        self._unix_time_s = unix_time_s
        self._events: dict[str, Announcement] = {}
        self._seen: dict[str, float] = {}
        """Accepted signatures, with the time of their request."""
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def read(self, _: aiohttp.ClientSession) -> Sequence[Announcement]:
        """Wait for a request and return all events in force. The first call only starts to listen."""
        if self._runner is None:
            await self._listen()
            return []
        try:
            await self._changed.wait()
        except asyncio.CancelledError:
            await self._runner.cleanup()
            raise
        self._changed.clear()
        return list(self._events.values())

    async def _listen(self) -> None:
        application = web.Application(client_max_size=_BODY_BYTES_MAX)
        application.add_routes([web.post(PATH, self._take)])
        runner = web.AppRunner(
            application, access_log=None, logger=http_logger(), shutdown_timeout=_CLOSING_S
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._address, self._port).start()
        except OSError as error:
            await runner.cleanup()
            raise SourceError(
                f"{self._address}:{self._port}: {error.strerror}; expected a free port of this machine"
            ) from error
        self._runner = runner

    async def _take(self, request: web.Request) -> web.Response:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            body = await request.read()
        refusal = self._refuse(request, body)
        if refusal:
            return web.Response(status=401, text=f"{refusal}\n")
        try:
            fields = json_object(body.decode("utf-8", "replace"), "body")
            message = parse_message(fields, "body")
            self._check_event(message)
        except SourceError as error:
            return web.Response(status=400, text=f"{error}\n")
        if message.node != self._node:
            told = f"body: node = {message.node!r}; expected {self._node!r}\n"
            return web.Response(status=404, text=told)
        event = message.announcement(id_of(body))
        if message.withdrawn:
            self._events.pop(event.event_id, None)
        else:
            self._events[event.event_id] = event
        self._changed.set()
        return web.json_response({"node": self._node, "event_id": event.event_id})

    def _check_event(self, message: Message) -> None:
        if message.withdrawn and not message.event_id:
            raise SourceError("body: event_id = ''; expected the id of the withdrawn event")
        if not message.withdrawn and len(self._events) >= _EVENTS_MAX:
            raise SourceError(
                f"body: more than {_EVENTS_MAX} events; expected some to be withdrawn first"
            )

    def _refuse(self, request: web.Request, body: bytes) -> str:
        """Why a request is refused; empty if it is accepted. An accepted signature is then used up."""
        timestamp, given = request.headers.get(TIMESTAMP, ""), request.headers.get(SIGNATURE, "")
        wanted = sign(self._key, timestamp, body)
        if not hmac.compare_digest(_bytes(given), wanted.encode()):
            return f"{SIGNATURE} is missing or wrong; expected HMAC-SHA256 with the run's token"
        now_s = self._unix_time_s()
        if not timestamp.isdecimal() or abs(now_s - int(timestamp)) > _WINDOW_S:
            return f"{TIMESTAMP}: {timestamp}; expected the Unix time, at most {_WINDOW_S:g} s off"
        # A request with a later timestamp stays valid for longer.
        self._seen = {each: at for each, at in self._seen.items() if now_s - at <= _WINDOW_S}
        if given in self._seen:
            return "this request was used before"
        self._seen[given] = int(timestamp)
        return ""
