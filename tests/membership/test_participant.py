"""One node's part in forming generations, with a real log and lobby in a directory."""

import dataclasses
from collections.abc import Callable

import pytest

from elastic_pt.errors import ConfigError, StoreError
from elastic_pt.membership.decision.admission import SPARE_SILENCE_SHARE, slots_per_member
from elastic_pt.membership.decision.decide import Drain, Wait
from elastic_pt.membership.lobby import LOBBY
from elastic_pt.membership.peers import Message
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    Body,
    CauseKind,
    Checkpoint,
    Commit,
)
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, changed, failed, member, status, waiting

# ---- forming -----------------------------------------------------------------------------------------


def test_nodes_find_each_other_in_the_lobby(fleet: Fleet, bucket: WatchedStore) -> None:
    """Nodes that start together form one generation. All read it, and no card is left."""
    generation = fleet.form("c", "a", "b")
    assert (generation.number, names(generation)) == (1, ["a", "b", "c"])
    assert {node.me.now.generation for node in fleet.alive()} == {1}
    assert {node.decision for node in fleet.alive()} == {Wait("training")}
    assert bucket.keys(LOBBY) == []
    assert len(fleet.records()) == 1


def test_the_proposer_holds_the_store_of_its_generation(fleet: Fleet) -> None:
    """Only the proposer binds a store, before the GENERATION names it."""
    generation = fleet.form("a", "b")
    assert {number: store.port for number, store in fleet.nodes["a"].appender.stores.items()} == {
        1: generation.store_port
    }
    assert fleet.nodes["b"].appender.stores == {}
    assert generation.slots == slots_per_member(generation.members, LIMITS.slots)


def test_join_window_starts_when_a_node_takes_part(fleet: Fleet) -> None:
    """The time that a node takes to start does not shorten the join window."""
    fleet.start("a")
    fleet.now_s += 10.0
    fleet.nodes["a"].begin(fleet.nodes["a"].member)
    fleet.pass_time(LIMITS.elastic.join_window_s - 2 * TICK_S)
    assert fleet.log.generation is None
    fleet.start("b")
    fleet.nodes["b"].begin(fleet.nodes["b"].member)
    fleet.pass_time(LIMITS.elastic.join_window_s + 1.0)
    assert names(fleet.log.generation) == ["a", "b"]


def test_loss_is_recorded_with_cause_and_times(fleet: Fleet) -> None:
    """The next generation records the lost node, the frontier and the time to agree."""
    fleet.form("a", "b", "c")
    fleet.step(41, "c")
    fleet.step(40, "a")
    fleet.pass_time(1.0)
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["b", "c"]
    assert generation.reason == "lost a"
    assert generation.frontier_step == 41
    assert generation.agree_s == pytest.approx(TICK_S), "one more round of questions"


