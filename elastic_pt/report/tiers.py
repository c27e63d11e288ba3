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
