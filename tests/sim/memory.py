"""States in the memory of nodes, and copies of them on other nodes: what `train.snapshots`, `agent.snapshots` and
`agent.mirror` do with threads and files, on simulated time.

    step ─► Buffers.write ─► described ─► held ─► a Mirror of another node asks, copies, and asks again (which reports it)
    all acknowledged ─► complete_step ─► the next step's all-reduce ─► an older buffer may be overwritten
    GENERATION.memory ─► Memory.restore: own buffers, and those of the members that the record names

`Holdings` (what a node keeps, and what is complete), `buffer_to_write` (which buffer is overwritten), `mirrored_by` (who
copies whom) and `newest_in_memory` (which state a generation resumes from) are the production code.
The content of a buffer is what it says in its control words: whose rows they are, and of which step.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from elastic_pt.agent.holdings import Copy, Holdings
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.membership.decision.status import Held, Unusable
from elastic_pt.membership.node import Formed
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.state import State
from tests.sim.buffers import (
    BufferFile,
    Buffers,
    Complete,
    SnapshotHabits,
    file_to_write,
    new_files,
)
from tests.sim.restoring import Restore

if TYPE_CHECKING:
    from tests.sim.agent import AgentProcess

_AGAIN_S: Final = 0.1
_FULL_S: Final = 1.0
_QUESTION_S: Final = 10.0
_SLOWNESS: Final = 20.0
"""How much longer slow nodes take to copy."""


class Memory:
    """One agent's snapshots and mirrors, over all its generations: `InMemoryStates` for the production code."""

    def __init__(self, process: "AgentProcess", habits: SnapshotHabits | None) -> None:
        self.process = process
        self.habits = habits
        self.holdings = Holdings()
        self.complete = 0
        """The newest step of this generation that this node holds, and its mirrors that have room."""
        self.buffers: Buffers | None = None
        """Of the newest generation's workers; None if there is no room."""
        self._files: dict[Buffer, BufferFile] = {}
        self._kept: dict[State, list[BufferFile]] = {}
        """The buffers of this node's workers that checkpoints keep."""
        self._mirrors: list[Mirror] = []
        self._waiting: list[Callable[[], None]] = []

    # ---- for the membership ------------------------------------------------------------------------

    @property
    def held(self) -> tuple[Held, ...]:
        """The rows and states in this node's memory."""
        held = self.holdings.held(self.process.clock_s())
        self.process.around.witness.memory.claims(self, held)
        return held

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """Copies that this node's workers could not read."""
        return self.holdings.unusable

    @property
    def routes(self) -> Mapping[str, Answer]:
        """Peers call methods here."""
        return {}

    # ---- one generation ----------------------------------------------------------------------------

    def starts(self, formed: Formed) -> Buffers | None:
        """Workers of a new generation are about to start: keep the state that it resumes from, begin to mirror."""
        self.stop_mirrors()
        self.buffers = None
        if self.habits is None:
            return None
        generation, rank = formed.generation, formed.node_rank
        number, members, ranks = generation.number, generation.members, generation.worker_ranks()
        self.complete = 0
        self._forgetting(lambda: self.holdings.starts(generation, rank))
        self._wake()
        self._mirrors = [
            Mirror(self, number, members[n].incarnation, ranks[n])
            for n, mirrors in enumerate(generation.mirrors)
            if rank in mirrors
        ]
        if self.process.machine.name not in self.habits.without_room:
            files = {each: new_files(number, each) for each in ranks[rank]}
            self.buffers = Buffers(self, number, files)
        return self.buffers

    def written(self, buffers: Buffers, step: int, complete: Complete, kept: bool) -> None:
        """This node's workers have written the state of a step, and told what was complete everywhere."""
        if buffers.generation != self.holdings.generation or self.habits is None:
            return
        files = [each for files in buffers.files.values() for each in files if each.step == step]
        if kept:
            self._kept[buffers.generation, step] = files
            for each in files:
                self._files[each.name] = each
                self.holdings.keep(each.name, step)
        self.holdings.agreed_step = max(self.holdings.agreed_step, complete.step)
        if complete.step and complete.mirrored:
            self._forgetting(self.holdings.forget_others)
        for count, file in enumerate(files):
            delay_s = self.habits.describe_s * (count + 1)
            self.process.after(delay_s, lambda file=file: self._describe(file, step))

    def kept(self, state: State) -> list[BufferFile]:
        """The buffers of this node's workers that are kept for the bucket."""
        return self._kept.get(state, [])

    def adoptable(self, state: State, ranks: range) -> list[BufferFile]:
        """The copies of all workers of another node, of a state that it has kept for the bucket; else none."""
        copies = self.holdings.checkpoint(state)
        if not all(rank in copies for rank in ranks):
            return []
        return [self._files[copies[rank].buffer] for rank in ranks]

    def release(self, state: State) -> None:
        """The bucket has this node's part of a state, or will never have it."""
        for each in self._kept.pop(state, []):
            each.kept = False
        self._forgetting(lambda: self.holdings.release(state))

    def committed(self, step: int) -> None:
        """The bucket has the state of this step."""
        if self.habits is not None:
            self._forgetting(lambda: self.holdings.forget_before(step))

    def mirror_keeps(self, generation: int, ranks: Iterable[int], steps: Collection[int]) -> None:
        """A neighbour with these workers keeps these steps for the bucket; this node has copies of them."""
        found = sorted(ranks)
        self.holdings.neighbour_keeps(generation, range(found[0], found[-1] + 1), steps)

    def stop_mirrors(self) -> None:
        """Copy no more."""
        for each in self._mirrors:
            each.stopped = True
        self._mirrors = []

    def _describe(self, file: BufferFile, step: int) -> None:
        if file.step == step:
            self.copied(file)

    def copied(self, file: BufferFile) -> None:
        """A buffer of this node holds a whole state whose CRCs are known."""
        if self.holdings.add(Copy(file.name, file.step, 1, b"", self.process.clock_s())):
            self._files[file.name] = file
            self._wake()
            self._look()
            self.process.node.states_changed()

    def begin(self, file: BufferFile, step: int) -> None:
        """A buffer is about to be overwritten by the state of a step."""
        self.process.around.witness.memory.overwrites(self, file)
        self.holdings.drop(file.name)
        file.begun = step

    def _look(self) -> None:
        step = self.holdings.take_complete()
        if step is not None:
            self.complete = step
            mirrored = self.holdings.mirrors_have_room
            self.process.around.witness.memory.completes(self)
            self.process.node.states_changed()
            if self.buffers is not None:
                self.buffers.hears(Complete(step, mirrored))

    def _forgetting(self, forget: Callable[[], object]) -> None:
        """Forget states; files that hold none of the others are removed."""
        before = self.holdings.buffers
        forget()
        for name in sorted(before - self.holdings.buffers):
            if name.generation == self.holdings.generation:
                # Its buffers stay, and are written again.
                continue
            self.process.around.witness.memory.drops(self, self._files.pop(name))

    # ---- for mirrors and restores of other nodes -----------------------------------------------------

    def asked(self, question: "Question", reply: "Reply") -> None:
        """The next step for a mirror, once there is one; the question reports what the mirror has."""
        if question.generation != self.holdings.generation:
            reply(None)
            return
        self.holdings.acknowledge(question.mirror, question.after, copied=question.copied)
        self._look()
        self._answer(question, reply)

    def _answer(self, question: "Question", reply: "Reply") -> None:
        newest = self.holdings.newest_own
        if question.generation != self.holdings.generation:
            reply(None)
        elif newest > question.after:
            kept = frozenset(self.holdings.kept_steps)
            reply(Next(newest, kept, self.holdings.agreed_step))
        else:
            self._waiting.append(lambda: self._answer(question, reply))

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for look in waiting:
            look()

    def peer(self, incarnation: str) -> "AgentProcess | None":
        """The agent of a member, if it can be reached and answers."""
        process = self.process
        other = process.around.agents[incarnation]
        if other is process:
            return other
        torn = process.around.network.is_torn(process.machine, other.machine)
        return None if torn or other.dead or other.paused else other

    def find(self, state: State, rank: int) -> BufferFile | None:
        """The buffer with one worker's rows of one state, for who asks for it by name."""
        copy = self.holdings.find(state, rank)
        return None if copy is None else self._files[copy.buffer]

    # ---- for the workers of a new generation ----------------------------------------------------------

    def restore(self, formed: Formed, done: Callable[[str], None]) -> None:
        """Read this node's rows of the state that its generation resumes from; `done` with what went wrong."""
        Restore(self, formed, done).read()


