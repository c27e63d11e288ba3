"""Which states a node holds in memory, which of them are complete, and which may be forgotten. Pure: no files, no threads.

    a buffer holds a whole state ─► add ─┐
    a mirror reports its newest step ────┼─► take_complete: the step that this node and its mirrors hold whole
    a buffer is written again ─► drop ───┘
    all nodes have a complete step ─► forget_others
    a state is kept for the bucket ─► keep, neighbour_keeps ─► release

A state is the rows of all workers of a generation at a step. A node holds those of its own workers, and of those whose
nodes it mirrors. A checkpoint is a state that is kept for the bucket: its buffers are not overwritten or removed before
`release`, in later generations too. `agent.snapshots` calls this with its lock held.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.membership.decision.status import Held, Unusable
from elastic_pt.runlog.records import Generation, InMemory
from elastic_pt.runlog.state import State

MIRROR_S: Final = 600.0
"""Maximum time for a mirror to copy a step."""
_FAILURES: Final = 2
"""Generations that could not read a copy, its node not answering, before it counts as unusable."""


@dataclass(frozen=True)
class Copy:
    """A buffer that holds the whole rows of one worker at a step."""

    buffer: Buffer
    step: int
    size: int
    """Bytes of the shard file in the buffer."""
    record: bytes
    """Its `Snapshot`, in the form for peers."""
    complete_s: float
    """When it was complete, on this machine's monotonic clock."""


