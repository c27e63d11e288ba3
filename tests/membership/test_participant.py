"""One node's part in forming worlds, with a real log and lobby in a directory."""

import dataclasses

import pytest

from elastic_pt.errors import ConfigError, StoreError
from elastic_pt.membership.admission import SPARE_SILENCE_SHARE, slots_per_member
from elastic_pt.membership.decide import Drain, Wait
from elastic_pt.membership.lobby import LOBBY
from elastic_pt.membership.peers import Message
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    CauseKind,
    Checkpoint,
    Commit,
)
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, changed, failed, member, status, waiting

# ---- forming -----------------------------------------------------------------------------------------


def test_nodes_meet_in_the_lobby_and_leave_it(fleet: Fleet, bucket: WatchedStore) -> None:
    """Nodes that start together form one generation, which all know, and no card is left behind."""
    generation = fleet.form("c", "a", "b")
    assert (generation.number, names(generation)) == (1, ["a", "b", "c"])
    assert {node.me.now.generation for node in fleet.alive()} == {1}
    assert {node.decision for node in fleet.alive()} == {Wait("training")}
    assert bucket.keys(LOBBY) == []
    assert len(fleet.records()) == 1


def test_the_proposer_holds_the_store_of_its_generation(fleet: Fleet) -> None:
    """The store that a GENERATION names was bound before, by the proposer alone."""
    generation = fleet.form("a", "b")
    assert {number: store.port for number, store in fleet.nodes["a"].appender.stores.items()} == {
        1: generation.store_port
    }
    assert fleet.nodes["b"].appender.stores == {}
    assert generation.slots == slots_per_member(generation.members, LIMITS.slots)


def test_nodes_have_the_join_window_from_when_they_take_part(fleet: Fleet) -> None:
    """How long a node took to get ready does not shorten the time in which it waits for others to arrive."""
    fleet.start("a")
    fleet.now_s += 10.0
    fleet.nodes["a"].begin(fleet.nodes["a"].member)
    fleet.pass_time(LIMITS.elastic.join_window_s - 2 * TICK_S)
    assert fleet.log.generation is None
    fleet.start("b")
    fleet.nodes["b"].begin(fleet.nodes["b"].member)
    fleet.pass_time(LIMITS.elastic.join_window_s + 1.0)
    assert names(fleet.log.generation) == ["a", "b"]


def test_a_loss_is_told_with_its_cause_and_its_times(fleet: Fleet) -> None:
    """The next generation says who was lost, how far the run had come and how long agreeing took."""
    fleet.form("a", "b", "c")
    fleet.nodes["c"].me.say(step=41)
    fleet.nodes["a"].me.say(step=40)
    fleet.pass_time(1.0)
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["b", "c"]
    assert generation.reason == "lost a"
    assert generation.frontier_step == 41
    assert generation.agree_s == pytest.approx(TICK_S), "one more round of questions"


def test_a_generation_that_is_given_up_stays_given_up(fleet: Fleet) -> None:
    """Once a node has found a generation broken there is no way back, even if the lost member answers again."""
    fleet.limits = changed(LIMITS, nodes_min=2)
    fleet.form("a", "b")
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 2 * TICK_S)
    assert {node.broken for node in fleet.alive()} == {1}
    assert {node.me.now.broken for node in fleet.alive()} == {1}
    assert fleet.log.generation_number == 1
    fleet.cut = set()
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, names(generation)) == (2, ["a", "b"])
    assert {cause.kind for cause in generation.causes} == {CauseKind.GAVE_UP}


def test_peers_are_asked_once_when_a_world_hangs_on_it(fleet: Fleet) -> None:
    """When trouble is noticed all peers are asked at once, and not again until there is other trouble."""
    fleet.form("a", "b", "c")
    b = fleet.nodes["b"]
    assert not b.wants_answers()
    b.table.refused("a1")
    b.turn()
    assert b.wants_answers()
    assert not b.wants_answers()


def test_answers_are_a_reason_to_think_again_while_they_are_awaited(fleet: Fleet) -> None:
    """A message without news makes a turn exactly while this node waits whether its sender can go on."""
    fleet.form("a", "b", "c")
    a, c = fleet.nodes["a"], fleet.nodes["c"]
    assert not a.received(c.message_to("a1", asks=False))
    fleet.now_s += TICK_S
    a.table.refused("b1")
    a.turn()
    assert isinstance(a.decision, Wait)
    assert a.decision.reason.startswith("asking whether c can go on")
    assert a.received(c.message_to("a1", asks=False))