@dataclass(frozen=True)
class Question:
    """What a mirror asks its neighbour."""

    generation: int
    after: int
    """The newest step that it has, or has no room for."""
    copied: bool
    mirror: str
    """Its incarnation."""


class Next(NamedTuple):
    """What the neighbour answers."""

    step: int
    kept: frozenset[int]
    """The steps that checkpoints keep."""
    complete_step: int
    """The step that is complete everywhere, as the workers know. They do not overwrite it, so the mirror must not either."""


Reply = Callable[[Next | None], None]


class Mirror:
    """Copies the snapshots of one other node's workers, until it is stopped.

    ask for the next step ─► copy the kept steps and that one, rank after rank ─► ask again, which reports the copy ─► ...
    """

    def __init__(self, memory: Memory, generation: int, neighbour: str, ranks: range) -> None:
        assert memory.habits is not None
        self.memory = memory
        self.generation = generation
        self.neighbour = neighbour
        self.stopped = False
        self._has = dict.fromkeys(ranks, 0)
        self._files: dict[int, list[BufferFile]] = {}
        self._asking = 0
        """Number of the question whose answer counts."""
        name = memory.process.machine.name
        self._reported_full = False
        self._full = name in memory.habits.without_mirror_room
        self._copy_s = memory.habits.mirror_s * (_SLOWNESS if name in memory.habits.slow else 1.0)
        self._again(0.0)

    def _again(self, delay_s: float) -> None:
        self.memory.process.after(delay_s, self._ask)

    def _ask(self) -> None:
        if self.stopped:
            return
        self._asking += 1
        process, number = self.memory.process, self._asking
        other = self.memory.peer(self.neighbour)
        if other is None:
            self._again(_AGAIN_S)
            return
        after, source = min(self._has.values()), process.around.memory_random
        delay_s = process.around.network.latency.draw(source)

        def answered(found: Next | None) -> None:
            """On the neighbour's side: the answer travels, if it can."""
            if self.stopped or number != self._asking or self.memory.peer(self.neighbour) is None:
                return
            process.after(delay_s, lambda: self._answered(number, found))

        question = Question(self.generation, after, not self._reported_full, process.incarnation)
        process.scheduler.after(delay_s, lambda: other.memory.asked(question, answered), other)
        process.after(_QUESTION_S, lambda: self._ask() if number == self._asking else None)

    def _answered(self, number: int, found: Next | None) -> None:
        if self.stopped or number != self._asking:
            return
        self._asking += 1
        if found is None:
            self._again(_AGAIN_S)
        elif self._full:
            # The neighbour goes on without a copy here.
            self._has, self._reported_full = dict.fromkeys(self._has, found.step), True
            self._again(_FULL_S)
        else:
            self._copy(found)

    def _copy(self, wanted: Next) -> None:
        """Copy the next rank and step of which there is no copy; ask again after the last one."""
        missing = self._missing(wanted)
        if self.stopped or missing is None:
            if not self.stopped:
                self.memory.mirror_keeps(self.generation, self._has, wanted.kept)
            self._again(0.0)
            return
        step, rank = missing
        found = self._source(step, rank)
        files = self._files.setdefault(rank, new_files(self.generation, rank))
        target = file_to_write(files, wanted.kept, wanted.complete_step)
        if found is None or target is None:
            self._again(_AGAIN_S)
            return
        self.memory.begin(target, step)

        def end() -> None:
            if self.stopped:
                return
            if found.step != step or self._source(step, rank) is not found:
                self._again(_AGAIN_S)
                return
            target.done = step
            self._has[rank] = max(step, self._has[rank])
            self.memory.copied(target)
            self._copy(wanted)

        spread = 0.5 + self.memory.process.around.memory_random.random()
        self.memory.process.after(self._copy_s * spread, end)

    def _missing(self, wanted: Next) -> tuple[int, int] | None:
        """The oldest step of a rank that is not copied yet: a step that is kept for the bucket, or the newest one."""
        return next(
            (
                (step, rank)
                for step in sorted({*wanted.kept, wanted.step})
                for rank in self._has
                if all(each.step != step for each in self._files.get(rank, ()))
            ),
            None,
        )

    def _source(self, step: int, rank: int) -> BufferFile | None:
        other = self.memory.peer(self.neighbour)
        return None if other is None else other.memory.find((self.generation, step), rank)
