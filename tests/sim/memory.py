"""States in the memory of nodes, and copies of them on other nodes: what `train.snapshots`, `agent.snapshots` and
`agent.mirror` do with threads and files, on simulated time.

    step ─► Buffers.write ─► described ─► held ─► a Mirror of another node asks, copies, and asks again (which reports it)
    all acknowledged ─► complete_step ─► the next step's all-reduce ─► an older buffer may be overwritten
    GENERATION.memory ─► Memory.restore: own buffers, and those of the members that the record names

`Holdings` (what a node keeps, and what is complete), `mirrored_by` (who copies whom) and `newest_in_memory` (which state
a generation resumes from) are the production code.
The content of a buffer is what it says in its control words: whose rows they are, and of which step.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from elastic_pt.agent.holdings import Copy, Holdings, State
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.membership.decision.status import Held, Unusable
from elastic_pt.membership.node import Formed
from elastic_pt.membership.resources import Answer
from elastic_pt.runlog.records import Generation

if TYPE_CHECKING:
    from tests.sim.agent import AgentProcess

BUFFERS: Final = 3
"""Of each worker: a complete state, the one that is on its way to the mirrors, and one that a checkpoint keeps."""
_AGAIN_S: Final = 0.1
_FULL_S: Final = 1.0
_QUESTION_S: Final = 10.0
_RESTORE_S: Final = 0.02
_RESTORE_TIMEOUT_S: Final = 3.0


@dataclass(frozen=True)
class SnapshotHabits:
    """How the nodes of a run take snapshots and copy each other's."""

    copies: int
    every_steps: int
    copy_s: float
    """What a snapshot keeps a worker from its next step."""
    describe_s: float
    mirror_s: float
    """What it takes to copy one worker's rows to another node."""
    slow: frozenset[str] = frozenset()
    """Nodes that take a multiple of that."""
    without_mirror_room: frozenset[str] = frozenset()
    """Nodes with no room for copies of others' states."""
    without_room: frozenset[str] = frozenset()
    """Nodes with no room for snapshots of their own workers: no world with one of them takes any."""


_SLOWNESS: Final = 20.0


def draw_habits(source: random.Random, nodes: tuple[str, ...]) -> SnapshotHabits | None:
    """The snapshots of a seed; None for a run without them."""
    if source.random() < 0.1:
        return None

    def some(share: float) -> frozenset[str]:
        return frozenset(node for node in nodes if source.random() < share)

    return SnapshotHabits(
        copies=source.choice((1, 1, 1, 2)),
        every_steps=source.choice((1, 1, 1, 2, 5)),
        copy_s=source.choice((0.001, 0.01, 0.03)),
        describe_s=source.choice((0.001, 0.02, 0.15)),
        mirror_s=source.choice((0.005, 0.03, 0.2)),
        slow=some(0.15),
        without_mirror_room=some(0.08),
        without_room=some(0.02),
    )


@dataclass(eq=False)
class BufferFile:
    """One buffer file, as in `checkpoint.snapshot`: rows of one worker, by its generation and rank."""

    name: Buffer
    begun: int = 0
    done: int = 0
    keepers: int = 0
    """Checkpoints that still need its content: it is not overwritten while there is one."""

    @property
    def generation(self) -> int:
        """Whose workers wrote it."""
        return self.name.generation

    @property
    def step(self) -> int:
        """The step of the whole state in it; 0 if there is none."""
        return self.done if self.begun == self.done else 0


def new_files(generation: int, rank: int) -> list[BufferFile]:
    """The buffers of one worker, all empty."""
    return [BufferFile(Buffer(generation, rank, number)) for number in range(BUFFERS)]


def file_to_write(files: list[BufferFile], needed: frozenset[int]) -> BufferFile | None:
    """The buffer that the next state overwrites: the oldest whose step is not needed. None if all are."""
    free = [each for each in files if not each.begun or each.begun not in needed]
    return min(free, key=lambda each: each.begun, default=None)


class Complete(NamedTuple):
    """What workers know of the states that their nodes hold."""

    step: int
    """The newest one that all nodes hold, and all mirrors that have room."""
    mirrored: bool
    """Whether all mirrors have room."""


@dataclass(eq=False)
class Buffers:
    """The buffers of one member's workers in one generation, as those workers see them."""

    memory: "Memory"
    generation: int
    files: dict[int, list[BufferFile]]
    """By rank."""
    complete: Complete = field(default_factory=lambda: Complete(0, mirrored=True))
    """What the agent has told its workers."""
    _writing: list[BufferFile] = field(default_factory=list)

    def hears(self, complete: Complete) -> None:
        """The agent tells its workers."""
        self.complete = complete

    @property
    def kept(self) -> frozenset[int]:
        """The steps that checkpoints keep."""
        files = [each for files in self.files.values() for each in files]
        return frozenset(each.begun for each in files if each.keepers)

    def needed(self, complete_step: int) -> frozenset[int]:
        """The steps that are not overwritten: those that a checkpoint keeps, and the one that is complete everywhere."""
        return self.kept | {complete_step}

    def has_room(self, complete_step: int) -> bool:
        """Whether a state can be written now, if all workers know that `complete_step` is complete."""
        needed = self.needed(complete_step)
        return all(file_to_write(each, needed) is not None for each in self.files.values())

    def begin(self, step: int, complete_step: int, *, keep: bool) -> None:
        """Begin to copy the state of this step."""
        self._writing, needed = [], self.needed(complete_step)
        for files in self.files.values():
            file = file_to_write(files, needed)
            assert file is not None
            self.memory.begin(file, step)
            file.keepers += keep
            self._writing.append(file)

    def end(self) -> None:
        """The copies are whole."""
        for file in self._writing:
            file.done = file.begun