def test_the_time_to_agree_has_the_wait_for_a_bucket_that_is_away(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the record, whose time is that of its last attempt: the lost node did not live meanwhile."""
    fleet.form("a", "b", "c")
    fleet.pass_time(1.0)
    fleet.dead.add("a")
    append = RunLog.append

    def slow(self: RunLog, make: Callable[[RunView], Body], *, generation: int) -> RunView:
        fleet.now_s += 8.0
        return append(self, make, generation=generation)

    monkeypatch.setattr(RunLog, "append", slow)
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["b", "c"]
    assert generation.agree_s >= 8.0


def test_wait_for_enough_nodes_is_recorded(fleet: Fleet) -> None:
    """The next generation says how much of the time to agree was a wait for `elastic.nodes_min` nodes."""
    fleet.limits = changed(LIMITS, nodes_min=2)
    fleet.form("a", "b")
    fleet.dead.add("b")
    fleet.spend(1, "a")
    fleet.pass_time(30.0)
    assert fleet.log.generation_number == 1
    fleet.start("c")
    fleet.pass_time(3.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["a", "c"]
    assert generation.below_minimum_s == pytest.approx(30.0, abs=3 * TICK_S)
    assert generation.below_minimum_s <= generation.agree_s < 34.0
    fleet.run()
    fleet.start("d")
    fleet.dead.add("c")
    fleet.spend(2, "a")
    fleet.pass_time(3.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["a", "d"]
    assert generation.below_minimum_s < 3 * TICK_S, "until d is known"


def test_a_broken_generation_stays_broken(fleet: Fleet) -> None:
    """If a node has found a generation broken, it stays broken, even if the lost member answers again."""
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


def test_peers_are_asked_once_per_failure(fleet: Fleet) -> None:
    """When a failure is detected all peers are asked at once, and not again until the next failure."""
    fleet.form("a", "b", "c")
    b = fleet.nodes["b"]
    assert not b.wants_answers()
    b.table.refused("a1")
    b.turn()
    assert b.wants_answers()
    assert not b.wants_answers()


def test_awaited_answer_starts_a_turn(fleet: Fleet) -> None:
    """A message without news starts a turn only while this node waits for answers."""
    fleet.form("a", "b", "c")
    a, c = fleet.nodes["a"], fleet.nodes["c"]
    assert not a.received(c.message_to("a1", asks=False))
    fleet.now_s += TICK_S
    a.table.refused("b1")
    a.turn()
    assert isinstance(a.decision, Wait)
    assert a.decision.reason.startswith("asking whether c can continue")
    assert a.received(c.message_to("a1", asks=False))


def test_messages_from_itself_are_ignored(fleet: Fleet) -> None:
    """If another node had this node's port before, this node may connect to itself. It does not become its own peer."""
    fleet.start("a")
    a = fleet.nodes["a"]
    assert not a.received(a.message_to("a1", asks=True))
    assert a.table.peers == {}


def test_checkpoint_committed_during_a_proposal_is_used(fleet: Fleet) -> None:
    """A proposal with an older checkpoint than the newest commit is not appended. The node proposes again."""
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


def test_proposer_that_loses_the_race_follows_the_winner(fleet: Fleet) -> None:
    """If the proposed number is taken, the node reads the winner's record and follows it."""
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


def test_proposal_whose_answer_was_lost_counts(fleet: Fleet, bucket: WatchedStore) -> None:
    """If the answer to a create was lost but the record is this node's own, the node keeps its bound store."""
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
    """If a waiting node's address refuses, the node that detects it deletes its card."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.start("a", "b")
    fleet.pass_time(1.0)
    assert len(bucket.keys(LOBBY)) == 2
    fleet.dead.add("b")
    fleet.pass_time(2.0)
    assert [key for key in bucket.keys(LOBBY) if "b1" in key] == []
    assert len(bucket.keys(LOBBY)) == 1


# ---- joining, leaving -------------------------------------------------------------------------------


def test_a_newcomer_joins_after_the_leader_asks_for_a_drain(fleet: Fleet) -> None:
    """Members ask a newcomer too. The proposer asks for a drain in each turn until it is done."""
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


def test_newcomer_with_missed_answers_does_not_restart_the_join_window(fleet: Fleet) -> None:
    """Only new nodes restart the join window. A node that was there before and misses some answers does not."""
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


def test_leaving_node_is_drained_and_left_out(fleet: Fleet) -> None:
    """A node that wants to leave causes a drain, and the next generation records that it left."""
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
    """A newcomer with another fingerprint gets the field that differs and both values. An equal one is not refused."""
    fleet.start("a", "b", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(4.0)
    fleet.run()
    fleet.start("c", fingerprint={"code": "1", "torch": "2.14"})
    fleet.start("d", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(3 * TICK_S)
    assert isinstance(fleet.nodes["c"].refusal, ConfigError)
    assert str(fleet.nodes["c"].refusal).endswith(
        "refuses this node: torch = '2.14', where the run has '2.13'; "
        "expected the same on all nodes (docs/upgrading.md)"
    )
    assert all(fleet.nodes[name].refusal is None for name in "abd")


def test_before_the_first_generation_the_first_node_refuses(fleet: Fleet) -> None:
    """Before the first generation, the first node by name refuses the other one."""
    fleet.start("b", fingerprint={"code": "2"})
    fleet.start("a", fingerprint={"code": "1"})
    fleet.pass_time(LIMITS.elastic.join_window_s)
    assert fleet.log.generation is None
    assert fleet.nodes["a"].refusal is None
    assert "a refuses this node: code = '2', where the run has '1'" in str(fleet.nodes["b"].refusal)


def test_only_members_refuse_after_the_first_generation(fleet: Fleet) -> None:
    """Two nodes that wait outside do not refuse each other: only members may."""
    fleet.form("m")
    fleet.start("a", fingerprint={"code": "1"})
    fleet.start("b", fingerprint={"code": "2"})
    a, b = fleet.nodes["a"], fleet.nodes["b"]
    a.received(b.message_to("a1", asks=True))
    assert a.message_to("b1", asks=False).refusal == ""
    fleet.nodes["m"].received(b.message_to("m1", asks=True))
    m = fleet.nodes["m"]
    assert m.message_to("b1", asks=False).refusal != ""
    # A node that still has workers is not a newcomer. A member of the log's newest generation is not one either.
    m.received(Message(99, 0, True, status("b", fingerprint={"code": "2"})))
    assert m.message_to("b1", asks=False).refusal == ""
    m.received(Message(99, 0, True, waiting("m2", fingerprint={"code": "2"})))
    world = dataclasses.replace(
        fleet.log.generations[-1], number=2, members=(member("m"), member("m2")), slots=(4, 4)
    )
    RunLog(fleet.bucket, writer="m").append(lambda _: world, generation=1)
    assert m.message_to("m21", asks=False).refusal != ""
    m.log.refresh()
    assert m.message_to("m21", asks=False).refusal == ""


def test_spares_that_are_gone_are_forgotten(fleet: Fleet) -> None:
    """A spare that is gone is no longer asked. Members are kept, even if they are gone."""
    fleet.limits = changed(LIMITS, nodes_max=2)
    fleet.form("a", "b")
    fleet.start("c")
    fleet.pass_time(1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1", "c1"}
    fleet.cut = {frozenset("ac"), frozenset("bc")}
    fleet.pass_time(4 * LIMITS.elastic.heartbeat_timeout_s + 1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1"}
    assert [each.node for each in fleet.nodes["a"].contacts.targets] == ["b"]


def test_unreachable_peers_are_reported(fleet: Fleet) -> None:
    """A node reports its silent targets, and stops reporting them when they answer."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.form("a", "b", "c")
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + TICK_S)
    assert fleet.nodes["a"].me.now.unreachable == ("b1",)
    assert fleet.nodes["c"].me.now.unreachable == ()
    fleet.cut = set()
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].me.now.unreachable == ()


def test_new_target_is_not_unreachable_at_once(fleet: Fleet) -> None:
    """A node with an old proof of life that starts to wait now gets the full timeout."""
    fleet.form("a")
    a = fleet.nodes["a"]
    a.received(Message(1, 0, True, status("z")))
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 1.0)
    a.received(Message(2, 0, True, waiting("z")))
    a.turn()
    assert [each.node for each in a.contacts.targets] == ["z"]
    assert a.me.now.unreachable == ()
