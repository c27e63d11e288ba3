"""`decide` for nodes that join and leave, and the targets of each node: from facts alone, with a reason."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.config import ElasticSection
from elastic_pt.membership.contacts import whom_to_ask
from elastic_pt.membership.decision.admission import SPARE_SILENCE_SHARE, slots_per_member, spans
from elastic_pt.membership.decision.decide import Drain, Wait
from elastic_pt.membership.decision.status import (
    MESH_NODES_MAX,
    Limits,
    NodePhase,
    NodeStatus,
    Peer,
)
from elastic_pt.runlog.records import CauseKind
from tests.membership.world import (
    LIMITS,
    NOW_S,
    causes,
    changed,
    decision,
    failed,
    generation,
    is_broken,
    lives,
    member,
    nodes,
    peer,
    refusing,
    silent,
    status,
    waiting,
)

TIMEOUT_S = LIMITS.elastic.heartbeat_timeout_s


# ---- leaving -----------------------------------------------------------------------------------------


def test_leaving_member_is_drained_first() -> None:
    """If a member leaves, the proposer asks for a drain. When all have stopped, the others continue without it."""
    world = generation("a", "b", "c")
    going = {"b": peer(status("b", leaving=True)), "c": peer(status("c"))}
    assert decision(status("a"), going, of=world) == Drain("b leaves")
    stopped = {
        "b": peer(waiting("b", spent=1, leaving=True)),
        "c": peer(waiting("c", spent=1)),
    }
    proposal = decision(waiting("a", spent=1), stopped, of=world)
    assert nodes(proposal) == ["a", "c"]
    assert causes(proposal) == [(CauseKind.LEFT, "b")]


def test_leaving_leader_no_longer_leads() -> None:
    """The first member that stays asks for the drain and proposes. A single node that leaves drains itself."""
    world = generation("a", "b")
    a, b = status("a", leaving=True), status("b")
    assert decision(b, {"a": peer(a)}, of=world) == Drain("a leaves")
    assert decision(a, {"b": peer(b)}, of=world) == Wait("training")
    stopped = waiting("b", spent=1), waiting("a", spent=1, leaving=True)
    assert nodes(decision(stopped[0], {"a": peer(stopped[1])}, of=world)) == ["b"]
    waits = decision(stopped[1], {"b": peer(stopped[0])}, of=world)
    assert waits == Wait("b leads: a leaves", broken=True)
    assert decision(a, {}, of=generation("a")) == Drain("a leaves")


def test_newcomers_continue_when_all_members_leave() -> None:
    """If all members leave, the waiting nodes take the run over."""
    world, b = generation("a", "b"), peer(waiting("b", spent=1, leaving=True))
    me, c = waiting("a", spent=1, leaving=True), peer(waiting("c"))
    waits = decision(me, {"b": b, "c": c}, of=world, quiet_since_s=NOW_S)
    assert waits == Wait("c leads: a leaves; b leaves; c joins", broken=True)


def test_failure_of_a_leaving_member_is_a_cause() -> None:
    """If a member leaves and then fails, it is not in the next generation, and its failure is a cause."""
    b = peer(waiting("b", spent=1, leaving=True, failure=failed("b")))
    proposal = decision(status("a"), {"b": b}, of=generation("a", "b"))
    assert causes(proposal) == [(CauseKind.FAILED, "b"), (CauseKind.LEFT, "b")]


@pytest.mark.parametrize("gone", [refusing, silent])
def test_member_that_has_left_is_not_lost(gone: Callable[[NodeStatus], Peer]) -> None:
    """A member that closes its connections after a planned stop is not lost. With running workers it is lost."""
    world = generation("a", "b")
    left = gone(waiting("b", spent=1, leaving=True))
    assert not is_broken(status("a"), {"b": left}, of=world)
    proposal = decision(waiting("a", spent=1), {"b": left}, of=world)
    assert nodes(proposal) == ["a"]
    assert causes(proposal) == [(CauseKind.LEFT, "b")]
    torn = gone(status("b", leaving=True))
    assert is_broken(status("a"), {"b": torn}, of=world)
    assert (CauseKind.LOST, "b") in causes(decision(status("a"), {"b": torn}, of=world))


def test_a_newcomer_that_leaves_does_not_join() -> None:
    """A node that was asked to leave before it was a member causes no drain."""
    peers = {"b": peer(waiting("b", leaving=True))}
    assert decision(status("a"), peers, of=generation("a")) == Wait("training")
    assert decision(waiting("a", leaving=True), {}, of=None) == Wait("leaving")


# ---- newcomers ---------------------------------------------------------------------------------------


def test_newcomers_join_together_at_a_step_boundary() -> None:
    """The proposer asks for a drain when no more newcomers have appeared for the join window."""
    world, window_s = generation("a", "b"), LIMITS.elastic.join_window_s
    peers = {"b": peer(status("b")), "c": peer(waiting("c")), "d": peer(waiting("d"))}
    early = NOW_S - window_s + 0.01
    assert decision(status("a"), peers, of=world, newcomers_changed_s=early) == Wait("training")
    drain = decision(status("a"), peers, of=world, newcomers_changed_s=NOW_S - window_s)
    assert drain == Drain("c joins; d joins")
    full = changed(LIMITS, nodes_max=3)
    at_once = decision(status("a"), peers, of=world, limits=full, newcomers_changed_s=NOW_S)
    assert at_once == Drain("c joins"), "no other node could join"
    assert decision(status("b"), peers | {"a": peer(status("a"))}, of=world) == Wait("training")
    assert decision(status("a", NodePhase.SETTLING), peers, of=world) == Wait("training")


@pytest.mark.parametrize(
    ("newcomer", "facts"),
    [
        (peer(waiting("c", unreachable=lives("b"))), {}),
        (peer(waiting("c"), reached=False), {}),
        (Peer(waiting("c"), NOW_S, None, refused=False, reached=True), {}),
        (peer(waiting("c", fingerprint={"code": "other"})), {}),
        (peer(waiting("c")), {"barred": {"c": "3 failures"}}),
        (peer(waiting("c"), silent_s=SPARE_SILENCE_SHARE * TIMEOUT_S + 0.01), {}),
        (refusing(waiting("c")), {}),
        (peer(status("c")), {}),
        (peer(waiting("c", generation=0)), {}),
    ],
    ids=[
        "cannot reach a member",
        "not reached by me",
        "never answered",
        "other code",
        "kept out",
        "silent",
        "refused",
        "has workers",
        "does not know the generation",
    ],
)
def test_unfit_newcomer_does_not_join(newcomer: Peer, facts: dict[str, object]) -> None:
    """A newcomer must reach all members that stay, have the same fingerprint, wait, answer, and not be kept out."""
    world = generation("a", "b")
    peers = {"b": peer(status("b")), "c": newcomer}
    assert decision(status("a"), peers, of=world, **facts) == Wait("training")
    alone = {"c": newcomer} | {"b": peer(waiting("b", spent=1))}
    assert nodes(decision(waiting("a", spent=1), alone, of=world, **facts)) == ["a", "b"]
    fine = peer(waiting("c"), silent_s=SPARE_SILENCE_SHARE * TIMEOUT_S - 0.01)
    assert isinstance(decision(status("a"), peers | {"c": fine}, of=world), Drain)


def test_newcomer_need_not_reach_a_lost_member() -> None:
    """Only the members that stay count for a newcomer's links."""
    c = peer(waiting("c", unreachable=lives("b")))
    proposal = decision(status("a"), {"b": refusing(status("b")), "c": c}, of=generation("a", "b"))
    assert nodes(proposal) == ["a", "c"]


