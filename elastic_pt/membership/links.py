"""The connections between agents: one WebSocket to each peer that is asked, with messages as JSON text.

    GET /v1/link        (WebSocket) `Message`s in both directions; see `membership.peers`
    GET /v1/status      this node's NodeStatus, for people and `elastic-pt status`
    GET /v1/endpoints   where this node, and those that it hears, serve metrics; see `membership.discovery`
    GET ...             what `Resources.states` answers: rows that this node holds in memory

All need the run's certificate and its token (`runlog.access`). An open connection shows at once that the peer's process
has ended: the kernel closes it, and the next attempt to connect is refused. A second refusal counts. If the peer's machine
or network is gone, only its silence shows that.
"""

import asyncio
import errno
import hmac
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import aiohttp
import structlog
from aiohttp import web
from pydantic import ValidationError

from elastic_pt.membership.endpoints import ENDPOINTS
from elastic_pt.membership.listener import Listener
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.peers import MESSAGE, STATUS, Message
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.records import Member
from elastic_pt.telemetry.http_log import http_logger

_MESSAGE_BYTES_MAX: Final = 256 * 1024
_REFUSALS_UNTIL_GONE: Final = 2
_AGAIN_S: Final = 0.02
_CLOSING_S: Final = 0.1
_KEPT_S: Final = 60.0
"""A connection of a peer without a request for so long is closed; its next request opens another one."""

log = structlog.get_logger("elastic_pt.links")


class _AnotherIncarnation(Exception):
    """Another incarnation answers at the peer's address."""


class _Link:
    """One open connection. A message is built when it is sent, so it is never outdated."""

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self._send = send
        self._wake = asyncio.Event()
        self._asks = False
        self.incarnation = ""
        """The incarnation at the other end; empty until it is known."""

    def say(self, *, asks: bool) -> None:
        """Send a message as soon as possible. Several calls in a row become one message."""
        self._asks = self._asks or asks
        self._wake.set()

    async def pump(
        self, make: Callable[[str, bool], Message], interval_s: Callable[[], float] | None
    ) -> None:
        """Send after each `say`, and ask after each interval if there is one. Ends with the connection."""
        while True:
            try:
                async with asyncio.timeout(None if interval_s is None else interval_s()):
                    await self._wake.wait()
            except TimeoutError:
                self._asks = True
            asks, self._asks = self._asks, False
            self._wake.clear()
            try:
                await self._send(MESSAGE.dump_json(make(self.incarnation, asks)).decode())
            except (aiohttp.ClientError, ConnectionError):
                return


