"""Bugs planted in what is about states in memory: snapshots, mirrors, the choice of a state, restore and late commits."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from elastic_pt.agent.holdings import Holdings
from elastic_pt.checkpoint import in_flight, snapshot
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.membership import appender
from elastic_pt.membership.decision import resume
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.membership.node import Node
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation, InMemory, Member
from tests.sim import training
from tests.sim.buffers import BufferFile, Buffers, Complete
from tests.sim.memory import Memory, Mirror, Next
from tests.sim.mutation import Mutation
from tests.sim.training import Workers

_EVERY_STEP: Final = 10**9


def _nothing_awaited(members: list[Workers]) -> Complete | None:
    complete = _complete_everywhere(members)
    return None if complete is None else Complete(_EVERY_STEP, complete.mirrored)


_complete_everywhere = training.complete_everywhere


def _kept_not_needed(steps: Sequence[int], _: Collection[int], complete_step: int) -> int | None:
    return _buffer_to_write(steps, (), complete_step)


_buffer_to_write = snapshot.buffer_to_write


def _newest_not_needed(steps: Sequence[int], kept: Collection[int], _: int) -> int | None:
    free = [number for number, step in enumerate(steps) if step == 0 or step not in kept]
    return max(free, key=lambda number: (not steps[number], steps[number]), default=None)


def _report_before_copy(self: Mirror, wanted: Next) -> None:
    _copy(self, wanted)
    self._has = dict.fromkeys(self._has, wanted.step)
    self._again(0.0)


_copy = Mirror._copy


def _count_without_room(self: Mirror, number: int, found: Next | None) -> None:
    if self._full and found is not None and number == self._asking:
        for rank in self._has:
            name = Buffer(self.generation, rank, 0)
            file = BufferFile(name, begun=found.step, done=found.step)
            self.memory.copied(file)
            file.done = 0
    _answered(self, number, found)


_answered = Mirror._answered


def _own_alone(self: Holdings) -> int | None:
    acknowledged, self._acknowledged = self._acknowledged, {}
    step = _take_complete(self)
    self._acknowledged = acknowledged
    return step


_take_complete = Holdings.take_complete


def _drop_at_first_snapshot(
    self: Memory, buffers: Buffers, step: int, complete: Complete, kept: bool
) -> None:
    _written(self, buffers, step, Complete(complete.step or 1, True), kept)


_written = Memory.written


def _not_whole(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> InMemory | None:
    """Also a state of which only some rows are held."""
    everywhere = {
        incarnation: dataclasses.replace(
            status,
            held=tuple(
                dataclasses.replace(each, first_rank=0, end_rank=each.world_size)
                for each in status.held
            ),
        )
        for incarnation, status in statuses.items()
    }
    return resume.newest_in_memory(generation, members, everywhere, committed_step)


def _steps_mixed(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> InMemory | None:
    """All snapshots of a generation count as its newest one."""
    number = 0 if generation is None else generation.number
    own = [
        each for status in statuses.values() for each in status.held if each.generation == number
    ]
    newest = max((each.step for each in own), default=0)
    renamed = {
        incarnation: dataclasses.replace(
            status,
            held=tuple(
                dataclasses.replace(each, step=newest) if each in own else each
                for each in status.held
            ),
        )
        for incarnation, status in statuses.items()
    }
    return resume.newest_in_memory(generation, members, renamed, committed_step)


def _steps_alone(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> InMemory | None:
    """Two generations' snapshots of one step count as one state."""
    number = 0 if generation is None else generation.number
    renamed = {
        incarnation: dataclasses.replace(
            status, held=tuple(dataclasses.replace(each, generation=number) for each in status.held)
        )
        for incarnation, status in statuses.items()
    }
    return resume.newest_in_memory(generation, members, renamed, committed_step)


def _over_by_commits_alone(view: RunView, generation: int, step: int) -> str:
    """Later generations that resumed from before the step are ignored."""
    newest = 0 if view.commit is None else view.commit.newest.step
    return f"step {newest} is committed" if newest >= step else ""


MEMORY_MUTATIONS: Final = (
    Mutation(
        "mirrors not awaited",
        "workers overwrite a buffer before the newer state is complete on all nodes and their mirrors",
        training,
        "complete_everywhere",
        _nothing_awaited,
        1,
    ),
    Mutation(
        "own copy counts as complete",
        "a node reports a state as complete before its mirrors have it",
        Holdings,
        "take_complete",
        _own_alone,
        0,
    ),
    Mutation(
        "checkpoint overtakes mirrors",
        "a checkpoint is written before the mirrors have the newest snapshot, so that they skip it",
        training,
        "may_checkpoint",
        lambda world, complete, *, last: True,
        269,
    ),
    Mutation(
        "copy acknowledged too early",
        "a mirror reports a step before it has copied it",
        Mirror,
        "_copy",
        _report_before_copy,
        0,
    ),
    Mutation(
        "mirror without room counts",
        "a mirror without room says that it holds the copy",
        Mirror,
        "_answered",
        _count_without_room,
        0,
    ),
    Mutation(
        "checkpoint's buffer overwritten",
        "a buffer is overwritten while its checkpoint is being uploaded",
        snapshot,
        "buffer_to_write",
        _kept_not_needed,
        8,
    ),
    Mutation(
        "newest buffer overwritten",
        "a state is written over the newest one, in place of the oldest",
        snapshot,
        "buffer_to_write",
        _newest_not_needed,
        1,
    ),
    Mutation(
        "resumed state dropped early",
        "a node removes the state that it resumed from at its first snapshot",
        Memory,
        "written",
        _drop_at_first_snapshot,
        2,
    ),
    Mutation(
        "rows of two steps mixed",
        "a generation resumes from each worker's newest rows, whichever steps they are of",
        appender,
        "newest_in_memory",
        _steps_mixed,
        0,
    ),
    Mutation(
        "state that is not whole",
        "a generation resumes from a state of which its members hold only some rows",
        appender,
        "newest_in_memory",
        _not_whole,
        0,
    ),
    Mutation(
        "snapshots of two generations mixed",
        "snapshots of the same step count as one state, whichever generation wrote them",
        appender,
        "newest_in_memory",
        _steps_alone,
        2,
    ),
    Mutation(
        "state of another lineage",
        "a generation resumes from any earlier generation's state",
        resume,
        "_is_of",
        lambda generation, held: True,
        30,
    ),
    Mutation(
        "planned change does not wait",
        "members go on after a drain before they hold its state in memory, and before it is committed",
        Node,
        "await_settled",
        lambda self, generation, step, *_: Settled("memory", f"step {step}"),
        0,
    ),
    Mutation(
        "late commit of another lineage",
        "a checkpoint is committed after its generation, although training has gone on from before its step",
        in_flight,
        "over",
        _over_by_commits_alone,
        29,
    ),
)
