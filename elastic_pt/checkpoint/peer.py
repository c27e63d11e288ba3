"""Reads snapshots from the memory of another node's agent, over HTTP (in agents that mirror and workers that restore).

    GET /v1/snapshots/<generation>/<step>/<rank>           the shard file of a buffer; byte ranges
    GET /v1/snapshots/<generation>/<step>/<rank>/record    its `Snapshot`
    GET /v1/steps                                          the lines of the steps since the last commit
    GET /v1/snapshots/next?generation=&after=&copied=&mirror=   long poll: the newest step of the peer's own workers,
                                                           and the steps that they keep for the bucket

All requests need the run's access (`runlog.access`). `agent.snapshot_answers` answers them: a range has at most `RANGE_BYTES_MAX` bytes, and
a busy agent answers 503. A reader tries again then, at random moments. Every request has a timeout and a limit for the
size of the answer. A reader compares the bytes with the CRCs of the record, because a worker may overwrite a buffer at any
moment.
"""

import http.client
import io
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.snapshot import Snapshot
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.runlog.access import Access

STEPS_PATH: Final = "/v1/steps"
RANGE_BYTES_MAX: Final = 32 << 20
_CHUNK_BYTES: Final = 4 << 20
_BUSY: Final = (429, 503)
_BUSY_S: Final = 60.0
"""Maximum time for which a busy agent is asked again."""
_AGAIN_S: Final = 0.2
_BYTES_PER_S_MIN: Final = 1 << 20
"""An answer that comes more slowly is given up: a peer that sends a byte now and then would never time out."""

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def snapshot_path(generation: int, step: int, rank: int) -> str:
    """The HTTP path of a buffer's shard file."""
    return f"/v1/snapshots/{generation}/{step}/{rank}"


@dataclass(frozen=True)
class PeerAddress:
    """The address of a node's agent."""

    host: str
    port: int


