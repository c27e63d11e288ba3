"""The state in memory from which a new generation resumes: a pure choice from the reports of its members.

A state counts if members of the new generation hold the rows of all workers that wrote it, in copies that no member
found unusable. The newest such step is taken, if it is not older than the newest checkpoint in the bucket. Rows of two
steps are never mixed, and neither are the snapshots of one step from two generations.

Only two kinds of states count: the newest generation's snapshots, and the state from which it resumed. Snapshots of an
older generation may belong to another lineage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    copies = _copies(generation, members, statuses)
    newest = _newest_whole(copies, committed_step)
    if newest is None:
        return None
    found = copies[newest]
    return InMemory(
        newest.generation,
        newest.step,
        sources=tuple(each.usable[0] for each in found),
        others=tuple(tuple(each.usable[1:]) for each in found),
    )


def newest_without_each(
    generation: Generation,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> list[int]:
    """For each of `members`: the newest step that the others hold together, or `committed_step` if the bucket's is newer.

    As `newest_in_memory` of the others, in one pass. A copy that any of `members` found unusable counts for none of them.
    """
    whole = []
    for state, found in _copies(generation, members, statuses).items():
        if state.step >= max(1, committed_step) and all(each.usable for each in found):
            # They are in the order of `members`: the first is the last if there is only one.
            holders = [each.usable for each in found]
            whole.append((state.step, {each[0] for each in holders if each[0] == each[-1]}))
    return [
        max((step for step, needed in whole if index not in needed), default=committed_step)
        for index in range(len(members))
    ]


def why_not_memory(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> str:
    """Why `newest_in_memory` chooses no state, in words; empty if it does, and before the first generation."""
    if generation is None:
        return ""
    copies = _copies(generation, members, statuses)
    if _newest_whole(copies, committed_step) is not None:
        return ""
    if not copies:
        return f"no member holds a state of generation {generation.number}"
    newest = max(copies, key=lambda state: (state.step, state.generation))
    number, step = newest
    if step < max(1, committed_step):
        return f"the bucket has step {committed_step}, memory only step {step}"
    missing = [rank for rank, each in enumerate(copies[newest]) if not each.usable]
    rows = f"rows of worker {missing[0]} of generation {number} at step {step}"
    more = f" (and of {len(missing) - 1} more)" if len(missing) > 1 else ""
    if copies[newest][missing[0]].bad:
        return f"all copies of the {rows} are unusable{more}"
    return f"no member holds the {rows}{more}"


def _newest_whole(copies: Mapping[State, Sequence["_Copies"]], committed_step: int) -> State | None:
    """The newest state of which each row has a usable copy, if the bucket has no newer one."""
    whole = [
        state
        for state, found in copies.items()
        if state.step >= max(1, committed_step) and all(each.usable for each in found)
    ]
    return max(whole, key=lambda state: (state.step, state.generation), default=None)


@dataclass(slots=True)
class _Copies:
    """The members that hold the rows of one worker."""

    usable: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)


def _copies(
    generation: Generation, members: Sequence[Member], statuses: Mapping[str, NodeStatus]
) -> dict[State, list[_Copies]]:
    """The copies of each state that counts, by the rank of the worker that wrote the rows."""
    told = [statuses.get(each.incarnation) for each in members]
    unusable = {each for status in told if status is not None for each in status.unusable}
    copies: dict[State, list[_Copies]] = {}
    for index, status in enumerate(told):
        for held in () if status is None else status.held:
            state = State(held.generation, held.step)
            if not _is_of(generation, held) or not _fits(held):
                continue
            if state not in copies:
                copies[state] = [_Copies() for _ in range(held.world_size)]
            found = copies[state]
            if held.world_size != len(found):
                continue
            if not unusable:
                # Most often. The loop below would take milliseconds of each scrape.
                for each in found[held.first_rank : held.end_rank]:
                    each.usable.append(index)
                continue
            misfit = Unusable(*state, -1, "") in unusable
            for rank in range(held.first_rank, held.end_rank):
                bad = misfit or Unusable(*state, rank, members[index].incarnation) in unusable
                (found[rank].bad if bad else found[rank].usable).append(index)
    return copies


def _is_of(generation: Generation, held: Held) -> bool:
    """Whether this state belongs to the lineage of the newest generation, and has the workers that wrote it."""
    if held.generation == generation.number:
        return held.world_size == generation.world_size
    before = generation.memory
    return (
        before is not None
        and (held.generation, held.step) == (before.generation, before.step)
        and held.world_size == len(before.sources)
    )


def _fits(held: Held) -> bool:
    return 0 <= held.first_rank < held.end_rank <= held.world_size