def test_a_newcomer_does_not_propose_while_a_member_answers() -> None:
    """A node outside the generation does not propose while a member answers, and its reason says why it waits."""
    world, new = generation("a", "b"), waiting("c")
    peers = {"a": refusing(status("a")), "b": peer(status("b"))}
    assert decision(new, peers, of=world) == Wait("asked b to be admitted")
    parked = waiting("c", unreachable=lives("a"))
    assert decision(parked, {"b": peer(status("b"))}, of=world) == Wait("parked: no link to a")
    assert decision(new, peers, of=world, barred={"c": "3 failures"}) == Wait(
        "kept out: 3 failures"
    )


@pytest.mark.parametrize(
    ("gone", "quiet_s"),
    [(silent, LIMITS.elastic.takeover_s), (refusing, LIMITS.elastic.takeover_s / 2)],
)
def test_new_nodes_take_over_when_all_members_are_gone(
    gone: Callable[[NodeStatus], Peer], quiet_s: float
) -> None:
    """Newcomers that reach no member form a generation if log and pulse do not change. The first by name proposes."""
    world = generation("a", "b")
    members = {name: gone(status(name)) for name in "ab"}
    c, d = waiting("c"), waiting("d")
    early, late = {"quiet_since_s": NOW_S - quiet_s + 0.01}, {"quiet_since_s": NOW_S - quiet_s}
    watching = Wait("no member answers: watching whether the run continues without this node")
    assert decision(c, members | {"d": peer(d)}, of=world, **early) == watching
    unseen = late | {"quiet_until_s": NOW_S - 0.01}
    assert decision(c, members | {"d": peer(d)}, of=world, **unseen) == watching
    proposal = decision(c, members | {"d": peer(d)}, of=world, **late)
    assert nodes(proposal) == ["c", "d"]
    assert proposal.reason == "resumed by new nodes"
    assert decision(d, members | {"c": peer(c)}, of=world, **late) == Wait("c leads")


def test_takeover_is_faster_only_if_every_member_refuses() -> None:
    """A newcomer waits half as long only if every member refuses: a silent member may still train."""
    peers = {"a": refusing(status("a")), "b": silent(status("b"))}
    facts = {"quiet_since_s": NOW_S - 0.75 * LIMITS.elastic.takeover_s}
    waits = decision(waiting("c"), peers, of=generation("a", "b"), **facts)
    assert waits.reason.startswith("no member answers")


