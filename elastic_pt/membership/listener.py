"""The listening socket of an agent: nobody who is not of the run keeps others out, or takes all open files.

    accept ─► TLS handshake ─► first request ─► `Listener.admit`: has certificate and token, may stay
      └────── a stranger up to here: closed after `_STRANGER_S`, and at `strangers_max` the oldest one of the
              address with the most of them is closed for the newest

asyncio's own server has no such limits, and neither has aiohttp's for a request that arrives byte by byte. Agent process, on
the event loop of the membership thread.
"""

import asyncio
import os
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog
from aiohttp import web

from elastic_pt.errors import ConfigError

_BACKLOG: Final = 128
_STRANGER_S: Final = 10.0
"""A connection without an authorized request by then is closed."""
_STRANGERS_MAX: Final = 256
"""Few, because a TLS handshake that has begun holds buffers of some hundred kilobytes."""
_SHARE_OF_FILES: Final = 4
"""Strangers have at most one of so many of the files that this process may open."""
_SWEEP_S: Final = 0.5
_CLOSING_S: Final = 0.1
_FULL_S: Final = 0.1

log = structlog.get_logger("elastic_pt.links")


@dataclass(frozen=True)
class _Stranger:
    """A connection that has not shown that it is of the run."""

    connection: socket.socket
    address: str
    until_s: float

    @property
    def is_open(self) -> bool:
        """Whether its transport has not closed it."""
        return self.connection.fileno() >= 0

    def end(self) -> None:
        """Close it. Its transport finds the end of the stream, and frees the rest."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Listener:
    """Accepts connections for a handler of HTTP requests."""

    def __init__(
        self,
        make_handler: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext | None,
        strangers_max: int | None = None,
    ) -> None:
        """`context` is None for plain text."""
        self._make_handler = make_handler
        self._context = context
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        own = _STRANGERS_MAX if files < 0 else min(_STRANGERS_MAX, files // _SHARE_OF_FILES)
        self._strangers_max = strangers_max or own
        self._strangers: dict[int, _Stranger] = {}
        """By file descriptor, oldest first."""
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, address: str, port: int) -> int:
        """Accept connections from now on at `port` (0 takes a free one); returns the port. Raises `ConfigError` if it is in use."""
        family, kind, protocol, _, place = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.setblocking(False)
            listening.bind(place)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            if port == 0:
                raise
            raise ConfigError(
                f"elastic.port = {port}: {os.strerror(error.errno or 0)} at {address}; expected a free port or 0"
            ) from error
        self._socket = listening
        self._start(self._accept(listening))
        self._start(self._sweep())
        return int(listening.getsockname()[1])

    def admit(self, request: web.BaseRequest) -> None:
        """The connection of this request belongs to the run."""
        transport = request.transport
        connection = None if transport is None else transport.get_extra_info("socket")
        if connection is not None:
            self._strangers.pop(connection.fileno(), None)

    async def close(self) -> None:
        """Accept no more. Admitted connections stay open."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stranger in self._strangers.values():
            stranger.end()
        if self._socket is not None:
            self._socket.close()

    def _start(self, work: Coroutine[object, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop, failing = asyncio.get_running_loop(), False
        while True:
            try:
                connection, place = await loop.sock_accept(listening)
                failing = False
            except OSError as error:
                # The peer is gone again, or no file is free: the next one may be.
                if not failing:
                    log.warning("connection_not_accepted", cause=error.strerror or str(error))
                failing = True
                await asyncio.sleep(_FULL_S)
                continue
            self._make_room()
            until_s = loop.time() + _STRANGER_S
            # A new connection has the number of a closed one at most.
            self._strangers.pop(connection.fileno(), None)
            self._strangers[connection.fileno()] = _Stranger(connection, str(place[0]), until_s)
            self._start(self._begin(connection))

    async def _begin(self, connection: socket.socket) -> None:
        """The handshake."""
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_handler,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=_STRANGER_S if self._context else None,
                ssl_shutdown_timeout=_CLOSING_S if self._context else None,
            )
        except (OSError, TimeoutError):
            # No certificate of the run, no TLS at all, or gone.
            connection.close()

    def _make_room(self) -> None:
        if len(self._strangers) < self._strangers_max:
            return
        self._forget_closed()
        while len(self._strangers) >= self._strangers_max:
            ((most, _),) = Counter(each.address for each in self._strangers.values()).most_common(1)
            number = next(key for key, each in self._strangers.items() if each.address == most)
            self._strangers.pop(number).end()

    def _forget_closed(self) -> None:
        for number in [key for key, each in self._strangers.items() if not each.is_open]:
            del self._strangers[number]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._forget_closed()
            now_s = asyncio.get_running_loop().time()
            for number in [k for k, each in self._strangers.items() if each.until_s < now_s]:
                self._strangers.pop(number).end()
