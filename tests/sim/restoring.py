"""Reading the state from which a generation resumes, from the memory of nodes; and the lineage of states in the log."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from elastic_pt.membership.node import Formed
from elastic_pt.runlog.records import Generation
from elastic_pt.runlog.state import State
from tests.sim.buffers import BufferFile

if TYPE_CHECKING:
    from tests.sim.memory import Memory

_AGAIN_S: Final = 0.1
_RESTORE_S: Final = 0.02
_RESTORE_TIMEOUT_S: Final = 3.0


class Restore:
    """Reads a node's share of a state from its own buffers and from other members."""

    def __init__(self, memory: "Memory", formed: Formed, done: Callable[[str], None]) -> None:
        assert formed.generation.memory is not None
        self._memory = memory
        self._generation = formed.generation
        self._wanted = formed.generation.memory
        self._ranks = _needed(formed)
        self._done = done
        self._deadline_s = memory.process.scheduler.now_s + _RESTORE_TIMEOUT_S

    def read(self) -> None:
        """Find the buffers and read them. Tries again while a member does not answer."""
        files: list[BufferFile] = []
        for rank in self._ranks:
            file = self._find(self._memory, rank) or self._ask(rank)
            if file is None:
                self._try_again(rank)
                return
            files.append(file)
        steps = [each.step for each in files]
        self._memory.process.scheduler.after(_RESTORE_S, lambda: self._verify(files, steps))

    def _ask(self, rank: int) -> BufferFile | None:
        """The rows of one worker at the first member that has them and answers."""
        for index in self._wanted.holders(rank):
            member = self._generation.members[index]
            peer = self._memory.peer(member.incarnation)
            file = None if peer is None else self._find(peer.memory, rank)
            if file is not None:
                return file
            if peer is not None:
                self._memory.holdings.copy_failed(
                    self._state, rank, member.incarnation, damaged=True
                )
        return None

    def _verify(self, files: list[BufferFile], steps: list[int]) -> None:
        if 0 in steps or [each.step for each in files] != steps:
            self._done(f"CheckpointError: a snapshot was overwritten while it was read: {steps}")
            return
        witness = self._memory.process.around.witness
        witness.memory.restores(self._memory, self._generation, files)
        self._done("")

    def _find(self, memory: "Memory", rank: int) -> BufferFile | None:
        return memory.find(self._state, rank)

    @property
    def _state(self) -> State:
        return self._wanted.generation, self._wanted.step

    def _try_again(self, rank: int) -> None:
        scheduler = self._memory.process.scheduler
        if scheduler.now_s < self._deadline_s:
            scheduler.after(_AGAIN_S, self.read)
            return
        for index in self._wanted.holders(rank):
            holder = self._generation.members[index].incarnation
            self._memory.holdings.copy_failed(self._state, rank, holder, damaged=False)
        self._done(f"CheckpointError: no snapshot of rank {rank} of {self._state}")


def _needed(formed: Formed) -> list[int]:
    """The old ranks whose rows this node's workers need: rows are spread evenly over the ranks."""
    generation, memory = formed.generation, formed.generation.memory
    assert memory is not None
    new, old = generation.world_size, len(memory.sources)
    ranks = generation.worker_ranks()[formed.node_rank]
    return [
        rank
        for rank in range(old)
        if rank * new < ranks.stop * old and ranks.start * old < (rank + 1) * new
    ]


def resumed_from(generation: Generation) -> State | None:
    """The state from which a generation resumes; None at the start of the run."""
    memory, resume = generation.memory, generation.resume
    if memory is not None:
        return memory.generation, memory.step
    return None if resume is None else (resume.generation, resume.step)


def belongs(generations: Mapping[int, Generation], newest: int, state: State) -> bool:
    """Whether a state is one through which the newest generation's training has come, as the log tells."""
    number, step = newest, state[1]
    while number > state[0] and number in generations:
        before = resumed_from(generations[number])
        if before is None:
            return False
        number, step = before
    return number == state[0] and state[1] <= step
