"""Whether a generation that stopped as planned may end: nothing is lost with the members that go (pure).

    a commit of its last step                        ─┐
    each row of that step held by members that stay  ─┴─► Settled

Each member waits for one of the two, so that no planned change waits for an upload. A member that leaves uses the same
rule. What it learns later may still make it `needed`: it then takes part in one more generation, and leaves from that.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from elastic_pt.membership.decision.resume import newest_in_memory
from elastic_pt.membership.decision.status import MESH_NODES_MAX, NodeStatus
from elastic_pt.runlog.records import Checkpoint, Generation, Member, Request, Verb


@dataclass(frozen=True)
class Settled:
    """Where the last state of a generation is safe, and why."""

    tier: str
    """`memory` or `bucket`; empty while it is in neither."""
    reason: str

    def __bool__(self) -> bool:
        return bool(self.tier)


def settled(
    generation: Generation,
    step: int,
    statuses: Mapping[str, NodeStatus],
    checkpoints: Sequence[Checkpoint],
    requests: Sequence[Request],
    gone: Mapping[str, NodeStatus] = MappingProxyType({}),
) -> Settled:
    """Where the state of `step`, the last one of `generation`, is safe.

    `statuses` has the newest status of each member that is not gone, by incarnation, and `gone` the last one of each
    other member. A request to pause or to stop promises a commit, so memory does not count then. It does if another
    member has ended the generation before it knew of the request: its share may be in no checkpoint. The next generation
    makes the commit (`decide`).
    """
    # The state from which this generation resumed may have been committed just now. A newer step of an earlier
    # generation belongs to steps that were given up, such as a checkpoint that is quarantined.
    if any(
        each.step >= step
        and (each.generation == generation.number or each.step <= generation.resume_step)
        for each in checkpoints
    ):
        return Settled("bucket", f"step {step} is committed")
    ended = _ended(generation, {**gone, **statuses})
    promised = next((each for each in requests if each.verb in (Verb.PAUSE, Verb.STOP)), None)
    if promised is not None and not ended:
        return Settled("", f"step {step} is not committed; {promised}")
    if len(generation.members) > MESH_NODES_MAX and ended:
        # In a large fleet a member knows the leaders only. They know all members.
        return Settled("memory", f"a leader has seen that step {step} is settled")
    told = [(each, statuses.get(each.incarnation)) for each in generation.members]
    stay = [each for each, said in told if said is not None and stays(said)]
    if not stay:
        return Settled("", f"step {step} is not committed, and no member stays")
    missing = set(range(generation.world_size))
    for member in stay:
        for held in statuses[member.incarnation].held:
            if (held.generation, held.step) == (generation.number, step):
                missing -= set(range(held.first_rank, held.end_rank))
    if missing:
        ranks = ", ".join(map(str, sorted(missing)))
        return Settled("", f"step {step} is not committed; not held by members that stay: {ranks}")
    return Settled("memory", f"{', '.join(each.node for each in stay)} hold step {step}")


def needed(
    generation: Generation | None,
    stay: Sequence[Member],
    leaving: Collection[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> tuple[Member, ...]:
    """The members that want to leave, but without which a newer state than the others have would be lost.

    Empty if no member stays: nobody would resume from memory.
    """
    if not stay or not leaving:
        return ()
    everyone = [*stay, *leaving]
    newest = newest_in_memory(generation, everyone, statuses, committed_step)
    if newest is None or newest.step <= committed_step:
        return ()
    without = newest_in_memory(generation, stay, statuses, committed_step)
    if without is not None and without.step >= newest.step:
        return ()
    sources = {everyone[index] for index in newest.sources}
    return tuple(each for each in leaving if each in sources)


def is_ahead(
    generation: Generation | None,
    members: Sequence[Member],
    statuses: Mapping[str, NodeStatus],
    committed_step: int,
) -> bool:
    """Whether members hold a newer state in memory than the bucket has."""
    newest = newest_in_memory(generation, members, statuses, committed_step)
    return newest is not None and newest.step > committed_step


def stays(status: NodeStatus) -> bool:
    """Whether a member with this status will be in the next generation."""
    return not status.leaving and not status.resting


def _ended(generation: Generation, statuses: Mapping[str, NodeStatus]) -> bool:
    """Whether another member has ended this generation in good order.

    If it found the generation broken, its workers may have ended without a failure of their own: nothing is settled.
    """
    return any(
        status.spent == generation.number > status.broken and status.failure is None
        for incarnation, status in statuses.items()
        if generation.rank_of(incarnation) is not None
    )