# ---- the first generation ----------------------------------------------------------------------------


def test_a_cold_start_waits_for_the_join_window_unless_full() -> None:
    """The first generation waits until no newcomer has appeared for a while, or until there is no more room."""
    a, b = waiting("a"), peer(waiting("b"))
    young = {"newcomers_changed_s": NOW_S - 0.1}
    assert decision(a, {"b": b}, of=None, **young) == Wait("waiting for more nodes to arrive")
    full = changed(LIMITS, nodes_max=2)
    assert nodes(decision(a, {"b": b}, of=None, limits=full, **young)) == ["a", "b"]
    fed = changed(LIMITS, slots=1)
    assert nodes(decision(a, {"b": b}, of=None, limits=fed, **young)) == ["a"]
    proposal = decision(a, {"b": b}, of=None)
    assert (nodes(proposal), proposal.reason) == (["a", "b"], "started")


def test_members_of_the_first_generation_all_reach_each_other() -> None:
    """Of two candidates without a link one waits, if either of them reports it. If too few are left, all wait."""
    c = waiting("c")
    for b in (waiting("b", unreachable=lives("c")), waiting("b")):
        third = c if b.unreachable else waiting("c", unreachable=lives("b"))
        peers = {"b": peer(b), "c": peer(third)}
        assert nodes(decision(waiting("a"), peers, of=None)) == ["a", "b"]
    limits = changed(LIMITS, nodes_min=3)
    waits = decision(waiting("a"), peers, of=None, limits=limits)
    assert waits == Wait("waiting for nodes: 2 of at least 3", watching=True)


def test_first_generation_has_a_barred_node_only_if_needed() -> None:
    """A quarantine also holds after its generation, unless there would be too few nodes."""
    a, peers = waiting("a"), {"b": peer(waiting("b")), "c": peer(waiting("c"))}
    barred = {"b": "3 failures"}
    assert nodes(decision(a, peers, of=None, barred=barred)) == ["a", "c"]
    needed = changed(LIMITS, nodes_min=3)
    assert nodes(decision(a, peers, of=None, limits=needed, barred=barred)) == ["a", "b", "c"]


# ---- limits, shares, targets ------------------------------------------------------------------------


def test_in_a_small_fleet_each_node_asks_all_others() -> None:
    """Up to MESH_NODES_MAX nodes, each node asks all others, even if they do not answer."""
    members = [member(f"n{number:02}") for number in range(MESH_NODES_MAX)]
    peers = {members[1].incarnation: refusing(status("n01"))}
    assert whom_to_ask(members, "n031", peers, NOW_S, TIMEOUT_S) == [*members[:3], *members[4:]]


def test_in_a_large_fleet_all_ask_the_first_two_that_answer() -> None:
    """Nodes that refuse or are silent are skipped. Unknown nodes are tried."""
    members = [member(f"n{number:02}") for number in range(MESH_NODES_MAX + 1)]
    peers = {
        members[0].incarnation: refusing(status("n00")),
        members[2].incarnation: silent(status("n02")),
    }

    def asked(me: int) -> list[str]:
        life = members[me].incarnation
        return [each.node for each in whom_to_ask(members, life, peers, NOW_S, TIMEOUT_S)]

    assert asked(20) == ["n01", "n03"]
    assert asked(1) == ["n03", "n04"]
    # A whole rack may be gone: the more nodes are gone, the more of the next ones are asked at a time.
    for number in range(6):
        peers[members[number].incarnation] = refusing(status(f"n{number:02}"))
    assert asked(20) == [f"n{number:02}" for number in range(6, 12)]


def test_interval_and_timeout_grow_with_the_number_of_nodes() -> None:
    """With many nodes the interval grows, and the timeout is a multiple of it."""
    limits = Limits(ElasticSection(nodes_max=4096), slots=None)
    assert limits.interval_s(512) == pytest.approx(0.2)
    assert limits.interval_s(2048) == pytest.approx(0.8)
    assert limits.silence_s(1024) == 1.5
    assert limits.silence_s(2048) == pytest.approx(2.8)


@given(total=st.integers(1, 500), parts=st.integers(1, 64))
def test_spans_are_even_and_complete(total: int, parts: int) -> None:
    """Shares add up to the total and differ by at most one."""
    shares = spans(total, parts)
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@given(workers=st.lists(st.integers(1, 4), min_size=1, max_size=6), slots=st.integers(24, 64))
def test_slots_per_member_are_those_its_workers_compute(workers: list[int], slots: int) -> None:
    """A member's slots are those of its ranks: worker r of W computes slots r, r + W, ..."""
    members = [member(f"n{index}", count) for index, count in enumerate(workers)]
    world, first = sum(workers), 0
    for count, said in zip(workers, slots_per_member(members, slots), strict=True):
        assert said == sum(len(range(rank, slots, world)) for rank in range(first, first + count))
        first += count
