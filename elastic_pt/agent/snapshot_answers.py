"""Answers what peers ask about the states in this node's memory, on the membership's event loop; see `checkpoint.peer`.

routes ─► SnapshotAnswers ─► Shared (`agent.snapshots`): which step is next, where a copy lies
               └─► the buffer's file ─► byte ranges of it, block by block
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

import structlog
from aiohttp import web

from elastic_pt.agent.holdings import Copy
from elastic_pt.checkpoint.peer import RANGE_BYTES_MAX, STEPS_PATH
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, Buffer
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.state import State

_SEND_S: Final = 10.0
_SEND_BYTES_PER_S: Final = 1 << 20
"""The slowest reader that is served to its end."""
_BLOCK_BYTES: Final = 256 << 10
_SENDS_MAX: Final = 16
"""Most ranges that are sent at the same time."""
_QUEUE_MAX: Final = 64
_QUEUE_S: Final = 0.5
"""Most ranges that wait for that, and for how long. A reader of any other one has to ask again."""
_POLL_S: Final = 5.0
"""Maximum time of a long poll for the next step."""

log = structlog.get_logger("elastic_pt.agent.snapshots")


class NextStep(NamedTuple):
    """The answer to a mirror."""

    step: int
    """The newest step of this node's workers."""
    kept: list[int]
    """The steps that they keep for the bucket."""
    complete: int
    """The newest step that is complete on all nodes, 0 for none. A mirror overwrites older and newer ones first."""


class Shared(Protocol):
    """The part of `Snapshots` that peers may ask for. Thread-safe."""

    def acknowledge(self, generation: int, mirror: str, step: int, *, copied: bool) -> bool:
        """A mirror has copied this step, or has no room for it. False if the generation is not this node's."""

    def next_step(self, generation: int, after: int) -> NextStep | None:
        """What a mirror copies after step `after`; None if there is nothing yet or the generation has ended."""

    def find(self, state: State, rank: int) -> Copy | None:
        """This node's copy of the rows of one worker; None if it has none."""

    def lost(self, buffer: Buffer) -> None:
        """The file of a buffer cannot be read."""


class SnapshotAnswers:
    """The handlers of peers' requests. Lives on one event loop; `wake` may be called from any thread."""

    def __init__(self, shared: Shared, scratch: Path, history: Callable[[], bytes]) -> None:
        """`history` returns the lines of the steps since the last commit."""
        self._shared = shared
        self._scratch = scratch
        self._history = history
        self._sends = asyncio.Semaphore(_SENDS_MAX)
        self._queued = 0
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    @property
    def routes(self) -> Mapping[str, Answer]:
        """The handlers by path."""
        return {
            STEPS_PATH: self._answer_steps,
            "/v1/snapshots/next": self._answer_next,
            r"/v1/snapshots/{generation:\d+}/{step:\d+}/{rank:\d+}": self._answer_rows,
            r"/v1/snapshots/{generation:\d+}/{step:\d+}/{rank:\d+}/record": self._answer_record,
        }

    def wake(self) -> None:
        """Something has changed: look again for those that wait for the next step."""
        for loop, event in list(self._waiting):
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

    async def _answer_next(self, request: web.Request) -> web.StreamResponse:
        """The newest step after `after`. The request also reports the newest step of the mirror."""
        try:
            generation, after = (int(request.query[name]) for name in ("generation", "after"))
            mirror, copied = request.query["mirror"], request.query["copied"] == "1"
        except (KeyError, ValueError):
            return web.Response(status=400, text="expected generation, after, copied and mirror\n")
        if not self._shared.acknowledge(generation, mirror, after, copied=copied):
            return web.Response(status=404)
        found = await self._await_next(generation, after)
        if found is None:
            return web.Response(status=204)
        return web.json_response(found._asdict())

    async def _await_next(self, generation: int, after: int) -> NextStep | None:
        waiter = asyncio.get_running_loop(), asyncio.Event()
        self._waiting.add(waiter)
        try:
            async with asyncio.timeout(_POLL_S):
                while True:
                    found = self._shared.next_step(generation, after)
                    if found is not None:
                        return found
                    await waiter[1].wait()
                    waiter[1].clear()
        except TimeoutError:
            return None
        finally:
            self._waiting.discard(waiter)

    async def _answer_steps(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=self._history(), content_type="application/jsonl")

    async def _answer_rows(self, request: web.Request) -> web.StreamResponse:
        copy = self._asked(request)
        if copy is None:
            return web.Response(status=404)
        wanted = request.http_range
        if wanted.start is None or wanted.stop is None or wanted.start < 0:
            return web.Response(status=416, text="expected Range: bytes=FIRST-LAST\n")
        if wanted.stop - wanted.start > RANGE_BYTES_MAX:
            return web.Response(status=416, text=f"expected at most {RANGE_BYTES_MAX} bytes\n")
        if not await self._may_send():
            return web.Response(status=503)
        try:
            return await self._send(request, copy, wanted.start, min(wanted.stop, copy.size))
        finally:
            self._sends.release()

    async def _may_send(self) -> bool:
        """Take one of the places for sending. False if too many readers want one."""
        if self._queued >= _QUEUE_MAX:
            return False
        self._queued += 1
        try:
            async with asyncio.timeout(_QUEUE_S):
                return await self._sends.acquire()
        except TimeoutError:
            return False
        finally:
            self._queued -= 1

    async def _send(
        self, request: web.Request, copy: Copy, start: int, end: int
    ) -> web.StreamResponse:
        path = copy.buffer.path(self._scratch)
        try:
            file = path.open("rb")
        except OSError as error:
            log.warning("snapshot_lost", path=str(path), cause=str(error))
            self._shared.lost(copy.buffer)
            return web.Response(status=404)
        with file:
            return await _send_file(request, file, start, end)

    async def _answer_record(self, request: web.Request) -> web.StreamResponse:
        copy = self._asked(request)
        if copy is None:
            return web.Response(status=404)
        return web.Response(body=copy.record, content_type="application/json")

    def _asked(self, request: web.Request) -> Copy | None:
        generation, step, rank = (
            int(request.match_info[name]) for name in ("generation", "step", "rank")
        )
        return self._shared.find(State(generation, step), rank)


async def _send_file(
    request: web.Request, file: BinaryIO, start: int, end: int
) -> web.StreamResponse:
    """Send bytes `[start, end)` of an open buffer's shard file.

    Not with `loop.sendfile`: under TLS it takes ten times the processor time, and without TLS it is no faster. The file is
    in memory, so reading a block delays other answers by less than 0.1 ms.
    """
    response = web.StreamResponse(status=206)
    response.content_length = max(0, end - start)
    await response.prepare(request)
    transport = request.transport
    if transport is None or end <= start:
        return response
    # A reader that stalls must not keep the file's memory for long.
    async with asyncio.timeout(_SEND_S + (end - start) / _SEND_BYTES_PER_S):
        while start < end:
            size = min(_BLOCK_BYTES, end - start)
            block = os.pread(file.fileno(), size, PAYLOAD_OFFSET + start)
            if not block:
                # The file has become shorter. Without this the reader would wait for the rest.
                transport.abort()
                return response
            await response.write(block)
            start += len(block)
    await response.write_eof()
    return response
