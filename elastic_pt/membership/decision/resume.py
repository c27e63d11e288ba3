"""The state in memory from which a new generation resumes: a pure choice from the reports of its members.

A state counts if members of the new generation hold the rows of all workers that wrote it, in copies that no member
found unusable. The newest such step is taken, if it is not older than the newest checkpoint in the bucket. Rows of two
steps are never mixed, and neither are the snapshots of one step from two generations.

Only two kinds of states count: the newest generation's snapshots, and the state from which it resumed. Snapshots of an
older generation may belong to another lineage.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from elastic_pt.membership.decision.status import Held, NodeStatus, Unusable
from elastic_pt.runlog.records import Generation, InMemory, Member
from elastic_pt.runlog.state import State


def newest_in_memory(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> InMemory | None:
    """The newest state that `members` hold together, by their `statuses` (by incarnation); None if the bucket's is newer."""
    if generation is None:
        return None
    told = [statuses.get(each.incarnation) for each in members]
    unusable = {each for status in told if status is not None for each in status.unusable}
    holders: dict[State, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    sizes: dict[State, int] = {}
    for index, status in enumerate(told):
        for held in () if status is None else status.held:
            state = State(held.generation, held.step)
            if not _is_of(generation, held) or not _fits(held):
                continue
            if Unusable(*state, -1, "") in unusable:
                continue
            sizes[state] = held.world_size
            for rank in range(held.first_rank, held.end_rank):
                if Unusable(*state, rank, members[index].incarnation) not in unusable:
                    holders[state][rank].append(index)
    whole = [
        state
        for state, found in holders.items()
        if len(found) == sizes[state] and state.step >= max(1, committed_step)
    ]
    if not whole:
        return None
    newest = max(whole, key=lambda state: (state.step, state.generation))
    found = holders[newest]
    ranks = range(len(found))
    return InMemory(
        newest.generation,
        newest.step,
        sources=tuple(found[rank][0] for rank in ranks),
        others=tuple(tuple(found[rank][1:]) for rank in ranks),
    )


def _is_of(generation: Generation, held: Held) -> bool:
    """Whether this state belongs to the lineage of the newest generation."""
    if held.generation == generation.number:
        return True
    before = generation.memory
    return before is not None and (held.generation, held.step) == (before.generation, before.step)


def _fits(held: Held) -> bool:
    return 0 <= held.first_rank < held.end_rank <= held.world_size