class _Bounded(io.RawIOBase):
    """What a socket receives, if it comes fast enough. The socket's own timeout counts for each piece alone."""

    def __init__(self, connection: socket.socket, until_s: float) -> None:
        """Each byte moves the end `until_s` by `1 / _BYTES_PER_S_MIN` seconds."""
        # The second file of the socket: it stays open until both are closed.
        self._raw: socket.SocketIO = connection.makefile("rb", buffering=0)
        self._until_s = until_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        if time.monotonic() > self._until_s:
            raise TimeoutError("the answer comes too slowly")
        count = self._raw.readinto(buffer)
        self._until_s += (count or 0) / _BYTES_PER_S_MIN
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that must be complete in time."""

    def __init__(self, connection: socket.socket, until_s: float, method: str) -> None:
        super().__init__(connection, method=method)
        self.fp.close()
        self.fp = io.BufferedReader(_Bounded(connection, until_s))


class Peer:
    """A client of one agent. Thread-safe: each thread has its own connection."""

    def __init__(self, address: PeerAddress, access: Access, timeout_s: float) -> None:
        self._address = address
        self._headers = access.headers
        self._url = access.url(address.host, address.port)
        self._tls = access.client_context()
        self._timeout_s = timeout_s
        self._own = threading.local()
        self._lock = threading.Lock()
        self._closed = False
        self._connections: set[http.client.HTTPConnection] = set()

    def close(self) -> None:
        """Let every request fail, also those in progress in other threads."""
        with self._lock:
            self._closed = True
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def __str__(self) -> str:
        return self._url

    def record(self, path: str) -> Snapshot:
        """The record of the buffer at `path`. Raises the errors of `read_into`."""
        data = self.get(f"{path}/record", DOCUMENT_BYTES_MAX)
        if data is None:
            raise CheckpointError(f"{self}{path}: the peer does not hold it any more")
        return Snapshot.from_bytes(data)

    def get(self, path: str, bytes_max: int, timeout_s: float | None = None) -> bytes | None:
        """The body of the answer; None if the status is 204 or 404. Raises `StoreError` for any failure."""
        response = self._ask(path, {}, timeout_s)
        try:
            body = response.read(bytes_max + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(path, error) from error
        if len(body) > bytes_max:
            self._drop()
            raise StoreError(f"{self}{path}: more than {bytes_max} bytes; expected fewer")
        return None if response.status in (204, 404) else body

    def read_into(self, path: str, start: int, *targets: memoryview) -> None:
        """Fill the targets, one after another, with the bytes of a shard file from `start` on.

        A request has at most `RANGE_BYTES_MAX` bytes. Raises `CheckpointError` if the peer no longer holds the file.
        Raises `StoreError` if the peer cannot be reached, answers with another error, or sends fewer bytes.
        """
        wanted: list[memoryview] = []
        room = RANGE_BYTES_MAX
        for target in targets:
            for offset in range(0, len(target), RANGE_BYTES_MAX):
                part = target[offset : offset + RANGE_BYTES_MAX]
                if len(part) > room:
                    start += self._read_range(path, start, wanted)
                    wanted, room = [], RANGE_BYTES_MAX
                wanted.append(part)
                room -= len(part)
        if wanted:
            self._read_range(path, start, wanted)

    def _read_range(self, path: str, start: int, targets: Sequence[memoryview]) -> int:
        """Fill the targets with one request. Returns their bytes."""
        size = sum(len(target) for target in targets)
        wanted = {"Range": f"bytes={start}-{start + size - 1}"}
        response = self._ask(path, wanted, None)
        try:
            if response.status == 404:
                self._drop()
                raise CheckpointError(f"{self}{path}: the peer does not hold it any more")
            total = 0
            for target in targets:
                filled = 0
                while filled < len(target):
                    count = response.readinto(target[filled : filled + _CHUNK_BYTES])
                    if count == 0:
                        self._drop()
                        raise StoreError(f"{self}{path}: {total} bytes, expected {size}")
                    filled += count
                    total += count
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(path, error) from error
        return size

    def _ask(
        self, path: str, headers: dict[str, str], timeout_s: float | None
    ) -> http.client.HTTPResponse:
        """Send a request, again and again while the agent is busy."""
        until_s = time.monotonic() + _BUSY_S
        while True:
            response = self._ask_once(path, headers, timeout_s)
            if response.status in (200, 204, 206, 404):
                return response
            self._drop()
            if response.status not in _BUSY or time.monotonic() > until_s:
                raise StoreError(f"{self}{path}: HTTP status {response.status}")
            time.sleep(random.uniform(0.0, _AGAIN_S))

    def _ask_once(
        self, path: str, headers: dict[str, str], timeout_s: float | None
    ) -> http.client.HTTPResponse:
        """Send a request. Retry once on a new connection if the kept connection fails."""
        for kept in (True, False):
            connection = getattr(self._own, "connection", None) if kept else None
            # The peer may have closed it after its last answer.
            if kept and (connection is None or connection.sock is None):
                continue
            try:
                if connection is None or connection.sock is None:
                    connection = self._connect()
                limit_s = timeout_s or self._timeout_s
                connection.sock.settimeout(limit_s)
                until_s = time.monotonic() + limit_s
                connection.response_class = partial(_Answer, until_s=until_s)  # type: ignore[assignment]
                connection.request("GET", path, headers=self._headers | headers)
                response: http.client.HTTPResponse = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if not kept:
                    raise StoreError(f"{self}{path}: {error or type(error).__name__}") from error
                continue
            return response
        raise AssertionError("unreachable")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            if self._tls is None
            else http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
        )
        self._own.connection = connection
        with self._lock:
            self._connections.add(connection)
        connection.connect()
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("closed")
        return connection

    def _failed(self, path: str, error: Exception) -> StoreError:
        self._drop()
        return StoreError(f"{self}{path}: {error or type(error).__name__}")

    def _drop(self) -> None:
        """Close this thread's connection: unread bytes of an answer may be left in it."""
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
        self._own.connection = None
