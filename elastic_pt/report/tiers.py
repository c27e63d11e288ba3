"""What would be lost now: the newest state of a run in each tier, from what its nodes say that they hold. Pure.

memory   held by the members together
peer     held by the members without any one of them: it survives the loss of a node
bucket   committed: it survives the loss of all nodes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_pt.membership.decision.resume import newest_in_memory
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.records import Generation, InMemory, Member


@dataclass(frozen=True)
class Tier:
    """The newest state that one tier holds."""

    name: str
    step: int
    age_s: float
    """Seconds since it was complete, by the clocks of the nodes that hold it; of a commit, by this machine's clock."""


@dataclass(frozen=True)
class AtRisk:
    """Steps that would be done again if this was lost now."""

    node: int
    """The node of rank 0."""
    any_node: int
    """The node whose loss would cost most."""
    all: int
    """All nodes."""


def tiers(
    generation: Generation | None, answers: Mapping[str, NodeStatus], bucket: Tier | None
) -> tuple[Tier, ...]:
    """Every tier that holds a state, fastest first. `answers` are those of the members, by incarnation."""
    members = () if generation is None else generation.members
    memory = newest_in_memory(generation, members, answers, 0)
    without = [newest_in_memory(generation, each, answers, 0) for each in _without_one(members)]
    survives = min(without, key=lambda each: 0 if each is None else each.step, default=None)
    found = [
        Tier(name, state.step, _age_s(state, answers))
        for name, state in (("memory", memory), ("peer", survives))
        if state is not None
    ]
    return (*found, *([] if bucket is None else [bucket]))


def at_risk(
    generation: Generation | None,
    answers: Mapping[str, NodeStatus],
    step: int,
    committed_step: int,
) -> AtRisk:
    """Steps that are done, but not in a state that would be left."""
    members = () if generation is None else generation.members
    left = []
    for others in _without_one(members):
        state = newest_in_memory(generation, others, answers, committed_step)
        left.append(committed_step if state is None else state.step)
    lost = [max(0, step - each) for each in left] or [max(0, step - committed_step)]
    return AtRisk(lost[0], max(lost), max(0, step - committed_step))


def _without_one(members: Sequence[Member]) -> list[list[Member]]:
    return [[each for each in members if each is not lost] for lost in members]


def _age_s(state: InMemory, answers: Mapping[str, NodeStatus]) -> float:
    ages = [
        held.age_s
        for answer in answers.values()
        for held in answer.held
        if (held.generation, held.step) == (state.generation, state.step)
    ]
    return round(max(ages, default=0.0), 3)
