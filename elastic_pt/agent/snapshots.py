"""The states in a node's memory: the newest ones of its workers, and copies of its neighbours' (agent process).

    worker writes a buffer ─► written ─► CRCs ─► held ─► neighbours copy it and report it ─► complete ─► the worker may
                                                                                                overwrite its other buffer
    neighbour's buffer ─► Mirror (a thread for each neighbour) ─► buffer file of this node ─► held
    a new generation ─► `places`: own files, and the peers that hold the rest ─► workers

The members of a generation form a ring in rank order: a node copies the states of the next `checkpoint.mirror_copies`
nodes. So no row is lost unless a node is lost together with all its mirrors. The state from which a generation resumed
is kept until a state of this generation is complete on all nodes.

Called from the threads of the channel and the membership, from the main thread, and from the membership's event loop.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import structlog
from aiohttp import web

from elastic_pt.agent.mirror import Mirror
from elastic_pt.checkpoint.history import HISTORY_BYTES_MAX, StepHistory
from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.checkpoint.memory import Place, Places
from elastic_pt.checkpoint.peer import STEPS_PATH, Peer, PeerAddress
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, Buffer, Snapshot, describe_snapshot
from elastic_pt.errors import ElasticPtError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.decision.status import Held
from elastic_pt.membership.node import Formed
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.records import Generation
from elastic_pt.workers.channel import Message

_SEND_S: Final = 10.0
_SEND_BYTES_PER_S: Final = 1 << 20
"""The slowest reader that is served to its end."""
_POLL_S: Final = 5.0
"""Maximum time of a long poll for the next step."""

log = structlog.get_logger("elastic_pt.agent.snapshots")

State = tuple[int, int]
"""A generation and a step of its workers."""


@dataclass(frozen=True)
class _Copy:
    """A buffer file with a whole state, and its record in the form for peers."""

    path: Path
    record: Snapshot
    encoded: bytes
    complete_s: float
    """When it was complete, on this machine's monotonic clock."""


