"""Nodes obey what operators ask through the log, soon, and also where the agents are others by then."""

import pytest

from elastic_pt.membership.decision.decide import Drain, Ended, Save, Wait
from elastic_pt.membership.decision.status import Held, NodePhase
from elastic_pt.membership.resources import NothingInMemory
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Commit, Request, Stop, Verb
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, changed

NOTICE_S = 2.0
PAUSED = "paused by ann@desk: maintenance"


def request(fleet: Fleet, verb: Verb, node: str = "", seconds: float = 0.0) -> int:
    """An operator asks; the index of the record."""
    wish = Request(verb, "ann@desk", "maintenance", node, seconds)
    log = RunLog(fleet.bucket, writer="operator")
    generation = log.refresh().generation_number
    return log.append(lambda view: ask(view, wish), generation=generation).length - 1


def pass_time(fleet: Fleet, seconds: float) -> None:
    """As `Fleet.pass_time`, with the work of the pulse's thread."""
    for _ in range(round(seconds / TICK_S)):
        fleet.pass_time(TICK_S)
        for node in fleet.alive():
            node.step_pulse()


def commit(fleet: Fleet, step: int, met: int = -1) -> None:
    """The members' workers have stopped or go on, and this step is committed."""
    number = fleet.log.generation_number
    checkpoint = Checkpoint(step, number, f"ckpt/{step}", 1, "0" * 64, None)
    RunLog(fleet.bucket, writer="a").append(
        lambda _: Commit((checkpoint,), "history", request=met), generation=number
    )


def paused(fleet: Fleet, *nodes: str) -> None:
    """Form a world, pause it, and stop its workers."""
    fleet.form(*nodes)
    request(fleet, Verb.PAUSE)
    pass_time(fleet, NOTICE_S)
    commit(fleet, 40)
    fleet.spend(1, *nodes)
    pass_time(fleet, NOTICE_S)


class Rows(NothingInMemory):
    """Rows of step 42 of generation 1, of some of three workers, in a node's memory."""

    held: tuple[Held, ...] = ()

    def __init__(self, *ranks: int) -> None:
        self.held = tuple(Held(1, 42, rank, rank + 1, 3) for rank in ranks)


def with_rows_in_memory(fleet: Fleet) -> None:
    """Form a world of three nodes that hold step 42 twice; step 40 is committed."""
    fleet.states = {"a": Rows(0, 1), "b": Rows(1, 2), "c": Rows(2, 0)}
    fleet.form("a", "b", "c")
    commit(fleet, 40)


def makes_the_promised_commit(fleet: Fleet, verb: Verb, *nodes: str) -> None:
    """A second generation resumes from memory, does one step and commits it; only then is the request carried out."""
    pass_time(fleet, 10.0)
    second = fleet.log.generation
    assert second is not None
    assert (second.number, names(second), second.resume_step) == (2, list(nodes), 42)
    assert fleet.log.stop is None
    assert not any(each.done for each in fleet.log.requests)
    fleet.run()
    fleet.drains.clear()
    pass_time(fleet, NOTICE_S)
    assert set(fleet.drains) == {f"{verb} asked for by ann@desk: maintenance"}
    commit(fleet, 43)
    fleet.spend(2, *nodes)
    pass_time(fleet, NOTICE_S)
    pause = fleet.log.request(Verb.PAUSE)
    if verb is Verb.STOP:
        assert fleet.log.stop == Stop("stopped by ann@desk: maintenance", 43)
    else:
        assert pause is not None
        assert pause.done
    assert fleet.log.generation_number == 2
    assert fleet.bound == 2, "no proposal was refused"


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP])
def test_request_after_the_workers_have_stopped_is_carried_out(fleet: Fleet, verb: Verb) -> None:
    """H4: members stopped for a join and settled from memory. The request arrives before the next GENERATION."""
    with_rows_in_memory(fleet)
    fleet.spend(1, "a", "b", "c")
    request(fleet, verb)
    makes_the_promised_commit(fleet, verb, "a", "b", "c")


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP])
def test_member_that_is_lost_before_the_promised_commit_costs_no_step(
    fleet: Fleet, verb: Verb
) -> None:
    """H5: the committing node is lost during the upload. The others hold the step, and have promised to commit it."""
    with_rows_in_memory(fleet)
    request(fleet, verb)
    pass_time(fleet, NOTICE_S)
    for node in fleet.nodes.values():
        node.me.say(phase=NodePhase.SETTLING)
    pass_time(fleet, 1.0)
    fleet.dead.add("a")
    pass_time(fleet, 1.0)
    fleet.spend(1, "b", "c")
    makes_the_promised_commit(fleet, verb, "b", "c")


