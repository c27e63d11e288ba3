"""Nodes that arrive: for which of them the others wait, and what happens to the cards of dead nodes."""

import dataclasses
import functools

import pytest

from elastic_pt.membership.decision.mirrors import mirrored_by
from elastic_pt.membership.decision.status import MESH_NODES_MAX
from elastic_pt.membership.lobby import LOBBY, card_key, members_in
from elastic_pt.runlog.records import Member
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, changed

ROOMY = changed(LIMITS, nodes_max=64, slots=None)
CROWD = [f"c{number:02}" for number in range(MESH_NODES_MAX)]


# ---- the join window ---------------------------------------------------------------------------------


def form_with_code_1(fleet: Fleet) -> None:
    """A generation of member a, with room for many."""
    fleet.limits = ROOMY
    fleet.start("a", fingerprint={"code": "1"})
    fleet.pass_time(2 * LIMITS.elastic.join_window_s)
    fleet.run()


def come_one_by_one(fleet: Fleet, *, code: str, reachable: bool = True) -> None:
    """For longer than the join window, a newcomer sends a message to member a every tick."""
    a = fleet.nodes["a"]
    for number in range(round(2 * LIMITS.elastic.join_window_s / TICK_S)):
        name = f"z{number:02}"
        fleet.start(name, fingerprint={"code": code})
        if not reachable:
            fleet.off.add(name)
        a.received(fleet.nodes[name].message_to(a.member.incarnation, asks=True))
        fleet.pass_time(TICK_S)


@pytest.mark.parametrize(
    ("code", "reachable"), [("2", True), ("1", False)], ids=["other code", "unreachable"]
)
def test_unfit_newcomers_do_not_extend_the_join_window(
    fleet: Fleet, code: str, reachable: bool
) -> None:
    """While nodes with other code, or with an address that does not work, keep arriving, the others join in time."""
    form_with_code_1(fleet)
    fleet.start("b", fingerprint={"code": "1"})
    come_one_by_one(fleet, code=code, reachable=reachable)
    assert set(fleet.drains) == {"b joins"}


def test_each_fit_newcomer_extends_the_join_window(fleet: Fleet) -> None:
    """Each node that may join extends the join window, so that all join in one change."""
    form_with_code_1(fleet)
    come_one_by_one(fleet, code="1")
    assert fleet.drains == []
    fleet.pass_time(LIMITS.elastic.join_window_s + 2 * TICK_S)
    everyone = [f"{name} joins" for name in fleet.nodes if name != "a"]
    assert set(fleet.drains) == {"; ".join(everyone)}


def test_all_nodes_have_the_mirrors_that_the_proposer_chose(fleet: Fleet) -> None:
    """Nodes with other values of `checkpoint.mirror_zones` must not wait for each other's copies. The record decides."""
    fleet.limits = changed(LIMITS, nodes_min=4)
    fleet.zones = {"a": "x", "b": "x", "c": "y", "d": "y"}
    fleet.choose_mirrors = {
        name: functools.partial(mirrored_by, copies=1, across_zones=name in "ab") for name in "abcd"
    }
    fleet.start("a", "b", "c", "d")
    fleet.pass_time(2.0)
    for node in fleet.alive():
        generation = node.log.view.generation
        assert generation is not None
        zones = [each.zone for each in generation.members]
        assert zones == ["x", "x", "y", "y"]
        assert all(
            zones[mirror] != zones[rank]
            for rank in range(4)
            for mirror in generation.mirrors_of(rank)
        )
        assert generation.mirrors == ((2,), (3,), (0,), (1,))


# ---- the lobby ---------------------------------------------------------------------------------------


def test_the_card_of_a_node_that_fell_silent_while_it_waited_is_removed(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """If a waiting node's machine is gone, its card is removed, although its address does not refuse."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.start("a", "b")
    fleet.pass_time(1.0)
    card = card_key(fleet.nodes["b"].member)
    fleet.off.add("b")
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s)
    assert card in bucket.keys(LOBBY), "it may only have paused"
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 1.0)
    assert bucket.keys(LOBBY) == [card_key(fleet.nodes["a"].member)]


def test_cards_of_dead_nodes_do_not_hide_waiting_nodes(fleet: Fleet, bucket: WatchedStore) -> None:
    """Nodes that start with a lobby full of dead nodes' cards find each other."""
    fleet.limits = changed(ROOMY, nodes_min=2)
    fleet.start(*CROWD)
    fleet.pass_time(2 * TICK_S)
    fleet.off = set(CROWD)
    assert len(bucket.keys(LOBBY)) == MESH_NODES_MAX
    fleet.start("y", "z")
    fleet.pass_time(3 * LIMITS.elastic.heartbeat_timeout_s + LIMITS.elastic.join_window_s)
    assert names(fleet.log.generation) == ["y", "z"]


def test_card_has_the_zone_and_cards_without_one_are_read() -> None:
    """Nodes of an earlier version write cards without a zone, and read no others."""
    here = Member("a", "a1", "10.0.0.1", 4000, 17, 2)
    there = dataclasses.replace(here, zone="eu/1!a")
    assert card_key(here) == "lobby/a!a1!10.0.0.1!4000!17!2"
    assert members_in([card_key(here), card_key(there)]) == [here, there]
