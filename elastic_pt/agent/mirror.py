"""A copy of a neighbour's snapshots in this node's memory (agent process, a thread for each neighbour).

    ask for the next step ─► its records ─► byte ranges into a free one of three buffer files ─► CRCs ─► next request,
         ▲                                                                                             which reports it
         └─────────────────────────────────────────────────────────────────────────────────────────────────────┘

The newest step that is complete on all nodes is never overwritten, and the neighbour's workers take no newer snapshot
before the last one is complete. So one complete step always exists on all nodes and their mirrors, and a slow link, or a
bound for the bytes per second, only makes snapshots rarer. A step that the neighbour keeps for the bucket is copied
first, and not overwritten while the neighbour keeps it: if the neighbour is lost, this node has its part of the
checkpoint. If there is no room for a copy, the mirror reports that, and the neighbour continues without it.
"""

import mmap
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import structlog
from pydantic_core import from_json

from elastic_pt.agent.pace import Pace
from elastic_pt.checkpoint.peer import Peer, snapshot_path
from elastic_pt.checkpoint.shard_file import NoRoom
from elastic_pt.checkpoint.snapshot import (
    BUFFERS,
    PAYLOAD_OFFSET,
    Buffer,
    Snapshot,
    begin_buffer,
    buffer_to_write,
    end_buffer,
    make_buffers,
    require_crcs,
)
from elastic_pt.errors import CheckpointError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.records import Member

_AGAIN_S: Final = 0.1
_FULL_S: Final = 1.0
_QUESTION_S: Final = 10.0
_ANSWER_BYTES_MAX: Final = 4096

log = structlog.get_logger("elastic_pt.agent.mirror")


class _Next(NamedTuple):
    """The answer of a neighbour."""

    step: int
    """The newest step of its workers."""
    kept: frozenset[int]
    """The steps that they keep for the bucket."""
    complete: int
    """The newest step that is complete on all nodes, 0 for none."""


class _Buffers(NamedTuple):
    """The buffers for one worker of the neighbour."""

    names: list[Buffer]
    maps: list[mmap.mmap]
    steps: list[int]
    """The step in each of them, 0 for none."""


class Neighbour(NamedTuple):
    """The node that a mirror copies, in one generation."""

    generation: int
    member: Member
    ranks: range
    """Its workers."""


class MirrorListener(Protocol):
    """Learns what a mirror does with its buffers, in the mirror's thread (`agent.snapshots`)."""

    def lost(self, buffer: Buffer) -> None:
        """A buffer is about to be overwritten."""

    def copied(self, buffer: Buffer, record: Snapshot) -> None:
        """A buffer holds a whole state again."""

    def neighbour_keeps(self, generation: int, ranks: range, steps: Collection[int]) -> None:
        """A neighbour with these workers keeps these steps for the bucket. All of them have been copied."""


