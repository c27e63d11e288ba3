"""`decide` as a member: from facts alone, and always with a reason."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.membership.decision.assessment import LINK_FRESH_SHARE, LINK_GRACE_SHARE
from elastic_pt.membership.decision.decide import Drain, Ended, Halt, Propose, Wait, park
from elastic_pt.membership.decision.status import MESH_NODES_MAX, NodePhase, Peer
from elastic_pt.runlog.records import CauseKind, Generation, Stop
from tests.membership.world import (
    LIMITS,
    NOTICED_S,
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


# ---- members -----------------------------------------------------------------------------------------


def test_members_wait_while_all_answer() -> None:
    """While all members answer, no node proposes anything."""
    world = generation("a", "b")
    assert decision(status("a"), {"b": peer(status("b"))}, of=world) == Wait("training")
    assert not is_broken(status("a"), {"b": peer(status("b"), silent_s=TIMEOUT_S)}, of=world)


@pytest.mark.parametrize(
    ("gone", "detail", "detect_s"),
    [
        (peer(status("b"), silent_s=TIMEOUT_S + 0.1), "silent for 1.6 s", 1.6),
        (peer(status("b"), silent_s=0.7, refused=True), "its address refuses connections", 0.2),
        (Peer(None, NOW_S - TIMEOUT_S - 0.1, None, False), "silent for 0.0 s", 0.0),
        (
            refusing(status("b", leaving=True, leave_reason="aws stop, 0 s ahead")),
            "its address refuses connections (it was to leave: aws stop, 0 s ahead)",
            0.0,
        ),
    ],
    ids=["silent", "refused", "never heard", "noticed"],
)
def test_a_lost_member_is_not_in_the_next_generation(
    gone: Peer, detail: str, detect_s: float
) -> None:
    """A member that is silent for longer than the timeout, or refuses connections, is not in the next generation."""
    c = peer(status("c", unreachable=lives("b")))
    proposal = decision(status("a"), {"b": gone, "c": c}, of=generation("a", "b", "c"))
    assert nodes(proposal) == ["a", "c"]
    assert isinstance(proposal, Propose)
    assert proposal.reason == "lost b"
    (cause,) = proposal.causes
    assert (cause.kind, cause.node, cause.detail) == (CauseKind.LOST, "b", detail)
    assert cause.detect_s == pytest.approx(detect_s)


def test_silence_is_counted_from_the_first_question() -> None:
    """Old messages from before this node started to ask do not make a peer lost."""
    again = Peer(status("b"), NOW_S - TIMEOUT_S + 0.1, NOW_S - 100, refused=False)
    assert not is_broken(status("a"), {"b": again}, of=generation("a", "b"))


def test_the_first_live_member_leads() -> None:
    """The loss of rank 0 is not a special case: the next member proposes, the others wait and end their workers."""
    world = generation("a", "b", "c")
    gone, b, c = refusing(status("a")), status("b"), status("c")
    assert nodes(decision(b, {"a": gone, "c": peer(c)}, of=world)) == ["b", "c"]
    waits = decision(c, {"a": gone, "b": peer(b)}, of=world)
    assert waits == Wait("b leads: lost a", broken=True)


def test_follower_proposes_after_leader_timeout() -> None:
    """If the proposer changes nothing for long, the next node in order proposes, then the one after it."""
    world = generation("a", "b", "c")
    peers = {node: peer(status(node, broken=1)) for node in "abc"}
    for me, takeovers in (("b", 2), ("c", 4)):
        others = {node: each for node, each in peers.items() if node != me}
        for moved in ("quiet_since_s", "broken_since_s"):
            still_s = NOW_S - takeovers * LIMITS.elastic.takeover_s
            facts = {"quiet_since_s": 1.0, "broken_since_s": 1.0} | {moved: still_s + 0.01}
            waits = decision(status(me, broken=1), others, of=world, **facts)
            assert waits.reason.startswith("a leads"), (me, moved)
            assert nodes(
                decision(status(me, broken=1), others, of=world, **facts | {moved: still_s})
            ) == ["a", "b", "c"]


def test_two_sides_of_a_split_network_propose_in_turn() -> None:
    """The smaller side's second node proposes after its first node and after the larger side's second node."""
    world, peers = side("ab", "cde")
    peers = peers | {"a": peer(status("a", unreachable=lives(*"cde")))}
    del peers["b"]
    me, still_s = status("b", unreachable=lives(*"cde")), NOW_S - 3 * LIMITS.elastic.takeover_s
    facts = {"quiet_since_s": 1.0, "broken_since_s": still_s + 0.01}
    assert decision(me, peers, of=world, **facts).reason.startswith("a leads")
    facts = {"quiet_since_s": 1.0, "broken_since_s": still_s}
    assert nodes(decision(me, peers, of=world, **facts)) == ["a", "b"]


def test_parked_member_never_proposes() -> None:
    """A parked member waits for the others without a limit. It must not propose their next generation."""
    world = generation("a", "b", "c")
    peers = {"a": peer(status("a")), "b": peer(status("b", unreachable=lives("c")))}
    facts = {"quiet_since_s": 1.0, "broken_since_s": 1.0}
    waits = decision(status("c"), peers, of=world, **facts)
    assert waits == Wait("a leads: c parked: no link to b", broken=True)


def test_a_failed_worker_breaks_the_generation_with_its_cause() -> None:
    """If a member spent the generation with a failure, all form the next one, with this member."""
    cause = failed("b", "worker 1: ValueError: bad", step=7, signature="ValueError@loop.py:9")
    b = waiting("b", spent=1, failure=cause)
    proposal = decision(status("a"), {"b": peer(b)}, of=generation("a", "b"))
    assert nodes(proposal) == ["a", "b"]
    assert isinstance(proposal, Propose)
    assert proposal.reason == "b: worker 1: ValueError: bad"
    assert proposal.causes == (cause,)


def test_a_failure_in_an_older_generation_breaks_nothing() -> None:
    """A member's status about an older generation does not affect the one that trains."""
    b = status("b", spent=1, failure=failed("b"))
    world = dataclasses.replace(generation("a", "b"), number=2)
    assert decision(status("a"), {"b": peer(b)}, of=world) == Wait("training")


