"""The states in a node's memory: the newest ones of its workers, and copies of its neighbours' (agent process).

    worker writes a buffer ─► written ─► CRCs ─► held ─► neighbours copy it and report it ─► complete ─► the worker may
                                                                                                overwrite the others
    neighbour's buffer ─► Mirror (a thread for each neighbour) ─► buffer file of this node ─► held
    a new generation ─► `places`: own files, and the peers that hold the rest ─► workers

`holdings` decides what is kept (pure), `mirror` copies, `snapshot_answers` answers peers. Files and threads are here.

The GENERATION says which node copies which others' states (`membership.decision.mirrors`). So no row is lost unless a
node is lost together with all its mirrors. The state from which a generation resumed is kept until a state of this
generation is complete on all nodes and their mirrors. A mirror without room is waited for by nobody, but until it has
room nothing older is dropped, except what the bucket has.

A checkpoint is a state that is kept for the bucket. `Snapshots` is the owner of these: `written` adds one, a mirror adds
its copies of one that its neighbour keeps, `release` removes it. Until then its files stay, in later generations too.

Called from the threads of the channel and the membership, from the main thread, and from the membership's event loop.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from elastic_pt.agent.holdings import Copy, Holdings
from elastic_pt.agent.mirror import Mirror, Neighbour
from elastic_pt.agent.pace import Pace
from elastic_pt.agent.snapshot_answers import NextStep, SnapshotAnswers
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.checkpoint.memory import Place, Places
from elastic_pt.checkpoint.peer import Peer, PeerAddress
from elastic_pt.checkpoint.snapshot import Buffer, Snapshot, describe_snapshot
from elastic_pt.errors import ElasticPtError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.decision.status import Held, Unusable
from elastic_pt.membership.node import Formed
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.records import Generation
from elastic_pt.runlog.state import State
from elastic_pt.workers.channel import Message

_DESCRIBE_AGAIN_S: Final = 0.5
_DESCRIBE_S: Final = 600.0
"""Maximum time for the CRCs of a snapshot, with retries. Then this generation has no newer snapshots in memory."""

log = structlog.get_logger("elastic_pt.agent.snapshots")


class Snapshots:
    """One node's snapshots and mirrors, over all its generations."""

    def __init__(
        self,
        scratch: Path,
        incarnation: str,
        access: Access,
        *,
        mirror_bytes_per_s: int = 0,
        timeout_s: float,
        history: StepHistory,
        on_complete: Callable[[int, int, bool], None],
        on_change: Callable[[], None],
        on_skip: Callable[[], None],
        on_mirrored: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_complete(generation, step, mirrors_have_room)`: this node's workers may write over what is older than that step.

        `on_change()`: this node holds more, or its mirrors do. `on_skip()`: a snapshot, or a mirror's copy of one, is left out.
        `on_mirrored(bytes)`: a neighbour's state was copied.

        `history` has the lines of the steps since the last commit, for peers that have fewer.
        """
        self._scratch = scratch
        self._incarnation = incarnation
        self._access = access
        self._timeout_s = timeout_s
        self._pace = Pace(mirror_bytes_per_s)
        self._on_complete = on_complete
        self._on_change = on_change
        self._on_skip = on_skip
        self._on_mirrored = on_mirrored
        self._lock = threading.RLock()
        self._holdings = Holdings()
        self._every = 0
        """The last cadence in the event log."""
        self._closing = threading.Event()
        self._mirrors: list[Mirror] = []
        self._answers = SnapshotAnswers(self, scratch, history.text)
        self._jobs: JobThread[Buffer] = JobThread("snapshot", self._describe)

    # ---- for the membership --------------------------------------------------------------------

    @property
    def held(self) -> tuple[Held, ...]:
        """The rows and states in this node's memory."""
        with self._lock:
            return self._holdings.held(time.monotonic())

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """Copies that this node's workers could not read."""
        with self._lock:
            return self._holdings.unusable

    @property
    def routes(self) -> Mapping[str, Answer]:
        """The handlers of peers' requests, by path."""
        return self._answers.routes

    # ---- one generation ------------------------------------------------------------------------

    def starts(self, formed: Formed) -> None:
        """Workers of a new generation are about to start: keep the state it resumes from, begin to mirror."""
        generation = formed.generation
        self.stop_mirrors()
        with self._lock:
            self._holdings.starts(generation, formed.node_rank)
        self._answers.wake()
        self._remove_unneeded()
        for index, mirrors in enumerate(generation.mirrors):
            if formed.node_rank in mirrors:
                member = generation.members[index]
                address = PeerAddress(member.address, member.port)
                self._mirrors.append(
                    Mirror(
                        self._scratch,
                        self._incarnation,
                        Neighbour(generation.number, member, generation.worker_ranks()[index]),
                        Peer(address, self._access, self._timeout_s),
                        self._pace,
                        self,
                    )
                )

    def places(self, generation: Generation) -> Places | None:
        """Where the workers of a new generation read the state that it resumes from; None if it is in the bucket."""
        memory = generation.memory
        if memory is None:
            return None
        state, unusable = State(memory.generation, memory.step), self.unusable
        shards = []
        for rank in range(len(memory.sources)):
            holders = [generation.members[index] for index in memory.holders(rank)]
            places = [
                Place(each.incarnation, host=each.address, port=each.port)
                for each in holders
                if each.incarnation != self._incarnation
            ]
            copy = self.find(state, rank)
            if copy is not None and Unusable(*state, rank, self._incarnation) not in unusable:
                path = str(copy.buffer.path(self._scratch))
                places.insert(0, Place(self._incarnation, path, copy.record.decode()))
            shards.append(tuple(places))
        return Places(*state, tuple(shards), self._access, self._timeout_s)

    def written(self, message: Message) -> None:
        """A worker of this node has written a buffer."""
        buffer = Buffer(message["generation"], message["rank"], message["buffer"])
        if buffer.generation != self._holdings.generation:
            return
        with self._lock:
            if message["checkpoint"]:
                self._holdings.keep(buffer, message["step"])
            self._holdings.agreed_step = max(self._holdings.agreed_step, message["complete_step"])
            mirrored = message["complete_step"] and message["mirrors_have_room"]
            found = mirrored and self._holdings.forget_others()
        if found:
            self._remove_unneeded()
        if message["every_steps"] != self._every:
            self._every = message["every_steps"]
            log.info(
                "snapshot_cadence",
                every_steps=self._every,
                reason=message["every_reason"],
                step_seconds=message["step_seconds"],
                copy_seconds=message["seconds"],
                complete_seconds=message["complete_seconds"],
            )
        with suppress(ElasticPtError):
            self._jobs.submit(buffer)

    def note_step(self) -> None:
        """A worker has done a step: look for mirrors that take too long."""
        with self._lock:
            late = self._holdings.expire(time.monotonic())
            if late:
                log.warning("mirror_too_slow", mirrors=late)
                for _ in late:
                    self._on_skip()
                self._look()

    def checkpoints(self) -> tuple[State, ...]:
        """The states that are kept for the bucket: own ones, and copies of neighbours'."""
        with self._lock:
            return self._holdings.checkpoints

    def kept_state(self, generation: int, step: int) -> Mapping[int, tuple[Path, Snapshot]]:
        """The buffer files of a state that is kept for the bucket, with their records, by rank.

        They are of this node's workers and of neighbours that it mirrors, as far as their CRCs are known. Each file
        holds this state until `release`.
        """
        with self._lock:
            found = self._holdings.checkpoint(State(generation, step))
        return {
            rank: (copy.buffer.path(self._scratch), Snapshot.from_bytes(copy.record))
            for rank, copy in found.items()
        }

    def release(self, generation: int, step: int, ranks: range | None = None) -> None:
        """The bucket has a state, or will never have it: the files of these ranks, or of all, may be overwritten or removed.

        May be repeated.
        """
        with self._lock:
            self._holdings.release(State(generation, step), ranks)
        self._remove_unneeded()

    def is_complete(self, step: int, stay: Collection[str]) -> bool:
        """Whether this node, and its mirrors in `stay` that have room, hold a state of this generation at or after `step`."""
        with self._lock:
            return self._holdings.is_complete(step, stay)

    def distrust(self, generation: int, step: int) -> None:
        """The rows of a state in memory do not fit together."""
        with self._lock:
            self._holdings.distrust(State(generation, step))

    def copy_failed(self, message: Message) -> None:
        """A worker of this node could not read one copy of an old rank's rows."""
        state, rank = State(message["generation"], message["step"]), message["rank"]
        log.warning(
            "copy_failed",
            step=state.step,
            rank=rank,
            holder=message["holder"],
            cause=message["why"],
        )
        with self._lock:
            self._holdings.copy_failed(state, rank, message["holder"], damaged=message["damaged"])

    def committed(self, step: int) -> None:
        """The bucket has the state of this step."""
        with self._lock:
            found = self._holdings.forget_before(step)
        if found:
            self._remove_unneeded()

    def no_room(self) -> None:
        """There is no room for the buffers of this node's workers."""
        self._on_skip()
        with self._lock:
            found = self._holdings.forget_spares()
        if found:
            log.warning("copies_dropped", cause="no room for the snapshots of this node's workers")
            self._remove_unneeded()

    def stop_mirrors(self) -> None:
        """Stop copying. Returns at once."""
        for mirror in self._mirrors:
            mirror.stop()
        self._mirrors = []

    def close(self) -> None:
        """Stop all threads. The files are removed with the scratch directory."""
        self.stop_mirrors()
        self._closing.set()
        self._jobs.discard()
        self._jobs.close(0.0)

    # ---- for the answers to peers ----------------------------------------------------------------

    def acknowledge(self, generation: int, mirror: str, step: int, *, copied: bool) -> bool:
        """A mirror has copied this step, or has no room for it. False if the generation is not this node's."""
        with self._lock:
            if generation != self._holdings.generation:
                return False
            if self._holdings.acknowledge(mirror, step, copied=copied) and not copied:
                self._on_skip()
            if step:
                failpoint(Failpoint.MIRROR_ACKNOWLEDGED)
            self._look()
            return True

    def next_step(self, generation: int, after: int) -> NextStep | None:
        """What a mirror copies after step `after`; None if there is nothing yet or the generation has ended."""
        with self._lock:
            step = self._holdings.newest_own
            if generation != self._holdings.generation or step <= after:
                return None
            return NextStep(step, self._holdings.kept_steps, self._holdings.agreed_step)

    def find(self, state: State, rank: int) -> Copy | None:
        """This node's copy of the rows of one worker; None if it has none."""
        with self._lock:
            return self._holdings.find(state, rank)

    def lost(self, buffer: Buffer) -> None:
        """A buffer is about to be overwritten, or its file cannot be read."""
        with self._lock:
            self._holdings.drop(buffer)

    # ---- for the mirrors, in their threads --------------------------------------------------------

    def copied(self, buffer: Buffer, record: Snapshot) -> None:
        """A mirror has copied a neighbour's state."""
        self._on_mirrored(record.size)
        self._add(buffer, record)

    def _add(self, buffer: Buffer, record: Snapshot) -> None:
        """Store the record of a buffer file of this node that holds a whole state."""
        copy = Copy(buffer, record.step, record.size, record.to_bytes(), time.monotonic())
        with self._lock:
            if not self._holdings.add(copy):
                return
            self._answers.wake()
            self._look()
        self._on_change()

    def neighbour_keeps(self, generation: int, ranks: range, steps: Collection[int]) -> None:
        """A neighbour with these workers keeps these steps for the bucket; this node has copies of them."""
        with self._lock:
            self._holdings.neighbour_keeps(generation, ranks, steps)

    # ---- on the threads of the jobs and the mirrors ----------------------------------------------

    def _describe(self, buffer: Buffer) -> None:
        """Compute the CRCs of a buffer, and try again after an error: the workers take no newer snapshot before."""
        told = ""
        until_s = time.monotonic() + _DESCRIBE_S
        while buffer.generation == self._holdings.generation and time.monotonic() < until_s:
            try:
                found = describe_snapshot(buffer, self._scratch)
                if found is not None:
                    failpoint(Failpoint.SNAPSHOT_DESCRIBED)
                    self._add(buffer, found)
                return
            # Any error: keep the thread alive.
            except Exception as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("snapshot_unreadable", rank=buffer.rank, cause=told)
            if self._closing.wait(_DESCRIBE_AGAIN_S):
                return

    def _look(self) -> None:
        """Tell the workers when a newer step is whole here and on all mirrors."""
        step = self._holdings.take_complete()
        if step is not None:
            self._on_complete(self._holdings.generation, step, self._holdings.mirrors_have_room)
            self._on_change()

    def _remove_unneeded(self) -> None:
        """Remove the files of earlier generations that hold nothing. Freeing memory takes half a second per gigabyte."""
        with self._lock:
            held = {buffer.path(self._scratch) for buffer in self._holdings.buffers}
            newest = self._holdings.generation
        for path in self._scratch.glob("snapshot-g*-rank-*"):
            # A generation that has started meanwhile has newer files.
            if path not in held and Buffer.at(path).generation < newest:
                path.unlink(missing_ok=True)