class Mirror:
    """Copies the snapshots of one other node's workers, in its own thread, until it is stopped."""

    def __init__(
        self,
        scratch: Path,
        incarnation: str,
        neighbour: Neighbour,
        peer: Peer,
        pace: Pace,
        listener: MirrorListener,
    ) -> None:
        """`incarnation` is this node's. `peer` is the neighbour, and closed by `stop`."""
        self._scratch = scratch
        self._generation, self._member, self._ranks = neighbour
        self._incarnation = incarnation
        self._peer = peer
        self._pace = pace
        self._listener = listener
        self._buffers: dict[int, _Buffers] = {}
        self._has = dict.fromkeys(self._ranks, 0)
        """The newest copied step, by rank."""
        self._full = False
        """Whether there was no room for a copy of that step."""
        self._stop = threading.Event()
        self._told = ""
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def stop(self) -> None:
        """Stop overwriting buffers, and free their memory once their files are removed. Returns at once."""
        self._stop.set()
        self._peer.close()

    def _run(self) -> None:
        try:
            self._mirror()
        finally:
            for mapped in (each for buffers in self._buffers.values() for each in buffers.maps):
                mapped.close()
            self._buffers.clear()

    def _mirror(self) -> None:
        following = None
        while not self._stop.is_set():
            try:
                following = self._ask()
                if following is not None:
                    for step in sorted({*following.kept, following.step}):
                        self._copy(step, following)
                        # After each: the neighbour may be lost during the next copy.
                        self._listener.neighbour_keeps(
                            self._generation, self._ranks, following.kept
                        )
                    self._told, self._full = "", False
                    continue
            except NoRoom as error:
                self._tell(error)
                # The neighbour continues without a copy here. Room is looked for again later.
                self._has = dict.fromkeys(self._ranks, following.step if following else 0)
                self._full = True
                self._stop.wait(_FULL_S)
            # Any error: retry. If the neighbour stays away, the generation ends, and this thread with it.
            except Exception as error:
                self._tell(error)
            self._stop.wait(_AGAIN_S)

    def _ask(self) -> _Next | None:
        """The neighbour's next step; None if there is none yet. Reports the step that this node has."""
        has = min(self._has.values())
        copied = 0 if self._full else 1
        question = (
            f"generation={self._generation}&after={has}&copied={copied}&mirror={self._incarnation}"
        )
        answer = self._peer.get(
            f"/v1/snapshots/next?{question}", _ANSWER_BYTES_MAX, timeout_s=_QUESTION_S
        )
        if answer is None:
            return None
        found = from_json(answer)
        kept = frozenset(int(step) for step in found["kept"])
        return _Next(int(found["step"]), kept, int(found["complete"]))

    def _copy(self, step: int, following: _Next) -> None:
        """Copy a step of all workers of the neighbour, if it is not copied yet. Raises `ElasticPtError`."""
        for rank in self._ranks:
            if rank in self._buffers and step in self._buffers[rank].steps:
                continue
            path = snapshot_path(self._generation, step, rank)
            record = self._peer.record(path)
            if (record.generation, record.step, record.rank) != (self._generation, step, rank):
                raise CheckpointError(f"{self._peer}{path}: the record of another snapshot")
            buffers = self._buffers_of(rank, record.size)
            number = buffer_to_write(buffers.steps, following.kept, following.complete)
            if number is None:
                raise CheckpointError(f"{self._peer}{path}: all {BUFFERS} buffers are needed")
            if self._stop.is_set():
                return
            buffer, mapped = buffers.names[number], buffers.maps[number]
            self._listener.lost(buffer)
            buffers.steps[number] = 0
            begin_buffer(mapped, step)
            failpoint(Failpoint.MIRROR_BEGUN)
            with (
                memoryview(mapped) as whole,
                whole[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.size] as content,
            ):
                if not self._fill(path, content):
                    return
                failpoint(Failpoint.MIRROR_COPIED)
                require_crcs(record, content)
            end_buffer(mapped, step)
            failpoint(Failpoint.MIRROR_DONE)
            buffers.steps[number] = step
            self._has[rank] = max(step, self._has[rank])
            self._listener.copied(buffer, record)

    def _fill(self, path: str, content: memoryview) -> bool:
        """Read a shard file. False if this mirror was stopped."""
        chunk = self._pace.chunk_bytes
        for start in range(0, len(content), chunk):
            size = min(chunk, len(content) - start)
            if self._stop.wait(self._pace.wait_s(size, time.monotonic())):
                return False
            with content[start : start + size] as part:
                self._peer.read_into(path, start, part)
        return True

    def _buffers_of(self, rank: int, size: int) -> _Buffers:
        """The buffers for a worker. Raises `NoRoom` if there is no room for them and one more of this size.

        The one more is for a worker of this node that has no buffer yet: with one it can save checkpoints.
        """
        if rank not in self._buffers:
            names = [Buffer(self._generation, rank, number) for number in range(BUFFERS)]
            maps = make_buffers([each.path(self._scratch) for each in names], size, spare=1)
            self._buffers[rank] = _Buffers(names, maps, [0] * BUFFERS)
        return self._buffers[rank]

    def _tell(self, error: Exception) -> None:
        """Log an error, but not the same error twice in a row."""
        if str(error) != self._told and not self._stop.is_set():
            self._told = str(error)
            log.info("mirror_failed", peer=self._member.node, cause=self._told)