def test_a_planned_stop_waits_for_all_members() -> None:
    """While one member still settles its checkpoint, the others wait. Then the first member proposes at once."""
    world, done = generation("a", "b"), waiting("a", spent=1)
    assert decision(done, {"b": peer(status("b", NodePhase.SETTLING))}, of=world) == Wait(
        "training"
    )
    assert decision(status("a"), {"b": peer(waiting("b", spent=1))}, of=world) == Wait(
        "waiting for all members to stop"
    )
    both = decision(done, {"b": peer(waiting("b", spent=1), silent_s=1.0)}, of=world)
    assert nodes(both) == ["a", "b"]
    assert both.reason == "resumed"


def test_a_member_that_has_not_seen_its_generation_yet_is_not_failed() -> None:
    """Just after a generation starts, members still report WAITING. That does not break it."""
    world = generation("a", "b")
    assert decision(status("a"), {"b": peer(waiting("b", generation=0))}, of=world) == Wait(
        "training"
    )


def test_silent_member_is_reported_as_silent_even_if_it_has_not_read_the_log() -> None:
    """The cause should lead the operator to a dead machine, not to a bucket that one node cannot reach."""
    world, read_s = generation("a", "b"), NOW_S - LIMITS.elastic.takeover_s + 0.5
    peers = {"b": silent(waiting("b", generation=0))}
    proposal = decision(status("a"), peers, of=world, generation_since_s=read_s)
    assert isinstance(proposal, Propose)
    assert proposal.causes[0].detail.startswith("silent for")


