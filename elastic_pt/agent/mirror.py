"""A copy of a neighbour's snapshots in this node's memory (agent process, a thread for each neighbour).

    ask for the next step ─► its records ─► byte ranges into the older of two buffer files ─► CRCs ─► next request,
         ▲                                                                                          which reports it
         └──────────────────────────────────────────────────────────────────────────────────────────────────┘

A buffer is overwritten only after the neighbour's newer step was copied completely. The neighbour's workers take no newer
snapshot before that, so one complete step always exists on all nodes and their mirrors. If there is no room for a copy,
the mirror reports that, and the neighbour continues without it.
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
    make_buffers,
    require_crcs,
)
from elastic_pt.errors import CheckpointError, ElasticPtError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.records import Member

_AGAIN_S: Final = 0.1
_FULL_S: Final = 1.0
_QUESTION_S: Final = 10.0
_ANSWER_BYTES_MAX: Final = 4096

log = structlog.get_logger("elastic_pt.agent.mirror")


class Mirror:
    """Copies the snapshots of one other node's workers, in its own thread, until it is stopped."""

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
        """Copies `member`; `incarnation` is this node's. Calls `on_write` before it overwrites a buffer file, and
        `on_copy` after the file holds a whole state again, both in the mirror's thread."""
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
        """The newest copied step, by rank."""
        self._stop = threading.Event()
        self._told = ""
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def stop(self) -> None:
        """Stop overwriting buffers. Returns at once. A request in progress ends by itself."""
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
                # The neighbour continues without a copy here. Room is looked for again later.
                self._has = dict.fromkeys(self._ranks, step or 0)
                self._stop.wait(_FULL_S)
            # Any error: retry. If the neighbour stays away, the generation ends, and this thread with it.
            except (ElasticPtError, ValueError, OSError) as error:
                self._tell(error)
            self._stop.wait(_AGAIN_S)

    def _ask(self) -> int | None:
        """The neighbour's next step; None if there is none yet. Reports the step that this node has."""
        has = min(self._has.values())
        question = f"generation={self._generation}&after={has}&mirror={self._incarnation}"
        answer = self._peer.get(
            f"/v1/snapshots/next?{question}", _ANSWER_BYTES_MAX, timeout_s=_QUESTION_S
        )
        return None if answer is None else int(json.loads(answer)["step"])

    def _copy(self, step: int) -> None:
        """Copy all buffers of the neighbour that are not copied yet. Raises `ElasticPtError`."""
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
            failpoint(Failpoint.MIRROR_BEGUN)
            content = memoryview(buffer)[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.size]
            self._peer.read_into(path, 0, content)
            failpoint(Failpoint.MIRROR_COPIED)
            require_crcs(record, content)
            end_buffer(buffer, step)
            failpoint(Failpoint.MIRROR_DONE)
            self._buffers[rank].reverse()
            self._has[rank] = step
            self._on_copy(file, record)

    def _older_buffer(self, rank: int, size: int) -> tuple[Path, mmap.mmap]:
        """The buffer file to write next. Raises `StagingFull`."""
        if rank not in self._buffers:
            paths = [
                Buffer(self._generation, rank, number).path(self._scratch)
                for number in range(BUFFERS)
            ]
            self._buffers[rank] = list(zip(paths, make_buffers(paths, size), strict=True))
        return self._buffers[rank][0]

    def _tell(self, error: Exception) -> None:
        """Log an error, but not the same error twice in a row."""
        if str(error) != self._told and not self._stop.is_set():
            self._told = str(error)
            log.info("mirror_failed", peer=self._member.node, cause=self._told)
