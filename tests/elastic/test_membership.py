"""Who trains is decided from facts alone, and always with a reason."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.elastic.membership import (
    Decision,
    Drain,
    Ended,
    Limits,
    NodeStatus,
    Peer,
    Phase,
    Propose,
    View,
    Wait,
    decide,
    slots_per_member,
    spans,
)
from elastic_pt.elastic.records import Generation, Member, Stop

NOW_S = 1000.0
LIMITS = Limits(nodes_min=1, nodes_max=8, slots=8, heartbeat_timeout_s=5.0, join_window_s=1.0)


def member(node: str, workers: int = 1) -> Member:
    """A node as it introduces itself."""
    return Member(node, f"{node}1", "127.0.0.1", 1, 1, workers)


def status(node: str, phase: Phase = Phase.RUNNING, **changes: object) -> NodeStatus:
    """What a healthy member says."""
    healthy = NodeStatus(member(node), phase, 1, 1, 0, "", "same")
    return dataclasses.replace(healthy, **changes)  # type: ignore[arg-type]


def peer(says: NodeStatus, *, silent_s: float = 0.1, refused: bool = False) -> Peer:
    """A peer heard a while ago."""
    return Peer(says, NOW_S - 100, NOW_S - silent_s, refused)


def generation(*nodes: str) -> Generation:
    """Generation 1 of one-worker nodes."""
    members = tuple(member(node) for node in nodes)
    return Generation(1, members, slots_per_member(members, 8), "127.0.0.1", 1, None, "started")


def decision(
    me: NodeStatus,
    peers: dict[str, Peer],
    *,
    of: Generation | None,
    limits: Limits = LIMITS,
    **view: object,
) -> Decision:
    """Decide as `me`."""
    facts = View(me, of, None, {f"{name}1": each for name, each in peers.items()})
    return decide(dataclasses.replace(facts, **view), limits, NOW_S)  # type: ignore[arg-type]


def nodes(proposal: Decision) -> list[str]:
    """Whom a proposal names."""
    assert isinstance(proposal, Propose), proposal
    return [each.node for each in proposal.members]


def test_a_healthy_world_goes_on() -> None:
    """While all members answer, nobody proposes anything."""
    world = generation("a", "b")
    assert decision(status("a"), {"b": peer(status("b"))}, of=world) == Wait("training")


@pytest.mark.parametrize("how", [{"silent_s": 5.1}, {"refused": True}])
def test_a_lost_member_is_left_behind(how: dict[str, float]) -> None:
    """A member that is silent beyond the timeout, or refuses connections, is not in the next generation."""
    world = generation("a", "b", "c")
    proposal = decision(
        status("a"), {"b": peer(status("b"), **how), "c": peer(status("c"))}, of=world
    )
    assert nodes(proposal) == ["a", "c"]
    assert proposal.reason == "lost b"


def test_the_first_live_member_leads() -> None:
    """Losing rank 0's node is nothing special: the next member proposes, the others wait and stop their workers."""
    world = generation("a", "b", "c")
    gone, b, c = peer(status("a"), refused=True), status("b"), status("c")
    assert nodes(decision(b, {"a": gone, "c": peer(c)}, of=world)) == ["b", "c"]
    waits = decision(c, {"a": gone, "b": peer(b)}, of=world)
    assert waits == Wait("b leads: lost a", broken=True)


def test_a_failed_worker_breaks_the_generation_with_its_cause() -> None:
    """A member that spent the generation with a failure makes all form the next one, and is in it."""
    world = generation("a", "b")
    failed = status("b", Phase.WAITING, spent=1, failure="worker 1 killed by SIGKILL")
    proposal = decision(status("a"), {"b": peer(failed)}, of=world)
    assert nodes(proposal) == ["a", "b"]
    assert proposal.reason == "b: worker 1 killed by SIGKILL"


def test_a_planned_stop_waits_for_everyone() -> None:
    """While one member still settles its checkpoint, those that are done wait; then the first proposes."""
    world = generation("a", "b")
    done = status("a", Phase.WAITING, spent=1)
    assert decision(done, {"b": peer(status("b", Phase.SETTLING))}, of=world) == Wait(
        "waiting for all members to stop"
    )
    assert nodes(decision(done, {"b": peer(status("b", Phase.WAITING, spent=1))}, of=world)) == [
        "a",
        "b",
    ]


def test_a_member_that_has_not_seen_its_generation_yet_is_not_failed() -> None:
    """Right after a generation is formed, members still say WAITING; that breaks nothing."""
    world = generation("a", "b")
    assert decision(
        status("a"), {"b": peer(status("b", Phase.WAITING, generation=0))}, of=world
    ) == Wait("training")