def test_member_that_does_not_read_the_log_is_lost() -> None:
    """A member that answers, but has not read its generation's record takeover_s after this node did, cannot train."""
    world, read_s = generation("a", "b"), NOW_S - LIMITS.elastic.takeover_s
    b = waiting("b", generation=0)
    for heard_s, since_s in ((NOW_S - 0.1, read_s), (NOW_S - 0.6, read_s - 0.5)):
        peers = {"b": peer(b, silent_s=NOW_S - heard_s)}
        young = decision(status("a"), peers, of=world, generation_since_s=since_s)
        assert young == Wait("training")
    peers = {"b": peer(b)}
    proposal = decision(status("a"), peers, of=world, generation_since_s=read_s - 0.2)
    assert nodes(proposal) == ["a"]
    assert isinstance(proposal, Propose)
    (cause,) = proposal.causes
    assert (cause.kind, cause.node, cause.detail) == (
        CauseKind.LOST,
        "b",
        "it does not read the log",
    )
    reads = {"b": peer(waiting("b"))}
    assert decision(status("a"), reads, of=world, generation_since_s=1.0) == Wait("training")


def test_generation_given_up_by_one_member_is_broken_for_all() -> None:
    """If one member found the generation broken, a member that detected nothing ends its workers too."""
    world = generation("a", "b", "c")
    peers = {"b": peer(status("b", broken=1)), "c": peer(status("c"))}
    assert is_broken(status("a"), peers, of=world)
    proposal = decision(status("a"), peers, of=world)
    assert nodes(proposal) == ["a", "b", "c"]
    assert causes(proposal) == [(CauseKind.GAVE_UP, "b")]
    older = {"b": peer(status("b", broken=0)), "c": peer(status("c"))}
    assert not is_broken(status("a"), older, of=world)


def test_checkpoint_given_up_after_a_loss_is_no_cause() -> None:
    """If members give up the checkpoint of a stop because another member was lost, only the loss is a cause."""
    world = generation("a", "b", "c")
    peers = {
        "b": refusing(status("b", NodePhase.SETTLING)),
        "c": peer(waiting("c", spent=1, broken=1)),
    }
    proposal = decision(waiting("a", spent=1, broken=1), peers, of=world)
    assert nodes(proposal) == ["a", "c"]
    assert causes(proposal) == [(CauseKind.LOST, "b")]


def test_no_more_nodes_than_limits_and_slots_allow() -> None:
    """A newcomer above nodes_max, or without a free slot, stays a spare and causes no drain."""
    world = generation("a", "b")
    peers = {"b": peer(status("b")), "c": peer(waiting("c"))}
    for limits in (
        changed(LIMITS, nodes_max=2),
        changed(LIMITS, slots=2),
    ):
        assert decision(status("a"), peers, of=world, limits=limits) == Wait("training")
    assert isinstance(decision(status("a"), peers, of=world), Drain)


def test_spares_replace_lost_members() -> None:
    """After a loss, as many waiting nodes join as the limits allow."""
    limits = changed(LIMITS, nodes_max=2)
    peers = {"b": refusing(status("b")), "c": peer(waiting("c")), "d": peer(waiting("d"))}
    proposal = decision(status("a"), peers, of=generation("a", "b"), limits=limits)
    assert nodes(proposal) == ["a", "c"]


def test_newcomer_with_too_many_workers_is_skipped() -> None:
    """Nodes get slots in order of their names. A node that does not fit is skipped."""
    large = waiting("c", member=member("c", workers=8))
    peers = {"c": peer(large), "d": peer(waiting("d"))}
    assert decision(status("a"), peers, of=generation("a")) == Drain("d joins")


def test_below_the_minimum_the_run_pauses() -> None:
    """With fewer nodes than nodes_min there is no proposal, workers end, and the reason names the limit."""
    limits = changed(LIMITS, nodes_min=2)
    waits = decision(
        status("a"), {"b": refusing(status("b"))}, of=generation("a", "b"), limits=limits
    )
    assert waits == Wait("paused: 1 of at least 2 nodes; lost b", broken=True, watching=True)


def test_a_node_in_quarantine_is_left_out_while_others_are_enough() -> None:
    """A member that fails too often waits, unless there would be fewer nodes than nodes_min without it."""
    world, barred = generation("a", "b"), {"b": "3 failures"}
    peers = {"b": peer(waiting("b", spent=1, failure=failed("b")))}
    proposal = decision(status("a"), peers, of=world, barred=barred)
    assert nodes(proposal) == ["a"]
    assert causes(proposal) == [(CauseKind.FAILED, "b"), (CauseKind.BARRED, "b")]
    needed = changed(LIMITS, nodes_min=2)
    assert nodes(decision(status("a"), peers, of=world, limits=needed, barred=barred)) == ["a", "b"]


