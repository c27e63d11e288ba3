"""When faults strike, and whom: as their scenario says, at the moment that it names and not before."""

from typing import Any

import pytest

from elastic_pt.chaos.moments import Agenda
from elastic_pt.chaos.scenario import Draw, FaultSpec, Phase
from elastic_pt.failpoints import Reached
from elastic_pt.runlog.records import Generation, Member

RUNNING = ["node-0", "node-1", "node-2"]


def fault(at: dict[str, Any], node: str | list[str] = "any") -> FaultSpec:
    """A node that is killed."""
    return FaultSpec.model_validate({"kind": "kill_node", "node": node, "at": at})


def agenda(*faults: FaultSpec, seed: int = 1) -> Agenda:
    """What a scenario with these faults has before it."""
    return Agenda(faults, Draw(seed))


def generation(number: int, *nodes: str) -> Generation:
    """The second member copies the state of the first one."""
    members = tuple(Member(node, f"{node}-x", "127.0.0.1", 1, 1, 1) for node in nodes)
    mirrors = ((1,), *((0,) for _ in nodes[1:])) if len(nodes) > 1 else ()
    return Generation(number, members, (4,) * len(nodes), "127.0.0.1", 1, None, "", mirrors=mirrors)


def at_point(phase: Phase, step: int | None = None) -> Reached:
    """A process that stands in a phase."""
    return Reached(phase.point.label, 1, 100, step)


def numbers(found: Any) -> list[int]:
    """Of the faults that are due."""
    return [number for number, _ in found]


def test_a_step_is_met_once_it_is_about_to_be_computed() -> None:
    """Also if the worker that computes it is already further, as after a restore."""
    faults = agenda(fault({"step": 8}))
    assert numbers(faults.due_at(at_point(Phase.FORWARD, 7))) == []
    assert not faults.may_strike_at(at_point(Phase.FORWARD, 7))
    assert not faults.may_strike_at(at_point(Phase.OPTIMIZER, 8))
    for step in (8, 9):
        assert faults.may_strike_at(at_point(Phase.FORWARD, step))
        assert numbers(faults.due_at(at_point(Phase.FORWARD, step))) == [1]


def test_a_phase_that_knows_no_step_goes_by_the_newest_one() -> None:
    """An agent that commits does not know which step is computed meanwhile."""
    faults = agenda(fault({"phase": "commit", "step": 12}))
    faults.begins(11, 1.0)
    assert numbers(faults.due_at(at_point(Phase.COMMIT))) == []
    faults.begins(12, 1.1)
    faults.begins(9, 1.2)
    assert numbers(faults.due_at(at_point(Phase.COMMIT))) == [1]


def test_a_fault_has_struck_once() -> None:
    """It is not due again, and what comes after it may be."""
    faults = agenda(fault({"step": 1}), fault({"phase": "restore", "after": 1}))
    assert numbers(faults.due_at(at_point(Phase.RESTORE))) == []
    faults.struck(1, 3.0)
    assert numbers(faults.due_at(at_point(Phase.FORWARD, 5))) == []
    assert numbers(faults.due_at(at_point(Phase.RESTORE))) == [2]


def test_times_count_from_the_first_step_or_from_another_fault() -> None:
    """Before either is known nothing is due, and nothing waits."""
    faults = agenda(fault({"seconds": 2}), fault({"seconds": 1, "after": 1}))
    assert numbers(faults.due_by(1e9)) == []
    assert not faults.waits_for_a_time()
    faults.begins(0, 10.0)
    faults.begins(1, 11.0)
    assert numbers(faults.due_by(11.9)) == []
    assert faults.waits_for_a_time()
    assert numbers(faults.due_by(12.0)) == [1]
    faults.struck(1, 12.5)
    assert numbers(faults.due_by(13.4)) == []
    assert numbers(faults.due_by(13.5)) == [2]
    faults.struck(2, 13.5)
    assert not faults.waits_for_a_time()


def test_a_generation_is_waited_for() -> None:
    """And a later one will do."""
    faults = agenda(fault({"step": 0, "generation": 2}))
    here = at_point(Phase.FORWARD, 20)
    assert numbers(faults.due_at(here)) == []
    faults.generation = generation(1, "node-0")
    assert numbers(faults.due_at(here)) == []
    faults.generation = generation(3, "node-0")
    assert numbers(faults.due_at(here)) == [1]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("leader", ("node-2",)),
        ("last", ("node-1",)),
        ("mirror-of-leader", ("node-0",)),
        ("all", ("node-0", "node-1", "node-2")),
        (["node-1", "leader", "last"], ("node-1", "node-2")),
    ],
)
def test_names_of_nodes_follow_the_newest_generation(
    node: str | list[str], expected: tuple[str, ...]
) -> None:
    """Ranks are those of its members, and each node is struck once."""
    spec = fault({"step": 0}, node)
    faults = agenda(spec)
    faults.generation = generation(4, "node-2", "node-0", "node-1")
    assert faults.whom(1, spec, RUNNING, "") == expected


def test_a_member_that_has_ended_is_not_struck() -> None:
    """The next one has its role; before the first generation the nodes count in order."""
    spec = fault({"step": 0}, "leader")
    faults = agenda(spec)
    assert faults.whom(1, spec, RUNNING, "") == ("node-0",)
    faults.generation = generation(4, "node-2", "node-0", "node-1")
    assert faults.whom(1, spec, ["node-0", "node-1"], "") == ("node-0",)
    assert faults.whom(1, spec, [], "") == ()


def test_any_is_whoever_stands_there_or_the_choice_of_the_seed() -> None:
    """The same seed chooses the same node, and each node is chosen by some seed."""
    spec = fault({"seconds": 1})
    assert agenda(spec).whom(1, spec, RUNNING, "node-1") == ("node-1",)
    chosen = [agenda(spec, seed=seed).whom(1, spec, RUNNING, "") for seed in range(30)]
    assert chosen == [agenda(spec, seed=seed).whom(1, spec, RUNNING, "") for seed in range(30)]
    assert set(chosen) == {(each,) for each in RUNNING}


def test_a_follower_is_never_the_leader() -> None:
    """Not even if the leader stands at the moment."""
    spec = fault({"step": 0}, "follower")
    faults = agenda(spec)
    faults.generation = generation(1, *RUNNING)
    assert faults.whom(1, spec, RUNNING, "node-2") == ("node-2",)
    assert faults.whom(1, spec, RUNNING, "node-0") in {("node-1",), ("node-2",)}
    assert faults.whom(1, spec, ["node-0"], "node-0") == ()
