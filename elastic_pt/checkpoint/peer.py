"""Reads snapshots from the memory of another node's agent, over HTTP (in agents that mirror and workers that restore).

    GET /v1/snapshots/<generation>/<step>/<rank>           the shard file of a buffer; byte ranges
    GET /v1/snapshots/<generation>/<step>/<rank>/record    its `Snapshot`
    GET /v1/steps                                          the lines of the steps since the last commit
    GET /v1/snapshots/next?generation=&after=&copied=&mirror=   long poll: the newest step of the peer's own workers,
                                                           and the steps that they keep for the bucket

All requests need the run's token. `agent.snapshot_answers` answers them: a range has at most `RANGE_BYTES_MAX` bytes, and
a busy agent answers 503. A reader tries again then, at random moments. Every request has a timeout and a limit for the
size of the answer. A reader compares the bytes with the CRCs of the record, because a worker may overwrite a buffer at any
moment.
"""

import http.client
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.snapshot import Snapshot
from elastic_pt.errors import CheckpointError, StoreError

STEPS_PATH: Final = "/v1/steps"
RANGE_BYTES_MAX: Final = 32 << 20
_CHUNK_BYTES: Final = 4 << 20
_BUSY: Final = (429, 503)
_BUSY_S: Final = 60.0
"""Maximum time for which a busy agent is asked again."""
_AGAIN_S: Final = 0.2


def snapshot_path(generation: int, step: int, rank: int) -> str:
    """The HTTP path of a buffer's shard file."""
    return f"/v1/snapshots/{generation}/{step}/{rank}"


@dataclass(frozen=True)
class PeerAddress:
    """The address of a node's agent."""

    host: str
    port: int


class Peer:
    """A client of one agent. Thread-safe: each thread has its own connection."""

    def __init__(self, address: PeerAddress, token: str, timeout_s: float) -> None:
        self._address = address
        self._headers = {"Authorization": f"Bearer {token}"}
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
        return f"http://{self._address.host}:{self._address.port}"

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
        response = self._ask(path, {"Range": f"bytes={start}-{start + size - 1}"}, None)
        try:
            if response.status == 404:
                response.read()
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
                connection.sock.settimeout(timeout_s or self._timeout_s)
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
        connection = http.client.HTTPConnection(
            self._address.host, self._address.port, timeout=self._timeout_s
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