def test_a_newcomer_in_quarantine_joins_if_it_is_needed() -> None:
    """After a loss a node that is kept out joins if the run would be paused without it; otherwise it stays out."""
    needed = changed(LIMITS, nodes_min=2)
    peers = {"b": refusing(status("b")), "c": peer(waiting("c"))}
    facts = {"limits": needed, "barred": {"c": "3 failures"}}
    assert nodes(decision(status("a"), peers, of=generation("a", "b"), **facts)) == ["a", "c"]
    more = peers | {"d": peer(waiting("d"))}
    assert nodes(decision(status("a"), more, of=generation("a", "b"), **facts)) == ["a", "d"]


def test_a_quarantine_of_the_first_member_delays_no_proposal() -> None:
    """A node that is kept out has answered, so the others need not wait as for another side."""
    world = generation("a", "b")
    peers = {"a": peer(waiting("a", spent=1, failure=failed("a")))}
    facts = {"barred": {"a": "3 failures"}, "quiet_since_s": NOTICED_S}
    assert nodes(decision(status("b"), peers, of=world, **facts)) == ["b"]


def test_run_is_halted_when_its_budget_is_used_up() -> None:
    """If a budget is used up, the run ends only when a failure broke the generation."""
    world = generation("a", "b")
    b = waiting("b", spent=1, failure=failed("b"))
    assert decision(status("a"), {"b": peer(b)}, of=world, halt="again and again") == Halt(
        "again and again"
    )
    lost = {"b": refusing(status("b"))}
    assert nodes(decision(status("a"), lost, of=world, halt="again and again")) == ["a"]


def test_smaller_side_never_halts_the_run() -> None:
    """A node that is cut off from most members, or sees fewer than nodes_min, does not end the run."""
    world, peers = side("ab", "cde")
    me = waiting("a", spent=1, failure=failed("a"), unreachable=lives(*"cde"))
    facts = {"halt": "again and again", "quiet_since_s": NOW_S}
    assert decision(me, peers, of=world, **facts).reason.startswith("cut off with 2 of 5 members")
    few = changed(LIMITS, nodes_min=3)
    facts = {"halt": "again and again", "limits": few}
    assert decision(me, peers, of=world, **facts).reason.startswith("paused: 2 of at least 3")


def test_the_end_of_the_run_ends_everything() -> None:
    """If the log has a STOP, every node decides to end, with any other facts."""
    assert decision(status("a"), {}, of=generation("a", "b"), stop=Stop("completed", 9)) == Ended(
        "completed"
    )


# ---- asked again -------------------------------------------------------------------------------------


def test_only_nodes_that_answered_since_the_failure_are_proposed() -> None:
    """Only nodes that answered after the detection are proposed. A node that died at the same time is not."""
    world = generation("a", "b", "c")
    b, before = refusing(status("b")), NOW_S - NOTICED_S + 0.1
    peers = {"b": b, "c": peer(status("c"), silent_s=before)}
    assert decision(status("a"), peers, of=world) == Wait(
        "asking whether c can continue; lost b", broken=True, asking=True
    )
    peers = {"b": b, "c": peer(status("c"), silent_s=NOW_S - NOTICED_S)}
    assert nodes(decision(status("a"), peers, of=world)) == ["a", "c"]


def test_a_spare_is_asked_again_too() -> None:
    """A waiting node is in the generation after a loss when it has answered."""
    world = generation("a", "b")
    b, before = refusing(status("b")), NOW_S - NOTICED_S + 0.1
    asked = decision(status("a"), {"b": b, "c": peer(waiting("c"), silent_s=before)}, of=world)
    assert isinstance(asked, Wait)
    assert asked.reason.startswith("asking whether c can continue")
    proposal = decision(status("a"), {"b": b, "c": peer(waiting("c"))}, of=world)
    assert nodes(proposal) == ["a", "c"]
    assert causes(proposal) == [(CauseKind.LOST, "b"), (CauseKind.JOINED, "c")]


# ---- larger side -------------------------------------------------------------------------------------