class Links:
    """All connections of one agent. Agent process; lives on the event loop of the membership thread."""

    def __init__(
        self, participant: Participant, access: Access, on_news: Callable[[], None]
    ) -> None:
        self._participant = participant
        self._access = access
        self._on_news = on_news
        self._open: set[_Link] = set()
        self._dials: dict[str, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._listener: Listener | None = None

    async def serve(self, address: str, port: int = 0) -> int:
        """Answer peers on `port` of `address` (0 takes a free one); returns the port. Raises `ConfigError` if it is in use."""
        application = web.Application()
        application.add_routes(
            [
                web.get("/v1/link", self._accept),
                web.get("/v1/status", self._status),
                web.get("/v1/endpoints", self._endpoints),
            ]
        )
        for path, answer in self._participant.states.routes.items():
            application.router.add_get(path, partial(self._answer, answer), allow_head=False)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=http_logger(),
            shutdown_timeout=_CLOSING_S,
            keepalive_timeout=_KEPT_S,
            auto_decompress=False,
        )
        await self._runner.setup()
        assert self._runner.server is not None
        self._listener = Listener(self._runner.server, self._access.server_context())
        port = self._listener.listen(address, port)
        self._session = aiohttp.ClientSession(
            headers=self._access.headers,
            connector=aiohttp.TCPConnector(limit=0, ssl=self._access.client_context() or True),
            auto_decompress=False,
        )
        return port

    def aim(self, targets: Sequence[Member]) -> None:
        """Keep a connection to each of these nodes, and to no other."""
        wanted = {each.incarnation: each for each in targets}
        for incarnation, member in wanted.items():
            if incarnation not in self._dials:
                self._dials[incarnation] = asyncio.create_task(self._dial(member))
        for incarnation in set(self._dials) - set(wanted):
            self._dials.pop(incarnation).cancel()

    def say(self, *, asks: bool) -> None:
        """Send the own status to every connected peer at once; with `asks` they answer at once."""
        for link in self._open:
            link.say(asks=asks)

    async def close(self) -> None:
        """Close all connections and the server."""
        for dial in self._dials.values():
            dial.cancel()
        await asyncio.gather(*self._dials.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        if self._listener is not None:
            await self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- answering -------------------------------------------------------------------------------

    def _authorized(self, request: web.Request) -> bool:
        # The bytes as they were sent: they need not be UTF-8.
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._access.headers["Authorization"].encode()):
            return False
        assert self._listener is not None
        self._listener.admit(request)
        return True

    async def _status(self, request: web.Request) -> web.Response:
        if not self._authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        body = STATUS.dump_json(self._participant.me.now)
        return web.Response(body=body, content_type="application/json")

    async def _endpoints(self, request: web.Request) -> web.Response:
        if not self._authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        body = ENDPOINTS.dump_json(self._participant.known.endpoints())
        return web.Response(body=body, content_type="application/json")

    async def _answer(self, answer: Answer, request: web.Request) -> web.StreamResponse:
        if not self._authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        return await answer(request)

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        if not self._authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        socket = web.WebSocketResponse(
            max_msg_size=_MESSAGE_BYTES_MAX, timeout=_CLOSING_S, compress=False
        )
        await socket.prepare(request)
        link = _Link(socket.send_str)
        pump: asyncio.Task[None] | None = None
        try:
            async for received in socket:
                message = message_in(received)
                if message is None:
                    break
                sender = message.status.member.incarnation
                if link.incarnation not in ("", sender):
                    # A node speaks for itself only, so what it says stays with its own connection.
                    log.warning("link_changed_sender", peer=link.incarnation, claims=sender)
                    break
                link.incarnation = sender
                if pump is None:
                    self._open.add(link)
                    pump = asyncio.create_task(link.pump(self._make, None))
                self._take(link, message)
        finally:
            self._open.discard(link)
            if pump is not None:
                pump.cancel()
            if link.incarnation:
                self._participant.contacts.hung_up(link.incarnation)
                self._on_news()
        return socket

    # ---- asking ----------------------------------------------------------------------------------

    async def _dial(self, member: Member) -> None:
        """Keep one connection to a node until cancelled."""
        table = self._participant.table
        refusals = 0
        told = ""
        while True:
            worked = False
            try:
                worked = await self._talk(member)
                refusals = 0
            except _AnotherIncarnation:
                refusals = _REFUSALS_UNTIL_GONE
            except aiohttp.ClientConnectorError as error:
                refusals += error.os_error.errno == errno.ECONNREFUSED
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if repr(error) != told:
                    told = repr(error)
                    log.warning("link_failed", peer=member.node, cause=told)
            if refusals >= _REFUSALS_UNTIL_GONE:
                table.refused(member.incarnation)
                self._on_news()
            # Retry at once if the peer's process may just have ended; otherwise after an interval.
            at_once = worked or refusals == 1
            await asyncio.sleep(_AGAIN_S if at_once else self._participant.interval_s())

    async def _talk(self, member: Member) -> bool:
        """Use one connection until it ends. Returns whether the peer sent a message over it."""
        assert self._session is not None
        table = self._participant.table
        silence_s = self._participant.known.silence_s()
        # Not `asyncio.wait_for`: before Python 3.12 it may lose the cancellation that ends this task.
        async with asyncio.timeout(silence_s):
            socket = await self._session.ws_connect(
                self._access.url(member.address, member.port) + "/v1/link",
                max_msg_size=_MESSAGE_BYTES_MAX,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSING_S),
                compress=0,
            )
        link = _Link(socket.send_str)
        link.incarnation = member.incarnation
        pump = asyncio.create_task(link.pump(self._make, self._participant.interval_s))
        self._open.add(link)
        link.say(asks=True)
        worked = False
        try:
            while True:
                # A connection may stay stuck long after the network works again, so it gets a timeout.
                async with asyncio.timeout(silence_s):
                    received = await socket.receive()
                message = message_in(received)
                if message is None:
                    return worked
                if message.status.member.incarnation != member.incarnation:
                    raise _AnotherIncarnation
                worked = True
                table.reached(member.incarnation)
                self._take(link, message)
        finally:
            self._open.discard(link)
            pump.cancel()
            with suppress(Exception):
                async with asyncio.timeout(_CLOSING_S):
                    await socket.close()

    # ---- both ------------------------------------------------------------------------------------

    def _make(self, incarnation: str, asks: bool) -> Message:
        return self._participant.message_to(incarnation, asks=asks)

    def _take(self, link: _Link, message: Message) -> None:
        news = self._participant.received(message)
        if message.asks:
            link.say(asks=False)
        if news:
            self._on_news()


def message_in(received: aiohttp.WSMessage) -> Message | None:
    """The message in a frame; None if the connection has ended or the frame is no message."""
    if received.type is not aiohttp.WSMsgType.TEXT:
        return None
    try:
        return MESSAGE.validate_json(received.data)
    except ValidationError:
        return None
