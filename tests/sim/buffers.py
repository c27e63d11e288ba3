"""The buffers of a node's workers, and what is drawn for a run's snapshots: the model of `checkpoint.snapshot`.

Which buffer is overwritten is the production code (`buffer_to_write`).
"""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from elastic_pt.checkpoint import snapshot
from elastic_pt.checkpoint.snapshot import BUFFERS, Buffer

if TYPE_CHECKING:
    from tests.sim.memory import Memory


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
    upload_s: float = 0.0
    """What a node takes to upload its part of a checkpoint, beside the bucket's requests."""
    slow: frozenset[str] = frozenset()
    """Nodes that take a multiple of that."""
    without_mirror_room: frozenset[str] = frozenset()
    """Nodes with no room for copies of others' states."""
    without_room: frozenset[str] = frozenset()
    """Nodes with no room for snapshots of their own workers: no world with one of them takes any."""


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
        upload_s=source.choice((0.0, 0.0, 0.5, 3.0)),
    )


@dataclass(eq=False)
class BufferFile:
    """One buffer file, as in `checkpoint.snapshot`: rows of one worker, by its generation and rank."""

    name: Buffer
    begun: int = 0
    done: int = 0
    kept: bool = False
    """Whether it is kept for the bucket: then it is not overwritten."""

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


def file_to_write(
    files: list[BufferFile], kept: frozenset[int], complete_step: int
) -> BufferFile | None:
    """The buffer that the next state overwrites; None if all are needed."""
    number = snapshot.buffer_to_write([each.step for each in files], kept, complete_step)
    return None if number is None else files[number]


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
        return frozenset(each.begun for each in files if each.kept)

    def has_room(self, complete_step: int) -> bool:
        """Whether a state can be written now, if all workers know that `complete_step` is complete."""
        kept = self.kept
        return all(file_to_write(each, kept, complete_step) for each in self.files.values())

    def begin(self, step: int, complete_step: int, *, keep: bool) -> None:
        """Begin to copy the state of this step."""
        self._writing, kept = [], self.kept
        for files in self.files.values():
            file = file_to_write(files, kept, complete_step)
            assert file is not None
            self.memory.begin(file, step)
            file.kept = keep
            self._writing.append(file)

    def end(self) -> None:
        """The copies are whole."""
        for file in self._writing:
            file.done = file.begun