def side(mine: str, others: str) -> tuple[Generation, dict[str, Peer]]:
    """A partitioned generation, as the first member of `mine` sees it; members are in alphabetic order."""
    world = generation(*sorted(mine + others))
    seen = {node: peer(status(node, unreachable=lives(*others))) for node in mine[1:]}
    return world, seen | {node: silent(status(node)) for node in others}


def test_the_smaller_side_waits_for_the_larger_side() -> None:
    """A node that sees fewer than half of the members ends its workers and waits takeover_s after the last change."""
    world, peers = side("ab", "cde")
    me = status("a", unreachable=lives(*"cde"))
    almost_s = NOW_S - LIMITS.elastic.takeover_s + 0.01
    for quiet_s, noticed_s in ((almost_s, 1.0), (1.0, almost_s), (almost_s, almost_s)):
        waits = decision(me, peers, of=world, quiet_since_s=quiet_s, broken_since_s=noticed_s)
        assert isinstance(waits, Wait), (quiet_s, noticed_s)
        assert waits.broken
        assert waits.reason.startswith("cut off with 2 of 5 members")
    over_s = NOW_S - LIMITS.elastic.takeover_s
    facts = {"quiet_since_s": over_s, "broken_since_s": over_s}
    assert nodes(decision(me, peers, of=world, **facts)) == ["a", "b"]
    unseen = decision(me, peers, of=world, **facts, quiet_until_s=NOW_S - 0.01)
    assert unseen.reason.startswith("cut off with 2 of 5 members"), (
        "only observed time counts as quiet"
    )


def test_the_larger_side_proposes_at_once() -> None:
    """A node that sees more than half of the members does not wait."""
    world, peers = side("cde", "ab")
    me = status("c", unreachable=lives(*"ab"))
    assert nodes(decision(me, peers, of=world, quiet_since_s=NOW_S)) == ["c", "d", "e"]


def test_of_two_halves_the_one_with_the_first_member_proposes() -> None:
    """Rank decides an even split: the half with the first member proposes at once, the other half waits."""
    world, peers = side("ad", "bc")
    me = status("a", unreachable=lives(*"bc"))
    assert nodes(decision(me, peers, of=world, quiet_since_s=NOW_S)) == ["a", "d"]
    world, peers = side("bc", "ad")
    waits = decision(status("b", unreachable=lives(*"ad")), peers, of=world, quiet_since_s=NOW_S)
    assert isinstance(waits, Wait)
    assert waits.reason.startswith("cut off with 2 of 4 members")


def test_member_that_is_gone_for_certain_has_no_vote() -> None:
    """Members with a refusing address, and members that leave, do not count: the others need not wait for them."""
    world = generation(*"abcde")
    me, e = status("d"), {"e": peer(status("e", unreachable=lives(*"abc")))}
    gone = {node: refusing(status(node)) for node in "abc"}
    left = {node: refusing(waiting(node, spent=1, leaving=True)) for node in "abc"}
    away = {node: silent(status(node)) for node in "abc"}
    for certain in (gone, left):
        for unsure in "abc":
            peers = certain | e | {unsure: away[unsure]}
            assert nodes(decision(me, peers, of=world, quiet_since_s=NOW_S)) == ["d", "e"]
    waits = decision(me, away | e, of=world, quiet_since_s=NOW_S)
    assert waits.reason.startswith("cut off with 2 of 5 members")


def proposers(world: Generation, here: set[str], dead: set[str], now_s: float) -> list[str]:
    """Members of one side that would propose if both sides are silent to each other and `dead` is gone."""
    everyone = {each.node for each in world.members}
    away = lives(*(everyone - here))
    found = []
    for me in here:
        peers = {
            node: refusing(status(node))
            if node in dead
            else peer(status(node, unreachable=away), silent_s=NOW_S - now_s + 0.1)
            if node in here
            else silent(status(node))
            for node in everyone - {me}
        }
        decided = decision(
            status(me, unreachable=away), peers, of=world, now_s=now_s, quiet_since_s=NOTICED_S
        )
        if isinstance(decided, Propose):
            found.append(me)
    return found