class Snapshots:
    """One node's snapshots and mirrors, over all its generations."""

    def __init__(
        self,
        scratch: Path,
        incarnation: str,
        token: str,
        *,
        copies: int,
        timeout_s: float,
        history: StepHistory,
        on_complete: Callable[[int, int], None],
    ) -> None:
        """`on_complete(generation, step)`: this node's workers may write over what is older than that step.

        `history` has the lines of the steps since the last commit, for peers that have fewer.
        """
        self._history = history
        self._scratch = scratch
        self._incarnation = incarnation
        self._token = token
        self._copies = copies
        self._timeout_s = timeout_s
        self._on_complete = on_complete
        self._lock = threading.RLock()
        self._kept: dict[State, dict[int, _Copy]] = {}
        """By state and rank."""
        self._sizes: dict[int, int] = {}
        """Number of workers of each generation with a kept state."""
        self._generation = 0
        self._every = 0
        """The last cadence in the event log."""
        self._own = range(0)
        self._acknowledged: dict[str, int] = {}
        """The newest step of each mirror of this node, by the mirror's incarnation."""
        self._complete = 0
        self._unusable: set[State] = set()
        self._mirrors: list[Mirror] = []
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._jobs: JobThread[Buffer] = JobThread("snapshot", self._describe)

    # ---- for the membership --------------------------------------------------------------------

    @property
    def held(self) -> tuple[Held, ...]:
        """The rows and states in this node's memory."""
        with self._lock:
            now_s = time.monotonic()
            return tuple(
                Held(
                    generation,
                    step,
                    ranks.start,
                    ranks.stop,
                    self._sizes[generation],
                    now_s - max(copies[rank].complete_s for rank in ranks),
                )
                for (generation, step), copies in sorted(self._kept.items())
                for ranks in _runs(sorted(copies))
            )

    @property
    def unusable(self) -> tuple[State, ...]:
        """States that this node's workers could not read."""
        return tuple(sorted(self._unusable))

    @property
    def routes(self) -> Mapping[str, Answer]:
        """The handlers of peers' requests, by path; see `checkpoint.peer`."""
        return {
            STEPS_PATH: self._answer_steps,
            "/v1/snapshots/next": self._answer_next,
            r"/v1/snapshots/{generation:\d+}/{step:\d+}/{rank:\d+}": self._answer_rows,
            r"/v1/snapshots/{generation:\d+}/{step:\d+}/{rank:\d+}/record": self._answer_record,
        }

    # ---- one generation ------------------------------------------------------------------------

    def starts(self, formed: Formed) -> None:
        """Workers of a new generation are about to start: keep the state it resumes from, begin to mirror."""
        generation = formed.generation
        self.stop_mirrors()
        ring = mirrored_by(len(generation.members), self._copies)
        with self._lock:
            memory = generation.memory
            goes_on = None if memory is None else (memory.generation, memory.step)
            self._generation = generation.number
            self._sizes[generation.number] = generation.world_size
            unneeded = self._forget_states(lambda state: state != goes_on)
            self._own = generation.worker_ranks()[formed.node_rank]
            self._acknowledged = {
                generation.members[index].incarnation: 0 for index in ring[formed.node_rank]
            }
            self._complete = 0
            self._wake()
        _remove(unneeded)
        self._mirrors = [
            Mirror(
                self._scratch,
                generation.number,
                generation.members[index],
                generation.worker_ranks()[index],
                self._incarnation,
                self._token,
                timeout_s=self._timeout_s,
                on_copy=self._copied,
                on_write=self._forget,
            )
            for index, mirrors in enumerate(ring)
            if formed.node_rank in mirrors
        ]

    def places(self, generation: Generation) -> Places | None:
        """Where the workers of a new generation read the state that it resumes from; None if it is in the bucket."""
        memory = generation.memory
        if memory is None:
            return None
        with self._lock:
            here = self._kept.get((memory.generation, memory.step), {})
            shards = []
            for rank, source in enumerate(memory.sources):
                copy, member = here.get(rank), generation.members[source]
                if copy is not None:
                    place = Place(rank, str(copy.path), copy.encoded.decode())
                else:
                    place = Place(rank, host=member.address, port=member.port)
                shards.append(place)
        return Places(memory.generation, memory.step, tuple(shards), self._token, self._timeout_s)

    def complete_history(self, formed: Formed, committed_step: int) -> None:
        """Have the lines of all steps from the last commit to the state in memory: this node may have to write them.

        A node that was no member when a step was done asks those that hold the state.
        """
        memory, members = formed.generation.memory, formed.generation.members
        first = committed_step + 1
        if memory is None or memory.step < first or not self._history.misses(first, memory.step):
            return
        for index in sorted(set(memory.sources) - {formed.node_rank}):
            address = PeerAddress(members[index].address, members[index].port)
            try:
                text = Peer(address, self._token, self._timeout_s).get(
                    STEPS_PATH, HISTORY_BYTES_MAX
                )
                if text is not None and self._history.adopt(text, first, memory.step):
                    return
            except (ElasticPtError, ValueError, KeyError, TypeError) as error:
                log.warning("history_not_read", peer=members[index].node, cause=str(error))
        log.warning("history_incomplete", first_step=first, last_step=memory.step)

    def written(self, message: Message) -> None:
        """A worker of this node has written a buffer."""
        buffer = Buffer(message["generation"], message["rank"], message["buffer"])
        if buffer.generation != self._generation:
            return
        if message["complete_step"]:
            # All nodes and their mirrors hold a state of this generation. The state it resumed from is not needed any more.
            _remove(self._forget_states(lambda state: state[0] != buffer.generation))
        if message["every_steps"] != self._every:
            self._every = message["every_steps"]
            log.info(
                "snapshot_cadence",
                every_steps=self._every,
                step_seconds=message["step_seconds"],
                copy_seconds=message["seconds"],
            )
        with suppress(ElasticPtError):
            self._jobs.submit(buffer)

    def distrust(self, generation: int, step: int) -> None:
        """This node's workers could not read a state that the log says is in memory."""
        self._unusable.add((generation, step))

    def stop_mirrors(self) -> None:
        """Stop copying. Returns at once."""
        for mirror in self._mirrors:
            mirror.stop()
        self._mirrors = []

    def close(self) -> None:
        """Stop all threads. The files are removed with the scratch directory."""
        self.stop_mirrors()
        self._jobs.discard()
        self._jobs.close(0.0)

    # ---- on the threads of the jobs and the mirrors ----------------------------------------------

    def _describe(self, buffer: Buffer) -> None:
        try:
            found = describe_snapshot(buffer, self._scratch)
        # Any error: keep the thread alive. A snapshot without a description counts as missing.
        except Exception as error:
            log.warning("snapshot_unreadable", rank=buffer.rank, cause=str(error))
            return
        if found is not None:
            failpoint(Failpoint.SNAPSHOT_DESCRIBED)
            self._copied(buffer.path(self._scratch), found)

    def _copied(self, path: Path, record: Snapshot) -> None:
        """Store the record of a buffer file of this node that holds a whole state."""
        with self._lock:
            if record.generation != self._generation:
                return
            self._forget(path)
            copies = self._kept.setdefault((record.generation, record.step), {})
            copies[record.rank] = _Copy(path, record, record.to_bytes(), time.monotonic())
            self._wake()
            self._look()

    def _forget(self, path: Path) -> None:
        """A buffer file is about to be overwritten."""
        with self._lock:
            for state, copies in list(self._kept.items()):
                for rank in [rank for rank, copy in copies.items() if copy.path == path]:
                    del copies[rank]
                if not copies:
                    del self._kept[state]

    def _newest_own(self) -> int:
        """The newest step with described states of all workers of this node; 0 if there is none."""
        own = set(self._own)
        return max(
            (
                step
                for (generation, step), copies in self._kept.items()
                if generation == self._generation and own <= copies.keys()
            ),
            default=0,
        )

    def _look(self) -> None:
        """Tell the workers when a newer step is whole here and on all mirrors."""
        step = min([self._newest_own(), *self._acknowledged.values()])
        if step > self._complete:
            self._complete = step
            self._on_complete(self._generation, step)

    def _forget_states(self, unwanted: Callable[[State], bool]) -> list[Path]:
        """Forget states. Returns the files of earlier generations that hold none of the others; hold no lock to remove them."""
        with self._lock:
            for state in [state for state in self._kept if unwanted(state)]:
                del self._kept[state]
            held = {copy.path for copies in self._kept.values() for copy in copies.values()}
            kept = {generation for generation, _ in self._kept} | {self._generation}
            self._sizes = {number: self._sizes[number] for number in kept}
            current = f"snapshot-g{self._generation}-"
        return [
            path
            for path in self._scratch.glob("snapshot-g*-rank-*")
            if path not in held and not path.name.startswith(current)
        ]

    def _wake(self) -> None:
        for loop, event in self._waiting:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

    # ---- answers to peers, on the membership's event loop ----------------------------------------

    async def _answer_next(self, request: web.Request) -> web.StreamResponse:
        """The newest step after `after`. The request also reports the newest step of the mirror."""
        try:
            generation, after = (int(request.query[name]) for name in ("generation", "after"))
            mirror = request.query["mirror"]
        except (KeyError, ValueError):
            return web.Response(status=400, text="expected generation, after and mirror\n")
        with self._lock:
            if generation != self._generation:
                return web.Response(status=404)
            if mirror in self._acknowledged and after > self._acknowledged[mirror]:
                self._acknowledged[mirror] = after
                failpoint(Failpoint.MIRROR_ACKNOWLEDGED)
                self._look()
        waiter = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._waiting.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    while self._has_nothing_after(generation, after):
                        await waiter[1].wait()
                        waiter[1].clear()
        finally:
            with self._lock:
                self._waiting.discard(waiter)
        with self._lock:
            step = self._newest_own()
            if generation != self._generation or step <= after:
                return web.Response(status=204)
            return web.json_response({"step": step})

    def _has_nothing_after(self, generation: int, after: int) -> bool:
        with self._lock:
            return generation == self._generation and self._newest_own() <= after

    async def _answer_steps(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=self._history.text(), content_type="application/jsonl")

    async def _answer_rows(self, request: web.Request) -> web.StreamResponse:
        copy = self._asked(request)
        if copy is None:
            return web.Response(status=404)
        wanted = request.http_range
        if wanted.start is None or wanted.stop is None or wanted.start < 0:
            return web.Response(status=416, text="expected Range: bytes=FIRST-LAST\n")
        try:
            file = copy.path.open("rb")
        except OSError as error:
            log.warning("snapshot_lost", path=str(copy.path), cause=str(error))
            self._forget(copy.path)
            return web.Response(status=404)
        with file:
            return await _send_file(request, file, wanted.start, min(wanted.stop, copy.record.size))

    async def _answer_record(self, request: web.Request) -> web.StreamResponse:
        copy = self._asked(request)
        if copy is None:
            return web.Response(status=404)
        return web.Response(body=copy.encoded, content_type="application/json")

    def _asked(self, request: web.Request) -> _Copy | None:
        generation, step, rank = (
            int(request.match_info[name]) for name in ("generation", "step", "rank")
        )
        with self._lock:
            return self._kept.get((generation, step), {}).get(rank)