def test_newcomers_are_taken_in_together_and_at_a_step_boundary() -> None:
    """A newcomer makes the leader ask for a drain, once no further one has come for the join window."""
    world = generation("a", "b")
    peers = {"b": peer(status("b")), "c": peer(status("c", Phase.WAITING, generation=0))}
    early = decision(status("a"), peers, of=world, newcomers_changed_s=NOW_S - 0.5)
    assert early == Wait("training")
    assert decision(status("a"), peers, of=world, newcomers_changed_s=NOW_S - 1.5) == Drain(
        "c joins"
    )
    assert decision(status("b"), {"a": peer(status("a")), "c": peers["c"]}, of=world) == Wait(
        "training"
    )


@pytest.mark.parametrize(
    "limits", [dataclasses.replace(LIMITS, nodes_max=2), dataclasses.replace(LIMITS, slots=2)]
)
def test_no_more_nodes_than_bounds_and_slots_allow(limits: Limits) -> None:
    """A newcomer beyond nodes_max, or beyond what V slots can feed, stays a spare and disturbs nobody."""
    world = generation("a", "b")
    peers = {"b": peer(status("b")), "c": peer(status("c", Phase.WAITING))}
    assert decision(status("a"), peers, of=world, limits=limits) == Wait("training")


def test_a_spare_replaces_a_lost_member_at_once() -> None:
    """A waiting node is part of the generation that a loss calls for."""
    world = generation("a", "b")
    peers = {"b": peer(status("b"), refused=True), "c": peer(status("c", Phase.WAITING))}
    assert nodes(decision(status("a"), peers, of=world)) == ["a", "c"]


def test_nodes_of_another_run_or_code_never_join() -> None:
    """A node with another fingerprint is not taken in."""
    world = generation("a")
    stranger = status("c", Phase.WAITING, fingerprint="other")
    assert decision(status("a"), {"c": peer(stranger)}, of=world) == Wait("training")


def test_below_the_minimum_the_run_pauses() -> None:
    """With fewer nodes than nodes_min nothing is proposed, workers stop, and the reason says so."""
    limits = dataclasses.replace(LIMITS, nodes_min=2)
    world = generation("a", "b")
    waits = decision(status("a"), {"b": peer(status("b"), refused=True)}, of=world, limits=limits)
    assert isinstance(waits, Wait)
    assert waits.broken
    assert waits.reason == "paused: 1 of at least 2 nodes; lost b"


def test_a_newcomer_asks_while_a_member_lives() -> None:
    """A node outside the generation never proposes while any member answers."""
    world = generation("a", "b")
    new = status("c", Phase.WAITING)
    peers = {"a": peer(status("a"), refused=True), "b": peer(status("b"))}
    assert decision(new, peers, of=world) == Wait("asked b to be taken in")


def test_new_nodes_take_over_when_all_members_are_gone() -> None:
    """After losing every node, newcomers form the next generation among themselves; the first by name leads."""
    world = generation("a", "b")
    gone = {name: peer(status(name), refused=True) for name in "ab"}
    c, d = status("c", Phase.WAITING), status("d", Phase.WAITING)
    assert nodes(decision(c, gone | {"d": peer(d)}, of=world)) == ["c", "d"]
    assert decision(d, gone | {"c": peer(c)}, of=world) == Wait("c leads")


def test_a_cold_start_waits_for_the_join_window_unless_full() -> None:
    """The first generation waits until nobody new has come for a while, or until no more would be taken."""
    a, b = status("a", Phase.WAITING), peer(status("b", Phase.WAITING))
    young = {"newcomers_changed_s": NOW_S - 0.1}
    assert isinstance(decision(a, {"b": b}, of=None, **young), Wait)
    full = dataclasses.replace(LIMITS, nodes_max=2)
    assert nodes(decision(a, {"b": b}, of=None, limits=full, **young)) == ["a", "b"]
    fed = dataclasses.replace(LIMITS, slots=1)
    assert nodes(decision(a, {"b": b}, of=None, limits=fed, **young)) == ["a"]


def test_the_end_of_the_run_ends_everything() -> None:
    """Once the log says STOP, every node's decision is to end, whatever else it sees."""
    assert decision(status("a"), {}, of=generation("a", "b"), stop=Stop("completed", 9)) == Ended(
        "completed"
    )


@given(total=st.integers(1, 500), parts=st.integers(1, 64))
def test_spans_are_even_and_complete(total: int, parts: int) -> None:
    """Shares add up to the total and differ by at most one."""
    shares = spans(total, parts)
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@given(workers=st.lists(st.integers(1, 4), min_size=1, max_size=6), slots=st.integers(24, 64))
def test_slots_per_member_are_those_its_workers_compute(workers: list[int], slots: int) -> None:
    """A member's slots are those of its ranks, when worker r of W computes slots r, r + W, ..."""
    members = [member(f"n{index}", count) for index, count in enumerate(workers)]
    world, first = sum(workers), 0
    for count, said in zip(workers, slots_per_member(members, slots), strict=True):
        assert said == sum(len(range(rank, slots, world)) for rank in range(first, first + count))
        first += count