@given(
    order=st.permutations("abcdefg"),
    roles=st.lists(st.sampled_from(["left", "right", "dead"]), min_size=7, max_size=7),
    size=st.integers(2, 7),
)
def test_two_sides_of_a_split_network_never_propose_at_once(
    order: list[str], roles: list[str], size: int
) -> None:
    """For any split, exactly one node of one side proposes within takeover_s."""
    world = generation(*order[:size])
    role = dict(zip(order[:size], roles, strict=False))
    left, right, dead = (
        {node for node in role if role[node] == name} for name in ("left", "right", "dead")
    )
    if not left or not right:
        return
    found = [*proposers(world, left, dead, NOW_S), *proposers(world, right, dead, NOW_S)]
    assert len(found) == 1
    # The other side proposes too when nothing has changed for long.
    later_s = NOTICED_S + LIMITS.elastic.takeover_s
    assert len(proposers(world, left, dead, later_s)) == 1
    assert len(proposers(world, right, dead, later_s)) == 1


# ---- park --------------------------------------------------------------------------------------------


def test_of_two_members_without_a_link_the_later_one_waits() -> None:
    """If one end reports a broken link, all park the end that ranks last. The cause names the other end."""
    world = generation("a", "b", "c")
    b, c = status("b", unreachable=lives("c")), status("c")
    for me, peers in (
        (status("a"), {"b": peer(b), "c": peer(c)}),
        (status("a"), {"b": peer(status("b")), "c": peer(status("c", unreachable=lives("b")))}),
    ):
        proposal = decision(me, peers, of=world)
        assert nodes(proposal) == ["a", "b"]
        assert causes(proposal) == [(CauseKind.PARKED, "c")]
        assert proposal.reason == "c parked: no link to b"
    told = decision(c, {"a": peer(status("a")), "b": peer(b)}, of=world)
    assert told == Wait("a leads: c parked: no link to b", broken=True)


def test_a_member_that_others_cannot_reach_is_parked_only_after_it_has_answered() -> None:
    """Another member may notice first that c is gone. Whether c is lost or parked is known once it was asked."""
    world, b = generation("a", "b", "c"), peer(status("b", unreachable=lives("c"), broken=1))
    since = {"broken_since_s": NOW_S - 0.2}
    before = {"b": b, "c": peer(status("c"), silent_s=0.3)}
    asks = decision(status("a"), before, of=world, **since)
    expected = "asking whether c can continue; c parked: no link to b"
    assert asks == Wait(expected, broken=True, asking=True)
    gone = decision(status("a"), before | {"c": refusing(status("c"))}, of=world, **since)
    assert causes(gone) == [(CauseKind.LOST, "c")]
    answers = decision(status("a"), before | {"c": peer(status("c"))}, of=world, **since)
    assert causes(answers) == [(CauseKind.PARKED, "c")]


def test_cause_of_a_parked_member_names_its_missing_links() -> None:
    """Of several broken links, each parked member's cause names its own."""
    world = generation(*"abcde")
    peers = {node: peer(status(node)) for node in "bd"}
    peers["c"] = peer(status("c", unreachable=lives("b")))
    peers["e"] = peer(status("e", unreachable=lives("d")))
    proposal = decision(status("a"), peers, of=world)
    assert nodes(proposal) == ["a", "b", "d"]
    assert proposal.reason == "c parked: no link to b; e parked: no link to d"


def test_link_to_a_lost_member_parks_no_other() -> None:
    """A member is not parked because it cannot reach a lost member."""
    world = generation("a", "b", "c")
    peers = {"b": refusing(status("b")), "c": peer(status("c", unreachable=lives("b")))}
    proposal = decision(status("a"), peers, of=world)
    assert nodes(proposal) == ["a", "c"]
    assert causes(proposal) == [(CauseKind.LOST, "b")]


NODES = "abcdefgh"
LINKS = st.lists(
    st.sampled_from([(one, other) for one in NODES for other in NODES if one < other]), unique=True
)


@given(links=LINKS, shuffled=st.randoms(use_true_random=False), order=st.permutations(NODES))
def test_parking_leaves_no_broken_link(
    links: list[tuple[str, str]], shuffled: random.Random, order: list[str]
) -> None:
    """Members that are not parked reach each other, no more are parked than needed, and every node finds the same."""
    members = [member(node) for node in order]
    broken = [(f"{one}1", f"{other}1") for one, other in links]
    parked = set(park(broken, members))
    assert all(parked & set(link) for link in broken)
    assert parked <= {end for link in broken for end in link}
    shuffled.shuffle(broken)
    assert set(park(broken, members)) == parked