def test_members_that_settled_before_a_request_hold_up_no_other(fleet: Fleet) -> None:
    """M5: a settled from memory, c has left. b reads a pause before it has settled: memory counts for it, too."""
    with_rows_in_memory(fleet)
    world = fleet.log.generation
    assert world is not None
    fleet.nodes["c"].me.leaving = True
    for node in fleet.nodes.values():
        node.me.say(phase=NodePhase.SETTLING)
    pass_time(fleet, 1.0)
    b = fleet.nodes["b"]
    assert b.known.settled(world, 42).tier == "memory"
    fleet.spend(1, "c")
    pass_time(fleet, 1.0)
    fleet.dead.add("c")
    request(fleet, Verb.PAUSE)
    pass_time(fleet, NOTICE_S)
    assert b.log.view.request(Verb.PAUSE) is not None
    assert b.known.settled(world, 42).tier == "memory"
    fleet.spend(1, "a", "b")
    makes_the_promised_commit(fleet, Verb.PAUSE, "a", "b")


@pytest.mark.parametrize("takeover_s", [LIMITS.elastic.takeover_s, 60.0])
def test_every_member_notices_a_request_within_two_seconds(fleet: Fleet, takeover_s: float) -> None:
    """The first member looks at the log once a second, however long takeovers take, and tells the others."""
    fleet.limits = changed(LIMITS, takeover_s=takeover_s)
    fleet.form("a", "b", "c")
    pass_time(fleet, 2.0)
    assert fleet.drains == []
    request(fleet, Verb.PAUSE)
    pass_time(fleet, NOTICE_S)
    assert fleet.nodes["a"].decision == Drain("pause asked for by ann@desk: maintenance")
    assert set(fleet.drains) == {"pause asked for by ann@desk: maintenance"}
    for node in fleet.nodes.values():
        assert node.log.view.request(Verb.PAUSE) is not None


