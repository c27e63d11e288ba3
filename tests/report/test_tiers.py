"""What would be lost now, from what nodes hold."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.membership.decision.at_risk import AtRisk, at_risk
from elastic_pt.membership.decision.resume import newest_in_memory, newest_without_each
from elastic_pt.membership.decision.status import Held, NodeStatus
from elastic_pt.report.tiers import Tier, tiers
from elastic_pt.runlog.records import Generation, Member

MEMBERS = tuple(Member(name, f"{name}-1", "127.0.0.1", 1, 1, 1) for name in "abc")
GENERATION = Generation(2, MEMBERS, (2, 2, 2), "127.0.0.1", 1, None, "test")
BUCKET = Tier("bucket", 50, 12.0)


def held(step: int, rank: int, age_s: float = 0.5) -> Held:
    """The rows of one of three workers."""
    return Held(2, step, rank, rank + 1, 3, age_s)


def answers(*told: tuple[Held, ...]) -> dict[str, NodeStatus]:
    """What the members say."""
    return {
        member.incarnation: dataclasses.replace(NodeStatus.first(member, {}), held=each)
        for member, each in zip(MEMBERS, told, strict=True)
    }


MIRRORED = answers(
    (held(59, 0), held(59, 1), held(60, 0)),
    (held(59, 1), held(59, 2), held(60, 1)),
    (held(59, 2), held(59, 0), held(60, 2, 0.1)),
)
"""Step 59 is on two nodes each, step 60 on its own nodes only."""


def test_each_tier_has_its_newest_step() -> None:
    """Memory has what all nodes hold together, peers what is left without any one of them."""
    assert tiers(GENERATION, MIRRORED, BUCKET) == (
        Tier("memory", 60, 0.5),
        Tier("peer", 59, 0.5),
        BUCKET,
    )


def test_steps_at_risk_follow_from_the_tiers() -> None:
    """A node costs the steps since the newest mirrored one, all nodes those since the commit."""
    assert at_risk(GENERATION, MIRRORED, 61, 50) == AtRisk(node=2, any_node=2, all=11)


def test_node_without_a_mirror_costs_most() -> None:
    """The worst node counts: here the others hold no copy of b's rows."""
    told = answers((held(60, 0), held(60, 2)), (held(60, 1),), (held(60, 2), held(60, 0)))
    assert at_risk(GENERATION, told, 60, 50) == AtRisk(node=0, any_node=10, all=10)


@given(
    st.lists(st.lists(st.tuples(st.integers(48, 60), st.integers(0, 2))), min_size=3, max_size=3)
)
def test_one_pass_finds_what_each_loss_would_leave(rows: list[list[tuple[int, int]]]) -> None:
    """For any copies, the steps at risk are those that a resume without each member in turn would lose."""
    told = answers(*(tuple(held(step, rank) for step, rank in each) for each in rows))
    left = []
    for lost in MEMBERS:
        others = [each for each in MEMBERS if each is not lost]
        state = newest_in_memory(GENERATION, others, told, 50)
        left.append(50 if state is None else state.step)
    assert newest_without_each(GENERATION, MEMBERS, told, 50) == left


def test_run_without_agents_has_the_bucket_alone() -> None:
    """Nothing is in memory if no agent answers, and nothing at all before the first commit."""
    assert tiers(GENERATION, {}, BUCKET) == (BUCKET,)
    assert at_risk(GENERATION, {}, 55, 50) == AtRisk(5, 5, 5)
    assert tiers(None, {}, None) == ()
    assert at_risk(None, {}, 0, 0) == AtRisk(0, 0, 0)