@given(
    ranked=st.permutations(NODES),
    shuffled=st.permutations(NODES),
    cut=st.integers(1, len(NODES) - 1),
)
def test_split_parks_the_smaller_side(ranked: list[str], shuffled: list[str], cut: int) -> None:
    """Without links between two groups, the smaller one is parked; of equal groups the one with the last rank."""
    one, other = shuffled[:cut], shuffled[cut:]
    links = [(min(a, b), max(a, b)) for a in lives(*one) for b in lives(*other)]
    smaller = min(one, other, key=lambda group: (len(group), ranked[-1] not in group))
    assert park(links, [member(node) for node in ranked]) == tuple(sorted(lives(*smaller)))


# ---- heard by others ---------------------------------------------------------------------------------


def test_silent_member_that_others_reach_is_parked_not_lost() -> None:
    """A member that is silent to one member only has a broken link, after a grace period for other members' reports."""
    world, me = generation("a", "b", "c"), status("a", unreachable=lives("b"))
    grace_s = TIMEOUT_S * (1 + LINK_GRACE_SHARE)
    peers = {"b": peer(status("b"), silent_s=grace_s - 0.01), "c": peer(status("c"))}
    assert decision(me, peers, of=world) == Wait("training")
    peers["b"] = peer(status("b"), silent_s=grace_s + 0.01)
    proposal = decision(me, peers, of=world)
    assert nodes(proposal) == ["a", "c"]
    assert causes(proposal) == [(CauseKind.PARKED, "b")]


def test_link_is_broken_only_if_both_ends_are_alive() -> None:
    """If c cannot reach b, a node with proof of life of b sees a broken link. Without it, b may be gone."""
    world, c = generation("a", "b", "c"), peer(status("c", unreachable=lives("b")))
    fresh_s = TIMEOUT_S * LINK_FRESH_SHARE
    for silent_s, broken in ((fresh_s - 0.01, True), (fresh_s + 0.01, False)):
        peers = {"b": peer(status("b"), silent_s=silent_s), "c": c}
        assert is_broken(status("a"), peers, of=world) is broken
    stranger = {"b": peer(status("b", unreachable=("z1",))), "c": peer(status("c"))}
    assert not is_broken(status("a"), stranger, of=world)


def test_silent_member_that_no_member_reaches_is_lost() -> None:
    """If every answering member reports it as unreachable, or if there is none, silence needs no grace period."""
    b = silent(status("b"))
    c = peer(status("c", unreachable=lives("b")))
    proposal = decision(status("a"), {"b": b, "c": c}, of=generation("a", "b", "c"))
    assert causes(proposal) == [(CauseKind.LOST, "b")]
    assert causes(decision(status("a"), {"b": b}, of=generation("a", "b"))) == [
        (CauseKind.LOST, "b")
    ]


@pytest.mark.parametrize("witness", [waiting("c", generation=0), None], ids=["behind", "mute"])
def test_only_a_member_that_has_read_the_generation_is_evidence(witness: object) -> None:
    """A member that does not know the generation yet, or sent no message, proves nothing about the others."""
    c = Peer(None, NOW_S, None, False) if witness is None else peer(waiting("c", generation=0))
    peers = {"b": silent(status("b")), "c": c}
    assert is_broken(status("a"), peers, of=generation("a", "b", "c"))


def test_members_of_a_large_fleet_are_no_evidence_for_others() -> None:
    """If members ask only the leaders, their status does not prove that they reach the others."""
    names = [f"n{number:02}" for number in range(MESH_NODES_MAX + 1)]
    peers = {name: peer(status(name)) for name in names[1:]} | {"n05": silent(status("n05"))}
    limits = changed(LIMITS, nodes_max=64, slots=None)
    proposal = decision(status("n00"), peers, of=generation(*names), limits=limits)
    assert causes(proposal) == [(CauseKind.LOST, "n05")]