def test_a_paused_run_has_no_generation_until_it_is_resumed(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """The first node says that the pause is reached, and watches the log for all; a resume is obeyed within two seconds."""
    paused(fleet, "a", "b", "c")
    pause = fleet.log.request(Verb.PAUSE)
    assert pause is not None
    assert pause.done
    bucket.requests.clear()
    pass_time(fleet, 20.0)
    assert {node.decision.reason for node in fleet.nodes.values()} == {PAUSED}
    assert set(bucket.requests) == {"read log"}, "one node looks, and nobody writes a pulse"
    assert bucket.requests["read log"] == pytest.approx(20, abs=4)
    assert fleet.log.generation_number == 1
    request(fleet, Verb.RESUME)
    pass_time(fleet, NOTICE_S)
    second = fleet.log.generation
    assert second is not None
    assert (second.number, names(second)) == (2, ["a", "b", "c"])
    assert second.agree_s < NOTICE_S, "the pause itself is not counted"


def test_a_pause_outlives_every_agent(fleet: Fleet) -> None:
    """Agents that start while a run is paused wait, whoever they are, and go on when it is resumed."""
    paused(fleet, "a", "b")
    fleet.dead |= {"a", "b"}
    fleet.start("c", "d")
    pass_time(fleet, 3 * LIMITS.elastic.takeover_s)
    assert {node.decision.reason for node in fleet.alive()} == {PAUSED}
    assert fleet.log.generation_number == 1
    request(fleet, Verb.RESUME)
    pass_time(fleet, NOTICE_S + LIMITS.elastic.takeover_s / 2)
    assert names(fleet.log.generation) == ["c", "d"]


def test_a_pause_before_the_start_is_obeyed(fleet: Fleet) -> None:
    """A run that was paused before any agent was there starts when it is resumed."""
    request(fleet, Verb.PAUSE)
    fleet.start("a")
    pass_time(fleet, 4.0)
    held = fleet.log.request(Verb.PAUSE)
    assert held is not None
    assert held.done
    assert fleet.log.generation is None
    request(fleet, Verb.RESUME)
    pass_time(fleet, NOTICE_S)
    assert names(fleet.log.generation) == ["a"]


def test_a_member_that_is_lost_in_a_pause_leaves_the_others_to_resume(fleet: Fleet) -> None:
    """The node that watched the log for all may be lost; the others notice the resume themselves."""
    paused(fleet, "a", "b", "c")
    fleet.dead.add("a")
    pass_time(fleet, 10.0)
    assert {node.decision for node in fleet.alive()} <= {
        Wait(PAUSED, broken=True, watching=watching) for watching in (True, False)
    }
    request(fleet, Verb.RESUME)
    pass_time(fleet, NOTICE_S + 1.0)
    second = fleet.log.generation
    assert names(second) == ["b", "c"]
    assert second is not None
    assert second.agree_s < NOTICE_S, "the pause itself is not counted"


def test_only_the_named_node_is_drained(fleet: Fleet) -> None:
    """The node leaves as if asked by a signal, within the time that the operator gave; the others drain for it."""
    fleet.form("a", "b")
    request(fleet, Verb.DRAIN, "b", 30.0)
    pass_time(fleet, NOTICE_S)
    assert fleet.leaves == [("b", 30.0)]
    assert fleet.nodes["a"].decision == Drain("b leaves")


def test_a_node_that_starts_later_is_drained(fleet: Fleet) -> None:
    """A drain of a node that is not there holds for the next agent of that name, and for no other one."""
    fleet.form("a")
    request(fleet, Verb.DRAIN, "b")
    fleet.start("b", "c")
    pass_time(fleet, 4.0)
    assert fleet.leaves == [("b", 0.0)]
    assert fleet.nodes["a"].decision == Drain("c joins")


def test_the_first_member_asks_for_the_checkpoint_until_it_is_committed(fleet: Fleet) -> None:
    """Workers that connect later are told, too; a COMMIT that was on its way before does not count."""
    fleet.form("a", "b")
    wanted = request(fleet, Verb.CHECKPOINT)
    pass_time(fleet, NOTICE_S)
    commit(fleet, 10)
    pass_time(fleet, NOTICE_S)
    wish = "checkpoint asked for by ann@desk: maintenance"
    assert fleet.nodes["a"].decision == Save(wanted, wish)
    assert fleet.nodes["b"].decision == Wait("training")
    assert set(fleet.checkpoints) == {wanted}
    commit(fleet, 20, wanted)
    pass_time(fleet, NOTICE_S)
    told = len(fleet.checkpoints)
    pass_time(fleet, 2.0)
    assert fleet.nodes["a"].decision == Wait("training")
    assert len(fleet.checkpoints) == told


def test_a_stop_ends_the_run_once_its_last_step_is_committed(fleet: Fleet) -> None:
    """Members drain first; STOP has who asked, and the step that was committed last."""
    fleet.form("a", "b")
    request(fleet, Verb.STOP)
    pass_time(fleet, NOTICE_S)
    assert fleet.drains
    fleet.nodes["a"].me.say(phase=NodePhase.SETTLING)
    fleet.spend(1, "b")
    pass_time(fleet, NOTICE_S)
    assert fleet.log.stop is None
    commit(fleet, 40)
    fleet.spend(1, "a")
    pass_time(fleet, NOTICE_S)
    assert fleet.log.stop == Stop("stopped by ann@desk: maintenance", 40)
    assert {type(node.decision) for node in fleet.nodes.values()} == {Ended}


def test_a_run_without_agents_is_stopped_by_the_next_one(fleet: Fleet) -> None:
    """It starts no generation for that."""
    fleet.form("a")
    fleet.dead.add("a")
    request(fleet, Verb.STOP)
    fleet.start("b")
    pass_time(fleet, 3 * LIMITS.elastic.takeover_s)
    assert fleet.log.stop is not None
    assert fleet.log.stop.reason == "stopped by ann@desk: maintenance"
    assert fleet.log.generation_number == 1