def test_a_node_hears_nothing_of_itself(fleet: Fleet) -> None:
    """What comes back from its own port, which an earlier life of another node had, makes no peer."""
    fleet.start("a")
    a = fleet.nodes["a"]
    assert not a.received(a.message_to("a1", asks=True))
    assert a.table.peers == {}


def test_a_checkpoint_that_is_committed_meanwhile_is_not_thrown_away(fleet: Fleet) -> None:
    """A generation that would resume from an older checkpoint than the newest commit loses and is proposed again."""
    newest = Checkpoint(30, 1, "ckpt/30", 1, "0" * 64, None)
    fleet.form("a", "b")
    writer = RunLog(fleet.bucket, writer="b")
    writer.refresh()
    committed: list[Checkpoint] = []

    def choose_resume(view: RunView) -> Checkpoint | None:
        chosen = view.checkpoints[0] if view.checkpoints else None
        if not committed:
            committed.append(newest)
            writer.append(lambda _: Commit((newest,), "history"), generation=1)
        return chosen

    fleet.choose_resume = choose_resume
    fleet.dead.add("b")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, generation.resume) == (2, newest)


def test_a_lost_race_is_no_trouble(fleet: Fleet) -> None:
    """Who proposes a number that is taken reads the winner and obeys it."""
    fleet.form("a", "b")
    rival = dataclasses.replace(fleet.log.generations[-1], number=2, reason="rival")

    def choose_resume(_: RunView) -> None:
        fleet.choose_resume = lambda _: None
        RunLog(fleet.bucket, writer="rival").append(lambda _: rival, generation=1)

    fleet.choose_resume = choose_resume
    fleet.spend(1, "b", failure=failed("b"))
    fleet.pass_time(2 * TICK_S)
    assert fleet.log.generations[-1].reason == "rival"
    assert [each.number for each in fleet.log.generations] == [2]
    assert 2 not in fleet.nodes["a"].appender.stores


def test_a_proposal_whose_answer_was_lost_stands(fleet: Fleet, bucket: WatchedStore) -> None:
    """A record that was created although nobody heard so is this node's own: it keeps the store it bound for it."""
    fleet.form("a", "b")
    fleet.dead.add("b")
    bucket.deaf_to = "create"
    with pytest.raises(StoreError):
        fleet.pass_time(1.0)
    bucket.deaf_to = ""
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, names(generation)) == (2, ["a"])
    assert fleet.nodes["a"].appender.stores[2].port == generation.store_port
    assert fleet.bound == 2


def test_the_card_of_a_node_that_died_waiting_is_removed(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A waiting node whose address refuses is struck from the lobby by who finds that out."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.start("a", "b")
    fleet.pass_time(1.0)
    assert len(bucket.keys(LOBBY)) == 2
    fleet.dead.add("b")
    fleet.pass_time(2.0)
    assert [key for key in bucket.keys(LOBBY) if "b1" in key] == []
    assert len(bucket.keys(LOBBY)) == 1


# ---- who comes and goes ------------------------------------------------------------------------------


def test_a_newcomer_is_drained_for_and_taken_in(fleet: Fleet) -> None:
    """A node that comes later is asked back by the members; the first of them asks for a drain until it is done."""
    fleet.form("a", "b")
    fleet.start("c")
    fleet.pass_time(LIMITS.elastic.join_window_s + 6 * TICK_S)
    assert set(fleet.drains) == {"c joins"}
    assert len(fleet.drains) > 1
    assert isinstance(fleet.nodes["a"].decision, Drain)
    assert "c1" in [each.incarnation for each in fleet.nodes["b"].contacts.targets]
    fleet.spend(1, "a", "b")
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["a", "b", "c"]


def test_a_newcomer_that_blinks_is_not_waited_for_again(fleet: Fleet) -> None:
    """The join window is for further nodes: one that was there before and misses a few answers does not start it again."""
    fleet.form("a")
    fleet.start("b")
    fleet.pass_time(4 * TICK_S)
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(
        SPARE_SILENCE_SHARE * LIMITS.elastic.heartbeat_timeout_s + LIMITS.elastic.join_window_s
    )
    assert fleet.nodes["a"].decision == Wait("training")
    fleet.cut = set()
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].decision == Drain("b joins")


