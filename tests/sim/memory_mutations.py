"""Bugs planted in what is about states in memory: snapshots, mirrors, the choice of a state, restore and late commits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from elastic_pt.membership import appender
from elastic_pt.membership.decision import resume
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation, InMemory, Member
from tests.sim import agent, memory, training
from tests.sim.agent import AgentProcess
from tests.sim.memory import BufferFile, Buffers, Memory, Mirror
from tests.sim.mutation import Mutation
from tests.sim.training import Workers

_EVERY_STEP: Final = 10**9


def _nothing_awaited(members: list[Workers]) -> int | None:
    complete = _complete_everywhere(members)
    return None if complete is None else _EVERY_STEP


_complete_everywhere = training.complete_everywhere


def _any_buffer(files: list[BufferFile], before_step: int) -> BufferFile | None:
    free = [each for each in files if each.begun < max(1, before_step)]
    return min(free, key=lambda each: each.begun, default=None)


def _report_before_copy(self: Mirror, step: int) -> None:
    _copy(self, step)
    self._has = dict.fromkeys(self._has, step)
    self._again(0.0)


_copy = Mirror._copy


def _count_without_room(self: Mirror, number: int, step: int | None) -> None:
    if self._full and step is not None and number == self._asking:
        for rank in self._has:
            file = BufferFile(self.generation, rank, begun=step)
            self.memory.kept.setdefault((self.generation, step), {})[rank] = file
    _answered(self, number, step)


_answered = Mirror._answered


def _own_alone(self: Memory) -> None:
    acknowledged, self.acknowledged = self.acknowledged, {}
    _look(self)
    self.acknowledged = acknowledged


_look = Memory._look


def _find_newest(self: memory._Restore, held: Memory, rank: int) -> BufferFile | None:
    steps = [
        step
        for (generation, step), files in held.kept.items()
        if rank in files and generation == self._wanted.generation
    ]
    return held.find(self._wanted.generation, max(steps, default=0), rank)


def _drop_at_first_snapshot(self: Memory, buffers: Buffers, step: int, complete_step: int) -> None:
    _written(self, buffers, step, complete_step or 1)


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


def _newer_alone(view: RunView, state: tuple[int, int]) -> bool:
    return view.commit is None or state[1] > view.commit.newest.step


MEMORY_MUTATIONS: Final = (
    Mutation(
        "mirrors not awaited",
        "workers overwrite a buffer before the newer state is complete on all nodes and their mirrors",
        training,
        "complete_everywhere",
        _nothing_awaited,
        0,
    ),
    Mutation(
        "own copy counts as complete",
        "a node reports a state as complete before its mirrors have it",
        Memory,
        "_look",
        _own_alone,
        0,
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
        memory,
        "next_buffer",
        _any_buffer,
        0,
    ),
    Mutation(
        "resumed state dropped early",
        "a node removes the state that it resumed from at its first snapshot",
        Memory,
        "written",
        _drop_at_first_snapshot,
        0,
    ),
    Mutation(
        "restore mixes two steps",
        "a node gives the newest rows that it has in place of those of the step that is asked for",
        memory._Restore,
        "_find",
        _find_newest,
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
        0,
    ),
    Mutation(
        "state of another lineage",
        "a generation resumes from any earlier generation's state",
        resume,
        "_is_of",
        lambda generation, held: True,
        0,
    ),
    Mutation(
        "planned change does not wait",
        "members go on after a drain before they hold its state in memory, and before it is committed",
        AgentProcess,
        "_is_in_memory",
        lambda self, generation, step: True,
        0,
    ),
    Mutation(
        "late commit of another lineage",
        "a checkpoint is committed after its generation, although training has gone on from before its step",
        agent,
        "may_commit",
        _newer_alone,
        0,
    ),
)
