"""Which state in memory a new generation goes on from: a pure choice from what its members say that they hold.

A state counts if the rows of all workers that wrote it are held by members of the new generation. Of those the newest
step is taken, if it is at least that of the newest checkpoint in the bucket. Two steps are never mixed, nor the
snapshots that two generations took of one step.

Only the newest generation's snapshots count, and the state that it went on from itself. A node that comes back with
those of an older generation holds the past of another lineage.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from elastic_pt.membership.decision.status import Held, NodeStatus
from elastic_pt.runlog.records import Generation, InMemory, Member


def newest_in_memory(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> InMemory | None:
    """The newest state that `members` hold together, by what `statuses` (by incarnation) say; None if the bucket's is newer."""
    if generation is None:
        return None
    told = [statuses.get(each.incarnation) for each in members]
    unusable = {each for status in told if status is not None for each in status.unusable}
    holders: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    sizes: dict[tuple[int, int], int] = {}
    for index, status in enumerate(told):
        for held in () if status is None else status.held:
            state = held.generation, held.step
            if _is_of(generation, held) and state not in unusable and _fits(held):
                sizes[state] = held.world_size
                for rank in range(held.first_rank, held.end_rank):
                    holders[state].setdefault(rank, index)
    whole = [
        state
        for state, found in holders.items()
        if len(found) == sizes[state] and state[1] >= max(1, committed_step)
    ]
    if not whole:
        return None
    number, step = max(whole, key=lambda state: (state[1], state[0]))
    found = holders[number, step]
    return InMemory(number, step, tuple(found[rank] for rank in range(len(found))))


def _is_of(generation: Generation, held: Held) -> bool:
    """Whether this state belongs to the lineage of the newest generation."""
    if held.generation == generation.number:
        return True
    before = generation.memory
    return before is not None and (held.generation, held.step) == (before.generation, before.step)


def _fits(held: Held) -> bool:
    return 0 <= held.first_rank < held.end_rank <= held.world_size