def test_who_leaves_says_so_and_is_left_out(fleet: Fleet) -> None:
    """A node that wants to go is drained for, and the next generation tells that it left."""
    fleet.form("a", "b")
    fleet.nodes["b"].me.leaving = True
    fleet.pass_time(1.0)
    assert set(fleet.drains) == {"b leaves"}
    fleet.spend(1, "a", "b")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["a"]
    assert [(each.kind, each.node) for each in generation.causes] == [(CauseKind.LEFT, "b")]


def test_a_node_that_differs_is_refused_by_the_members(fleet: Fleet) -> None:
    """A newcomer with another fingerprint hears from a member which field differs and both values; others are not told so."""
    fleet.start("a", "b", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(4.0)
    fleet.run()
    fleet.start("c", fingerprint={"code": "1", "torch": "2.14"})
    fleet.start("d", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(3 * TICK_S)
    assert isinstance(fleet.nodes["c"].refusal, ConfigError)
    assert str(fleet.nodes["c"].refusal).endswith(
        "does not take this node in: torch = '2.14', where the run has '2.13'"
    )
    assert all(fleet.nodes[name].refusal is None for name in "abd")


def test_of_nodes_that_differ_the_first_stays(fleet: Fleet) -> None:
    """Before there is a world, the node that comes first by name refuses the other one."""
    fleet.start("b", fingerprint={"code": "2"})
    fleet.start("a", fingerprint={"code": "1"})
    fleet.pass_time(LIMITS.elastic.join_window_s)
    assert fleet.log.generation is None
    assert fleet.nodes["a"].refusal is None
    assert "a does not take this node in: code = '2', where the run has '1'" in str(
        fleet.nodes["b"].refusal
    )


def test_only_members_refuse_once_there_is_a_world(fleet: Fleet) -> None:
    """Two nodes that wait outside do not send each other away: it is not their world."""
    fleet.form("m")
    fleet.start("a", fingerprint={"code": "1"})
    fleet.start("b", fingerprint={"code": "2"})
    a, b = fleet.nodes["a"], fleet.nodes["b"]
    a.received(b.message_to("a1", asks=True))
    assert a.message_to("b1", asks=False).refusal == ""
    fleet.nodes["m"].received(b.message_to("m1", asks=True))
    m = fleet.nodes["m"]
    assert m.message_to("b1", asks=False).refusal != ""
    # Who still has workers is no newcomer, and who is in the log's newest generation is no stranger.
    m.received(Message(99, 0, True, status("b", fingerprint={"code": "2"})))
    assert m.message_to("b1", asks=False).refusal == ""
    m.received(Message(99, 0, True, waiting("m2", fingerprint={"code": "2"})))
    world = dataclasses.replace(
        fleet.log.generations[-1], number=2, members=(member("m"), member("m2"))
    )
    RunLog(fleet.bucket, writer="m").append(lambda _: world, generation=1)
    assert m.message_to("m21", asks=False).refusal != ""
    m.log.refresh()
    assert m.message_to("m21", asks=False).refusal == ""


def test_strangers_that_went_away_are_forgotten(fleet: Fleet) -> None:
    """A spare that is gone is asked no more, while members are remembered whatever becomes of them."""
    fleet.limits = changed(LIMITS, nodes_max=2)
    fleet.form("a", "b")
    fleet.start("c")
    fleet.pass_time(1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1", "c1"}
    fleet.cut = {frozenset("ac"), frozenset("bc")}
    fleet.pass_time(4 * LIMITS.elastic.heartbeat_timeout_s + 1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1"}
    assert [each.node for each in fleet.nodes["a"].contacts.targets] == ["b"]


def test_who_cannot_be_reached_is_told_to_the_others(fleet: Fleet) -> None:
    """A node says which of those it asks are silent, and takes it back when they answer."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.form("a", "b", "c")
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + TICK_S)
    assert fleet.nodes["a"].me.now.unreachable == ("b1",)
    assert fleet.nodes["c"].me.now.unreachable == ()
    fleet.cut = set()
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].me.now.unreachable == ()


def test_who_is_asked_for_the_first_time_is_given_its_time(fleet: Fleet) -> None:
    """A stranger that was heard long ago, and begins to wait now, is not unreachable before it could answer."""
    fleet.form("a")
    a = fleet.nodes["a"]
    a.received(Message(1, 0, True, status("z")))
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 1.0)
    a.received(Message(2, 0, True, waiting("z")))
    a.turn()
    assert [each.node for each in a.contacts.targets] == ["z"]
    assert a.me.now.unreachable == ()
