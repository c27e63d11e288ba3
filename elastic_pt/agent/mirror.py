"""A copy of a neighbour's snapshots in this node's memory (agent process, a thread for each neighbour).

    ask for the next step ─► its records ─► byte ranges into the older of two buffer files ─► CRCs ─► next question,
         ▲                                                                                          which says: copied
         └──────────────────────────────────────────────────────────────────────────────────────────────────┘

A buffer is written over only after the neighbour's newer step was copied whole. The neighbour's workers take no newer
snapshot before that, so one step always exists as a whole on all nodes and their mirrors. Without room for a copy the
mirror says that it has none, and the neighbour goes on without it.
"""

import json
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from elastic_pt.checkpoint.peer import Peer, PeerAddress, snapshot_path
from elastic_pt.checkpoint.shard_file import StagingFull
from elastic_pt.checkpoint.snapshot import (
    BUFFERS,
    PAYLOAD_OFFSET,
    Buffer,
    Snapshot,
    begin_buffer,
    end_buffer,
    make_buffer,
    require_crcs,
)
from elastic_pt.errors import CheckpointError, ElasticPtError
from elastic_pt.runlog.records import Member

_AGAIN_S: Final = 0.1
_QUESTION_S: Final = 10.0
_ANSWER_BYTES_MAX: Final = 4096

log = structlog.get_logger("elastic_pt.agent.mirror")


class Mirror:
    """Copies what the workers of one other node hold, in a thread of its own, until it is stopped."""

    def __init__(
        self,
        scratch: Path,
        generation: int,
        member: Member,
        ranks: range,
        incarnation: str,
        token: str,
        *,
        timeout_s: float,
        on_copy: Callable[[Path, Snapshot], None],
        on_write: Callable[[Path], None],
    ) -> None:
        """`member` is copied, by this node's `incarnation`. `on_write` comes before a buffer file is written over,
        `on_copy` after it holds a whole state again. Both are called in the mirror's thread."""
        self._scratch = scratch
        self._generation = generation
        self._member = member
        self._ranks = ranks
        self._incarnation = incarnation
        self._peer = Peer(PeerAddress(member.address, member.port), token, timeout_s)
        self._on_copy = on_copy
        self._on_write = on_write
        self._buffers: dict[int, list[tuple[Path, mmap.mmap]]] = {}
        self._has = dict.fromkeys(ranks, 0)
        """The newest step that is copied, by rank."""
        self._stop = threading.Event()
        self._told = ""
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def stop(self) -> None:
        """Write over no buffer any more. Returns at once; a request that is under way ends by itself."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                step = self._ask()
                if step is not None:
                    self._copy(step)
                    self._told = ""
                    continue
            except StagingFull as error:
                self._tell(error)
                self._has = dict.fromkeys(self._ranks, step or 0)
            # Every error: try again. A neighbour that stays away ends the generation, and with it this thread.
            except (ElasticPtError, ValueError, OSError) as error:
                self._tell(error)
            self._stop.wait(_AGAIN_S)

    def _ask(self) -> int | None:
        """The neighbour's next step; None if there is none yet. Says which one this node has."""
        has = min(self._has.values())
        question = f"generation={self._generation}&after={has}&mirror={self._incarnation}"
        answer = self._peer.get(
            f"/v1/snapshots/next?{question}", _ANSWER_BYTES_MAX, timeout_s=_QUESTION_S
        )
        return None if answer is None else int(json.loads(answer)["step"])

    def _copy(self, step: int) -> None:
        """Copy the buffers of all the neighbour's workers that are not copied yet. Raises `ElasticPtError`."""
        for rank in self._ranks:
            if self._has[rank] >= step:
                continue
            path = snapshot_path(self._generation, step, rank)
            record = self._peer.record(path)
            if (record.generation, record.step, record.rank) != (self._generation, step, rank):
                raise CheckpointError(f"{self._peer}{path}: the record of another snapshot")
            file, buffer = self._older_buffer(rank, record.size)
            if self._stop.is_set():
                return
            self._on_write(file)
            begin_buffer(buffer, step)
            content = memoryview(buffer)[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.size]
            self._peer.read_into(path, 0, content)
            require_crcs(record, content)
            end_buffer(buffer, step)
            self._buffers[rank].reverse()
            self._has[rank] = step
            self._on_copy(file, record)

    def _older_buffer(self, rank: int, size: int) -> tuple[Path, mmap.mmap]:
        """The buffer file to write next. Raises `StagingFull`."""
        if rank not in self._buffers:
            paths = [
                Buffer(self._generation, rank, index).path(self._scratch)
                for index in range(BUFFERS)
            ]
            made: list[tuple[Path, mmap.mmap]] = []
            try:
                for path in paths:
                    made.append((path, make_buffer(path, size)))
            except StagingFull:
                for path, _ in made:
                    path.unlink(missing_ok=True)
                raise
            self._buffers[rank] = made
        return self._buffers[rank][0]

    def _tell(self, error: Exception) -> None:
        """Log an error, once until another one comes."""
        if str(error) != self._told and not self._stop.is_set():
            self._told = str(error)
            log.info("mirror_failed", peer=self._member.node, cause=self._told)
