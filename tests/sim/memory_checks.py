"""What must hold for the states in memory, whatever happens. It sees the buffers of all nodes; no agent knows of it.

written, copied     a node holds what it says; who has acknowledged a copy has it
overwritten         nothing that the newest complete state needs, and nothing that a checkpoint still reads
GENERATION          resumes from a state of its own lineage that its members hold, and not before the newest complete one
restored            all rows are of one state
COMMIT              of a state through which the newest generation has come
"""

from typing import TYPE_CHECKING

from elastic_pt.membership.decision.status import Held
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import CauseKind, Checkpoint, Generation
from elastic_pt.runlog.state import State
from tests.sim.buffers import BufferFile
from tests.sim.memory import Memory
from tests.sim.restoring import belongs, resumed_from
from tests.sim.training import State as WorkerState
from tests.sim.violation import Violation

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation


class MemoryWitness:
    """See the module."""

    def __init__(self, simulation: "Simulation") -> None:
        self.simulation = simulation
        self.generations: dict[int, Generation] = {}
        self.complete: dict[int, int] = {}
        """The newest step of which all workers know that all nodes and their mirrors hold it whole, by generation."""
        self._whole: dict[int, int] = {}
        """The newest step that they do hold whole; known or not."""
        self._complete_s: dict[int, list[tuple[float, int]]] = {}
        """When each of those was complete."""
        self.committed_step = 0
        self.restores_from_memory = 0
        self.adopted = 0
        """Parts of lost nodes that their mirrors have uploaded."""

    @property
    def newest(self) -> int:
        """The newest generation in the log."""
        return max(self.generations, default=0)

    # ---- on one node -------------------------------------------------------------------------------

    def claims(self, memory: Memory, held: tuple[Held, ...]) -> None:
        """A node says what it holds."""
        for each in held:
            for rank in range(each.first_rank, each.end_rank):
                if not _holds(memory, (each.generation, each.step), rank):
                    raise Violation(
                        "a node holds what it says",
                        f"{memory.process.name} has no whole rows of rank {rank}, generation {each.generation}, "
                        f"step {each.step}",
                    )

    def completes(self, memory: Memory) -> None:
        """A node and its mirrors hold a newer step, by what the mirrors have acknowledged."""
        number, step = memory.holdings.generation, memory.complete
        generation = self.generations[number]
        index = generation.rank_of(memory.process.incarnation)
        assert index is not None
        stopped = self.simulation.training.worlds[number].stopping
        if stopped and memory.holdings.newest_own > step:
            # The last state may have overwritten this one. No step follows in which workers could agree on it.
            return
        for holder in (index, *self._mirrors(generation)[index]):
            copy = self._memory(generation, holder)
            if copy.process.dead or copy.holdings.generation != number:
                continue
            for rank in generation.worker_ranks()[index]:
                if not _holds(copy, (number, step), rank):
                    raise Violation(
                        "an acknowledged copy is there",
                        f"{copy.process.name} has no whole rows of rank {rank} of step {step}",
                    )
        each = [self._memory(generation, index) for index in range(len(generation.members))]
        whole = min(
            memory.complete if memory.holdings.generation == number else 0 for memory in each
        )
        self._whole[number] = max(whole, self._whole.get(number, 0))

    def agrees(self, number: int, step: int) -> None:
        """All workers of a generation have agreed that a step is complete."""
        complete = min(step, self._whole.get(number, 0))
        if complete > self.complete.get(number, 0):
            self.complete[number] = complete
            moments = self._complete_s.setdefault(number, [])
            moments.append((self.simulation.scheduler.now_s, complete))

    def overwrites(self, memory: Memory, file: BufferFile) -> None:
        """A node is about to overwrite a buffer."""
        self._require_not_kept(memory, file)
        if file.step:
            self._require_unneeded(memory, (file.generation, file.step), "overwrites")

    def drops(self, memory: Memory, file: BufferFile) -> None:
        """A node is about to remove a buffer of an earlier generation."""
        self._require_not_kept(memory, file)
        self._require_unneeded(memory, (file.generation, file.step), "drops")

    def _require_not_kept(self, memory: Memory, file: BufferFile) -> None:
        if file.kept:
            raise Violation(
                "a buffer that a checkpoint needs is not reused",
                f"{memory.process.name}: step {file.step}",
            )

    def _require_unneeded(self, memory: Memory, state: State, what: str) -> None:
        newest = self.generations.get(self.newest)
        if newest is None or newest.rank_of(memory.process.incarnation) is None:
            return
        complete = self.complete.get(newest.number, 0)
        if state[0] == newest.number:
            needed = state[1] == complete
        else:
            needed = not complete and newest.memory is not None and state == resumed_from(newest)
            needed = needed and self.committed_step < state[1]
        if needed:
            raise Violation(
                "no buffer is reused early",
                f"{memory.process.name} {what} generation {state[0]}, step {state[1]}; complete in generation "
                f"{newest.number} is step {complete}",
            )

    def uploaded(self, memory: Memory, files: list[BufferFile], state: State) -> None:
        """A node has read the buffers of a checkpoint to their end."""
        if any((each.generation, each.step) != state for each in files):
            raise Violation(
                "a buffer that a checkpoint needs is not reused",
                f"{memory.process.name} has uploaded another state than {state}",
            )

    def restores(self, memory: Memory, generation: Generation, files: list[BufferFile]) -> None:
        """A node's workers have read their rows."""
        self.restores_from_memory += 1
        found = {(each.generation, each.step) for each in files}
        if found != {resumed_from(generation)}:
            raise Violation(
                "a restore takes all rows from one state",
                f"{memory.process.name} has rows of {sorted(found)} in generation {generation.number}, which resumes "
                f"from {resumed_from(generation)}",
            )

    def lost(self, memory: Memory) -> None:
        """A node's memory is gone: if no other node is gone with all its mirrors, a whole state is left."""
        number = self.newest
        generation, complete = self.generations.get(number), self.complete.get(number, 0)
        if generation is None or not complete or complete <= self.committed_step:
            return
        if generation.rank_of(memory.process.incarnation) is None:
            return
        left = [
            index
            for index, each in enumerate(generation.members)
            if not self.simulation.agents[each.incarnation].dead
        ]
        if not self._covered(generation, left):
            return
        memories = [self._memory(generation, index) for index in left]
        steps = {held.step for each in memories for held in each.holdings.held(0.0)}
        if not any(
            step >= complete and self._is_whole(generation, step, memories) for step in steps
        ):
            raise Violation(
                "a consistent state always exists",
                f"{memory.process.name} is gone, and with it step {complete} of generation {number}, which was "
                "complete",
            )

    def _is_whole(self, generation: Generation, step: int, memories: list[Memory]) -> bool:
        return all(
            any(_holds(each, (generation.number, step), rank) for each in memories)
            for rank in range(generation.world_size)
        )

    # ---- the log -----------------------------------------------------------------------------------

    def begins(self, generation: Generation, before: RunView, noticed_s: float) -> None:
        """A generation is in the log; its proposer has noticed its cause at that time."""
        number, last = generation.number, self.generations.get(generation.number - 1)
        self.generations[number] = generation
        committed = before.commit.newest.step if before.commit is not None else 0
        if generation.resume_step < committed:
            raise Violation(
                "no committed step is lost", f"{generation.resume_step} after {committed}"
            )
        if last is None:
            return
        state = resumed_from(generation)
        if state is not None and not belongs(self.generations, last.number, state):
            raise Violation(
                "a generation resumes within its lineage",
                f"generation {number} resumes from {state}, through which {last.number} has not come",
            )
        self._check_held(generation)
        self._check_losses(generation, last, noticed_s)

    def _check_held(self, generation: Generation) -> None:
        """The members that a record names have what it says, if they live."""
        memory = generation.memory
        for rank, source in enumerate(() if memory is None else memory.sources):
            assert memory is not None
            held = self._memory(generation, source)
            state = (memory.generation, memory.step)
            if not held.process.dead and not _holds(held, state, rank):
                raise Violation(
                    "the members of a generation hold its state",
                    f"{held.process.name} has no rows of rank {rank}, generation {memory.generation}, step "
                    f"{memory.step}",
                )

    def _check_losses(self, generation: Generation, last: Generation, noticed_s: float) -> None:
        """What was complete when the cause was noticed is not lost, and nothing at all in a planned change."""
        left = [
            index
            for index, each in enumerate(last.members)
            if generation.rank_of(each.incarnation) is not None
        ]
        if not self._covered(last, left) or self._has_unusable(last, left):
            return
        moments = self._complete_s.get(last.number, [])
        complete = max((step for at_s, step in moments if at_s < noticed_s), default=0)
        if generation.resume_step < complete:
            raise Violation(
                "what is complete is not lost",
                f"generation {generation.number} resumes from step {generation.resume_step}; complete was {complete}",
            )
        world = self.simulation.training.worlds.get(last.number)
        if world is None or len(world.workers) < len(last.members):
            return
        finished = all(each.state is WorkerState.FINISHED for each in world.workers.values())
        planned = all(each.kind in (CauseKind.LEFT, CauseKind.JOINED) for each in generation.causes)
        if finished and planned and generation.resume_step < world.step:
            raise Violation(
                "a planned change loses no step",
                f"generation {generation.number} resumes from step {generation.resume_step} after {world.step}",
            )

    def commits(self, checkpoint: Checkpoint) -> None:
        """A checkpoint counts."""
        self.committed_step = max(self.committed_step, checkpoint.step)
        state = (checkpoint.generation, checkpoint.step)
        if not belongs(self.generations, self.newest, state):
            raise Violation(
                "a commit is of the lineage",
                f"step {checkpoint.step} of generation {checkpoint.generation}, through which generation "
                f"{self.newest} has not come",
            )

    # ---- who holds what ------------------------------------------------------------------------------

    def _memory(self, generation: Generation, index: int) -> Memory:
        return self.simulation.agents[generation.members[index].incarnation].memory

    def _mirrors(self, generation: Generation) -> list[list[int]]:
        """For each member the ones that copy its rows and have room for them."""
        habits = self.simulation.habits.snapshots
        full = () if habits is None else habits.without_mirror_room
        return [
            [n for n in each if self._memory(generation, n).process.machine.name not in full]
            for each in generation.mirrors
        ]

    def _covered(self, generation: Generation, left: list[int]) -> bool:
        """Whether each member is left, or one of its mirrors."""
        return all(
            {index, *mirrors} & set(left) for index, mirrors in enumerate(self._mirrors(generation))
        )

    def _has_unusable(self, generation: Generation, left: list[int]) -> bool:
        return any(self._memory(generation, index).unusable for index in left)


def _holds(memory: Memory, state: State, rank: int) -> bool:
    """Whether a node has the whole rows of one worker at a step."""
    file = memory.find(state, rank)
    return file is not None and (file.generation, file.step) == state