class Memory:
    """One agent's snapshots and mirrors, over all its generations: `InMemoryStates` for the production code."""

    def __init__(self, process: "AgentProcess", habits: SnapshotHabits | None) -> None:
        self.process = process
        self.habits = habits
        self.holdings = Holdings()
        self.complete = 0
        """The newest step of this generation that this node holds, and its mirrors that have room."""
        self._complete_everywhere = 0
        """The newest one that all nodes hold so, as this node's workers have agreed with the others."""
        self.buffers: Buffers | None = None
        """Of the newest generation's workers; None if there is no room."""
        self._files: dict[Buffer, BufferFile] = {}
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
        self.complete = self._complete_everywhere = 0
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

    def written(self, buffers: Buffers, step: int, complete: Complete) -> None:
        """This node's workers have written the state of a step, and told what was complete everywhere."""
        if buffers.generation != self.holdings.generation or self.habits is None:
            return
        self._complete_everywhere = complete.step
        if complete.step and complete.mirrored:
            self._forgetting(self.holdings.forget_others)
        for count, files in enumerate(buffers.files.values()):
            found = [each for each in files if each.step == step]
            if found:
                delay_s = self.habits.describe_s * (count + 1)
                self.process.after(delay_s, lambda file=found[0]: self._describe(file, step))

    def committed(self, step: int) -> None:
        """The bucket has the state of this step."""
        if self.habits is not None:
            self._forgetting(lambda: self.holdings.forget_before(step))

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
            mirrored = self.holdings.mirrored
            self.process.around.witness.memory.completes(self)
            self.process.node.states_changed()
            if self.buffers is not None:
                self.buffers.hears(Complete(step, mirrored))

    def _forgetting(self, forget: Callable[[], object]) -> None:
        """Forget states; files that hold none of the others are removed."""
        before = self.holdings.buffers
        forget()
        for name in before - self.holdings.buffers:
            file = self._files.pop(name)
            self.process.around.witness.memory.drops(self, (file.generation, file.step))

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
            kept = frozenset[int]() if self.buffers is None else self.buffers.kept
            reply(Next(newest, kept, self._complete_everywhere))
        else:
            self._waiting.append(lambda: self._answer(question, reply))

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for look in waiting:
            look()

    def find(self, state: State, rank: int) -> BufferFile | None:
        """The buffer with one worker's rows of one state, for who asks for it by name."""
        copy = self.holdings.find(state, rank)
        return None if copy is None else self._files[copy.buffer]

    # ---- for the workers of a new generation ----------------------------------------------------------

    def restore(self, formed: Formed, done: Callable[[str], None]) -> None:
        """Read this node's rows of the state that its generation resumes from; `done` with what went wrong."""
        _Restore(self, formed, done).read()


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


def _peer_of(memory: Memory, incarnation: str) -> "AgentProcess | None":
    """The agent of a member, if it can be reached and answers."""
    process = memory.process
    other = process.around.agents[incarnation]
    if other is process:
        return other
    torn = process.around.network.is_torn(process.machine, other.machine)
    return None if torn or other.dead or other.paused else other


class Mirror:
    """Copies the snapshots of one other node's workers, until it is stopped.

    ask for the next step ─► copy rank after rank ─► ask again, which reports the copy ─► ...
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
        other = _peer_of(self.memory, self.neighbour)
        if other is None:
            self._again(_AGAIN_S)
            return
        after, source = min(self._has.values()), process.around.memory_random
        delay_s = process.around.network.latency.draw(source)

        def answered(found: Next | None) -> None:
            """On the neighbour's side: the answer travels, if it can."""
            if (
                self.stopped
                or number != self._asking
                or _peer_of(self.memory, self.neighbour) is None
            ):
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
        """Copy the next rank of which there is no copy; ask again after the last one."""
        step = wanted.step
        rank = next((rank for rank, has in self._has.items() if has < step), None)
        if self.stopped or rank is None:
            self._again(0.0)
            return
        found = self._source(step, rank)
        files = self._files.setdefault(rank, new_files(self.generation, rank))
        target = file_to_write(files, self._needed(rank, wanted))
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
            self._has[rank] = step
            self.memory.copied(target)
            self._copy(wanted)

        spread = 0.5 + self.memory.process.around.memory_random.random()
        self.memory.process.after(self._copy_s * spread, end)

    def _needed(self, rank: int, wanted: Next) -> frozenset[int]:
        """The steps of a worker that are not overwritten."""
        return wanted.kept | {wanted.complete_step}

    def _source(self, step: int, rank: int) -> BufferFile | None:
        other = _peer_of(self.memory, self.neighbour)
        return None if other is None else other.memory.find((self.generation, step), rank)


class _Restore:
    """Reads a node's share of a state from its own buffers and from other members."""

    def __init__(self, memory: Memory, formed: Formed, done: Callable[[str], None]) -> None:
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
            peer = _peer_of(self._memory, member.incarnation)
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

    def _find(self, memory: Memory, rank: int) -> BufferFile | None:
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
