"""Why a node has no workers, for the account of its time: from its own decision."""

import pytest

from elastic_pt.membership.decision.decide import (
    Decision,
    Ended,
    Halt,
    Paused,
    Propose,
    Wait,
    idle_of,
)
from elastic_pt.membership.decision.status import Idle
from elastic_pt.runlog.records import Request, Verb
from tests.membership.world import (
    LIMITS,
    changed,
    decision,
    generation,
    member,
    peer,
    refusing,
    silent,
    status,
    waiting,
)

WORLD = generation("a", "b")
RUNNING = {"a": peer(status("a")), "b": peer(status("b"))}
PAUSE = Request(Verb.PAUSE, "ann@desk", "maintenance")
ALONE = changed(LIMITS, nodes_min=2)

CASES: dict[str, tuple[Idle, Decision]] = {
    "a member whose workers have not started": (
        Idle.STARTS,
        decision(waiting("a"), {"b": peer(waiting("b"))}, of=WORLD),
    ),
    "a member that has stopped before another one": (
        Idle.DRAINS,
        decision(waiting("a", spent=1), {"b": peer(status("b"))}, of=WORLD),
    ),
    "the generation is broken, another node leads": (
        Idle.AGREES,
        decision(
            status("c"),
            {"a": peer(status("a")), "b": refusing(status("b"))},
            of=generation("a", "b", "c"),
        ),
    ),
    "the others are too few": (
        Idle.BELOW_MINIMUM,
        decision(status("a"), {"b": refusing(status("b"))}, of=WORLD, limits=ALONE),
    ),
    "a node that the others need rests": (
        Idle.AGREES,
        decision(
            waiting("a", spent=1),
            {"b": peer(waiting("b", spent=1, resting="oom"))},
            of=WORLD,
            limits=ALONE,
        ),
    ),
    "the only node rests": (
        Idle.AGREES,
        decision(waiting("a", spent=1, resting="oom"), {}, of=generation("a")),
    ),
    "one node rests and the others are too few with it": (
        Idle.BELOW_MINIMUM,
        decision(
            status("a"),
            {"b": peer(waiting("b", spent=1, resting="oom")), "c": refusing(status("c"))},
            of=generation("a", "b", "c"),
            limits=changed(LIMITS, nodes_min=3),
        ),
    ),
    "the run's first nodes are too few": (
        Idle.BELOW_MINIMUM,
        decision(waiting("a", generation=0), {}, of=None, limits=ALONE),
    ),
    "the run's first nodes may become more": (
        Idle.AGREES,
        decision(waiting("a", generation=0), {}, of=None, newcomers_changed_s=999.5),
    ),
    "all members have stopped for a pause": (
        Idle.PAUSED,
        decision(
            waiting("b", spent=1), {"a": peer(waiting("a", spent=1))}, of=WORLD, requests=(PAUSE,)
        ),
    ),
    "a newcomer in a pause": (
        Idle.PAUSED,
        decision(waiting("d"), RUNNING, of=WORLD, requests=(PAUSE,)),
    ),
    "a newcomer that will be admitted": (
        Idle.AGREES,
        decision(waiting("d"), RUNNING, of=WORLD),
    ),
    "a newcomer beyond nodes_max": (
        Idle.SPARE,
        decision(waiting("d"), RUNNING, of=WORLD, limits=changed(LIMITS, nodes_max=2)),
    ),
    "a newcomer whose workers have no slot": (
        Idle.SPARE,
        decision(waiting("d"), RUNNING, of=WORLD, limits=changed(LIMITS, slots=2)),
    ),
    "a node that rests": (
        Idle.SPARE,
        decision(waiting("d", resting="no space"), RUNNING, of=WORLD),
    ),
    "a node that is kept out": (
        Idle.SPARE,
        decision(waiting("d"), RUNNING, of=WORLD, barred={"d": "3 failures"}),
    ),
    "a node that a member does not reach": (
        Idle.SPARE,
        decision(waiting("d", unreachable=(member("b").incarnation,)), RUNNING, of=WORLD),
    ),
    "a newcomer that no member answers": (
        Idle.AGREES,
        decision(
            waiting("d"),
            {node: silent(status(node)) for node in "ab"},
            of=WORLD,
            quiet_since_s=999.0,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_reason_to_have_no_workers_is_told(case: str) -> None:
    """A pause, too few nodes and a spare node are no time to agree."""
    expected, decided = CASES[case]
    assert idle_of(decided, leaving=False) is expected, decided


@pytest.mark.parametrize(
    "decided", [Wait("a leads"), Wait("rests", idle=Idle.SPARE), Paused(PAUSE, "paused")], ids=repr
)
def test_a_node_that_leaves_drains(decided: Decision) -> None:
    """Whatever the others do, a node that leaves waits for its own end."""
    assert idle_of(decided, leaving=True) is Idle.DRAINS


def test_a_node_that_acts_agrees_or_says_that_it_is_paused() -> None:
    """The node that appends for the others counts its time like the others."""
    for decided in (Propose((), "lost b"), Halt("stopped"), Ended("completed")):
        assert idle_of(decided, leaving=False) is Idle.AGREES
    assert idle_of(Paused(PAUSE, "paused"), leaving=False) is Idle.PAUSED