async def _send_file(
    request: web.Request, file: BinaryIO, start: int, end: int
) -> web.StreamResponse:
    """Send bytes `[start, end)` of an open buffer's shard file. The kernel copies them, not this process."""
    response = web.StreamResponse(status=206)
    response.content_length = max(0, end - start)
    await response.prepare(request)
    transport = request.transport
    if transport is None or end <= start:
        return response
    # A reader that stalls must not keep the file's memory for long.
    async with asyncio.timeout(_SEND_S + (end - start) / _SEND_BYTES_PER_S):
        await asyncio.get_running_loop().sendfile(
            transport, file, PAYLOAD_OFFSET + start, end - start
        )
    await response.write_eof()
    return response


def _remove(paths: Sequence[Path]) -> None:
    """Remove files. Freeing memory takes half a second per gigabyte."""
    for path in paths:
        path.unlink(missing_ok=True)


def mirrored_by(nodes: int, copies: int) -> list[list[int]]:
    """For each node, by rank, the nodes that copy its snapshots: the ones before it in a ring."""
    count = min(copies, nodes - 1)
    return [
        [(index - distance) % nodes for distance in range(1, count + 1)] for index in range(nodes)
    ]


def _runs(ranks: Sequence[int]) -> list[range]:
    """Ascending ranks as ranges without gaps."""
    runs: list[range] = []
    for rank in ranks:
        if runs and runs[-1].stop == rank:
            runs[-1] = range(runs[-1].start, rank + 1)
        else:
            runs.append(range(rank, rank + 1))
    return runs
