"""Reads snapshots from the memory of another node's agent, over HTTP (in agents that mirror and workers that restore).

    GET /v1/snapshots/<generation>/<step>/<rank>           the shard file of a buffer; byte ranges
    GET /v1/snapshots/<generation>/<step>/<rank>/record    its `Snapshot`
    GET /v1/steps                                          the lines of the steps since the last commit
    GET /v1/snapshots/next?generation=&after=&mirror=      long poll: the newest step of the peer's own workers, and the
                                                           steps that they keep for the bucket

All requests need the run's token. `agent.snapshots` answers them. Every request has a timeout and a limit for the size
of the answer. A reader compares the bytes with the CRCs of the record, because a worker may overwrite a buffer at any
moment.
"""

import http.client
import threading
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.snapshot import Snapshot
from elastic_pt.errors import CheckpointError, StoreError

STEPS_PATH: Final = "/v1/steps"
_CHUNK_BYTES: Final = 4 << 20


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

    def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of a shard file."""
        data = bytearray(end - start)
        self.read_into(path, start, memoryview(data))
        return bytes(data)

    def read_into(self, path: str, start: int, *targets: memoryview) -> None:
        """Fill the targets, one after another, with the bytes of a shard file from `start` on, in one request.

        Raises `CheckpointError` if the peer no longer holds the file. Raises `StoreError` if the peer cannot be reached,
        answers with another error, or sends fewer bytes.
        """
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

    def _ask(
        self, path: str, headers: dict[str, str], timeout_s: float | None
    ) -> http.client.HTTPResponse:
        """Send a request. Retry once on a new connection if the kept connection fails."""
        for kept in (True, False):
            connection = getattr(self._own, "connection", None) if kept else None
            if kept and connection is None:
                continue
            try:
                if connection is None:
                    connection = self._own.connection = http.client.HTTPConnection(
                        self._address.host, self._address.port, timeout=self._timeout_s
                    )
                    connection.connect()
                connection.sock.settimeout(timeout_s or self._timeout_s)
                connection.request("GET", path, headers=self._headers | headers)
                response: http.client.HTTPResponse = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if not kept:
                    raise StoreError(f"{self}{path}: {error or type(error).__name__}") from error
                continue
            if response.status not in (200, 204, 206, 404):
                self._drop()
                raise StoreError(f"{self}{path}: HTTP status {response.status}")
            return response
        raise AssertionError("unreachable")

    def _failed(self, path: str, error: Exception) -> StoreError:
        self._drop()
        return StoreError(f"{self}{path}: {error or type(error).__name__}")

    def _drop(self) -> None:
        """Close this thread's connection: unread bytes of an answer may be left in it."""
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
        self._own.connection = None