class Holdings:
    """What one node holds, over all its generations."""

    def __init__(self) -> None:
        self.generation = 0
        """The newest generation of which this node is a member."""
        self._held: dict[State, dict[int, Copy]] = {}
        """What this node holds, by state and rank."""
        self._kept: dict[State, dict[int, Buffer]] = {}
        """The buffers of states that are kept for the bucket, by state and rank."""
        self._described: dict[Buffer, Copy] = {}
        """What those buffers hold, once their CRCs are known."""
        self._sizes: dict[int, int] = {}
        """Number of workers of each generation with a held state."""
        self._own = range(0)
        self._acknowledged: dict[str, int] = {}
        """The newest step of each mirror of this node, by the mirror's incarnation."""
        self._without_room: set[str] = set()
        """The mirrors that have acknowledged their newest step without a copy of it."""
        self.complete_step = 0
        """The newest step of this generation that `take_complete` has returned; 0 if there is none."""
        self.agreed_step = 0
        """The newest step of this generation that is complete on all nodes, as its workers agreed; 0 if there is none."""
        self._resumed: InMemory | None = None
        """The state from which this generation has resumed."""
        self._node_rank = 0
        self._failures: dict[Unusable, set[int]] = {}
        """The generations in which this node's workers could not read a copy. Not changed any more once the copy is unusable."""
        self._unusable: set[Unusable] = set()

    # ---- what it holds -----------------------------------------------------------------------------

    def held(self, now_s: float) -> tuple[Held, ...]:
        """The rows and states that this node can give to a new generation."""
        return tuple(
            Held(
                generation,
                step,
                ranks.start,
                ranks.stop,
                self._sizes[generation],
                now_s - max(copies[rank].complete_s for rank in ranks),
            )
            for (generation, step), copies in sorted(self._held.items())
            for ranks in _runs(sorted(copies))
        )

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """Copies that this node's workers could not read."""
        return tuple(sorted(self._unusable))

    @property
    def buffers(self) -> frozenset[Buffer]:
        """The buffers that hold something."""
        held = [copy.buffer for copies in self._held.values() for copy in copies.values()]
        kept = [buffer for buffers in self._kept.values() for buffer in buffers.values()]
        return frozenset([*held, *kept])

    @property
    def checkpoints(self) -> tuple[State, ...]:
        """The states that are kept for the bucket: own ones, and copies of neighbours'."""
        return tuple(sorted(self._kept))

    def checkpoint(self, state: State) -> Mapping[int, Copy]:
        """This node's part of a state that is kept for the bucket, by rank, as far as its CRCs are known."""
        return {
            rank: self._described[buffer]
            for rank, buffer in self._kept.get(state, {}).items()
            if buffer in self._described
        }

    @property
    def kept_steps(self) -> list[int]:
        """The steps of this generation that this node's workers keep for the bucket, and whose CRCs are known."""
        return [
            state.step
            for state in self._kept
            if state.generation == self.generation
            and set(self._own) <= self.checkpoint(state).keys()
        ]

    def find(self, state: State, rank: int) -> Copy | None:
        """This node's copy of the rows of one worker; None if it has none."""
        return self._held.get(state, {}).get(rank)

    @property
    def newest_own(self) -> int:
        """The newest step of this generation with the rows of all workers of this node; 0 if there is none."""
        own = set(self._own)
        return max(
            (
                step
                for (generation, step), copies in self._held.items()
                if generation == self.generation and own <= copies.keys()
            ),
            default=0,
        )

    # ---- what happens ------------------------------------------------------------------------------

    def starts(self, generation: Generation, node_rank: int) -> None:
        """Workers of a new generation are about to start: keep only the state that it resumes from."""
        memory = self._resumed = generation.memory
        goes_on = None if memory is None else State(memory.generation, memory.step)
        self._unusable = {
            each for each in self._unusable if (each.generation, each.step) == goes_on
        }
        self._failures = {
            each: found
            for each, found in self._failures.items()
            if (each.generation, each.step) == goes_on
        }
        self.generation = generation.number
        self._node_rank = node_rank
        self._sizes[generation.number] = generation.world_size
        self._forget(lambda state: state != goes_on)
        self._own = generation.worker_ranks()[node_rank]
        self._acknowledged = {
            generation.members[index].incarnation: 0 for index in generation.mirrors_of(node_rank)
        }
        self._without_room = set()
        self.complete_step = self.agreed_step = 0

    def add(self, copy: Copy) -> bool:
        """A buffer holds a whole state. False if it is of an older generation, which is not kept."""
        if copy.buffer.generation != self.generation:
            return False
        self._forget_buffer(copy.buffer)
        state = State(copy.buffer.generation, copy.step)
        if self._kept.get(state, {}).get(copy.buffer.rank) == copy.buffer:
            self._described[copy.buffer] = copy
        self._held.setdefault(state, {})[copy.buffer.rank] = copy
        return True

    def keep(self, buffer: Buffer, step: int) -> None:
        """A worker of this node keeps a buffer for the bucket."""
        self._kept.setdefault(State(buffer.generation, step), {})[buffer.rank] = buffer

    def neighbour_keeps(self, generation: int, ranks: range, steps: Collection[int]) -> None:
        """A neighbour with these workers keeps these steps, of which this node has copies. Others are free again."""
        if generation != self.generation:
            return
        for state, buffers in list(self._kept.items()):
            if state.generation == generation and state.step not in steps:
                for rank in set(ranks) & buffers.keys():
                    self._described.pop(buffers.pop(rank), None)
                if not buffers:
                    del self._kept[state]
        for step in steps:
            for rank, copy in self._held.get(State(generation, step), {}).items():
                if rank in ranks:
                    self.keep(copy.buffer, step)
                    self._described[copy.buffer] = copy

    def release(self, state: State, ranks: range | None = None) -> None:
        """The bucket has these ranks of a state (None: all of it), or will never have them: their buffers are free.

        May be repeated.
        """
        buffers = self._kept.get(state, {})
        for rank in [rank for rank in buffers if ranks is None or rank in ranks]:
            self._described.pop(buffers.pop(rank), None)
        if not buffers:
            self._kept.pop(state, None)

    def drop(self, buffer: Buffer) -> None:
        """A buffer is about to be written again, or is lost."""
        self._forget_buffer(buffer)
        for state, buffers in list(self._kept.items()):
            # A mirror overwrites its copy of a step that its neighbour has released.
            if buffers.get(buffer.rank) == buffer:
                self._described.pop(buffers.pop(buffer.rank), None)
            if not buffers:
                del self._kept[state]

    def _forget_buffer(self, buffer: Buffer) -> None:
        for state, copies in list(self._held.items()):
            if copies.get(buffer.rank) is not None and copies[buffer.rank].buffer == buffer:
                del copies[buffer.rank]
            if not copies:
                del self._held[state]

    def acknowledge(self, mirror: str, step: int, *, copied: bool) -> bool:
        """A mirror of this node has copied a step, or has no room for it. It holds the workers up no longer.

        Reports of other nodes, and of older steps, change nothing: the result is False.
        """
        if step <= self._acknowledged.get(mirror, step):
            return False
        self._acknowledged[mirror] = step
        (self._without_room.discard if copied else self._without_room.add)(mirror)
        return True

    def expire(self, now_s: float) -> list[str]:
        """Wait no longer for mirrors that have not copied this node's newest step in `MIRROR_S`. Returns them.

        Checkpoints wait for mirrors. A mirror that never ends must not keep a run from committing.
        """
        step = self.newest_own
        copies = self._held.get(State(self.generation, step), {})
        late = [mirror for mirror, has in self._acknowledged.items() if has < step]
        if not late or now_s - max(copies[rank].complete_s for rank in self._own) < MIRROR_S:
            return []
        for mirror in late:
            self.acknowledge(mirror, step, copied=False)
        return late

    @property
    def mirrors_have_room(self) -> bool:
        """Whether each mirror of this node has a copy of the newest step that it has acknowledged."""
        return not self._without_room

    def take_complete(self) -> int | None:
        """The newest step that this node holds whole, and its mirrors that have room, if newer than the last answer."""
        step = min([self.newest_own, *self._acknowledged.values()])
        held = self._held.get(State(self.generation, step), {})
        # A stop may have overwritten the step that a mirror has.
        if step <= self.complete_step or not set(self._own) <= held.keys():
            return None
        self.complete_step = step
        return step

    def is_complete(self, step: int, stay: Collection[str]) -> bool:
        """Whether this node, and its mirrors in `stay` that have room, hold a state of this generation at or after `step`."""
        steps = [has for mirror, has in self._acknowledged.items() if mirror in stay]
        return self.complete_step >= step or min([self.newest_own, *steps]) >= step

    def forget_others(self) -> bool:
        """All nodes and their mirrors hold a state of this generation: the one it resumed from is not needed any more.

        Returns whether there was one.
        """
        return self._forget(lambda state: state.generation != self.generation)

    def forget_before(self, committed_step: int) -> bool:
        """The bucket has a step: older states that are not of this generation are of no use. Whether there was one."""
        return self._forget(
            lambda state: state.generation != self.generation and state.step < committed_step
        )

    def forget_spares(self) -> bool:
        """There is no room for new buffers: forget copies of the state that this generation resumed from.

        Only those that other members hold too, and from which these are read first: all nodes may do so at once.
        Returns whether there was one.
        """
        if self._resumed is None:
            return False
        copies = self._held.get(State(self._resumed.generation, self._resumed.step), {})
        spares = [
            copy for rank, copy in copies.items() if self._resumed.sources[rank] != self._node_rank
        ]
        for copy in spares:
            self.drop(copy.buffer)
        return bool(spares)

    def distrust(self, state: State) -> None:
        """The rows of a state in memory do not fit together."""
        self._unusable.add(Unusable(*state, -1, ""))

    def copy_failed(self, state: State, rank: int, holder: str, *, damaged: bool) -> None:
        """This node's workers could not read a copy. It is unusable if it is damaged, or in the second such generation.

        `holder` is the incarnation of its node.
        """
        copy = Unusable(*state, rank, holder)
        generations = self._failures.setdefault(copy, set())
        generations.add(self.generation)
        if damaged or len(generations) >= _FAILURES:
            self._unusable.add(copy)

    def _forget(self, unwanted: Callable[[State], bool]) -> bool:
        found = [state for state in self._held if unwanted(state)]
        for state in found:
            del self._held[state]
        held = {generation for generation, _ in self._held} | {self.generation}
        self._sizes = {number: self._sizes[number] for number in held}
        return bool(found)


def _runs(ranks: Sequence[int]) -> list[range]:
    """Ascending ranks as ranges without gaps."""
    runs: list[range] = []
    for rank in ranks:
        if runs and runs[-1].stop == rank:
            runs[-1] = range(runs[-1].start, rank + 1)
        else:
            runs.append(range(rank, rank + 1))
    return runs
