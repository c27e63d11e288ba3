"""Generations of more than MESH_NODES_MAX nodes, in which two leaders watch all members."""

import dataclasses
import math

import pytest

from elastic_pt.membership.decision.admission import SPARE_SILENCE_SHARE, newcomers
from elastic_pt.membership.decision.assessment import assess
from elastic_pt.membership.decision.status import MESH_NODES_MAX
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, NOW_S, changed, generation, member, peer, status, waiting

LARGE = [f"n{number:02}" for number in range(MESH_NODES_MAX + 1)]


def large_world(fleet: Fleet, *started: str) -> None:
    """A generation of more than MESH_NODES_MAX nodes, of which some are started."""
    fleet.limits = changed(LIMITS, nodes_max=64, slots=None)
    world = Generation(1, tuple(map(member, LARGE)), (), "127.0.0.1", 1, None, "started")
    RunLog(fleet.bucket, writer="x").append(lambda _: world, generation=0)
    fleet.start(*started)
    for node in fleet.alive():
        node.turn()


def test_leaders_of_a_large_fleet_watch_all_members(fleet: Fleet) -> None:
    """A leader detects a member that has never sent a message. Other members watch the leaders only."""
    large_world(fleet, "n00", "n01", "n02")
    everyone = {member(name).incarnation for name in LARGE}
    assert set(fleet.nodes["n00"].table.peers) == everyone - {"n001"}
    assert set(fleet.nodes["n01"].table.peers) == everyone - {"n011"}
    assert set(fleet.nodes["n02"].table.peers) == {"n001", "n011"}
    for _ in range(round(LIMITS.elastic.heartbeat_timeout_s / TICK_S) + 1):
        fleet.now_s += TICK_S
        fleet.talk()
        fleet.nodes["n01"].turn()
    assert fleet.nodes["n01"].broken == 1


@pytest.mark.parametrize("gone", [["n00"], ["n00", "n01"], ["n07", "n20"]])
@pytest.mark.parametrize("silent", [True, False])
def test_a_large_fleet_replaces_any_lost_member_once(
    fleet: Fleet, gone: list[str], silent: bool
) -> None:
    """If any member is gone, refusing or silent, the others form one generation without it, once."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.pass_time(1.0)
    if silent:
        fleet.off = set(gone)
    else:
        fleet.dead = set(gone)
    alive = [name for name in LARGE if name not in gone]
    # The loss of two leaders in a row may take two timeouts, because members ask no other node.
    for _ in range(round(2 * LIMITS.elastic.heartbeat_timeout_s / TICK_S) + 5):
        fleet.pass_time(TICK_S)
        if fleet.log.generation_number > 1:
            break
    assert names(fleet.log.generation) == alive
    fleet.run()
    fleet.pass_time(2 * LIMITS.elastic.heartbeat_timeout_s)
    assert fleet.log.generation_number == 2


def test_leader_probes_a_member_that_closed_its_connection(fleet: Fleet) -> None:
    """A leader connects to the member, to detect before the silence timeout whether it is gone."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.pass_time(1.0)
    n00 = fleet.nodes["n00"]
    asked = [each.node for each in n00.contacts.targets]
    n00.contacts.hung_up("n201")
    n00.turn()
    assert [each.node for each in n00.contacts.targets] == [*asked, "n20"]
    fleet.pass_time(2 * TICK_S)
    assert [each.node for each in n00.contacts.targets] == asked, "it has shown that it is alive"
    fleet.dead = {"n20"}
    n00.contacts.hung_up("n201")
    fleet.pass_time(4 * TICK_S)
    assert names(fleet.log.generation) == [name for name in LARGE if name != "n20"]
    assert fleet.log.generations[-1].causes[0].detail == "its address refuses connections"


def test_a_fleet_may_grow_large(fleet: Fleet) -> None:
    """When members stop asking each other because a node joins, members that are no longer asked are not silent."""
    fleet.limits = changed(LIMITS, nodes_max=64, slots=None)
    fleet.form(*LARGE[:-1])
    fleet.start(LARGE[-1])
    fleet.pass_time(LIMITS.elastic.join_window_s + 1.0)
    fleet.spend(1, *LARGE[:-1])
    fleet.pass_time(1.0)
    assert names(fleet.run()) == LARGE
    fleet.pass_time(2 * LIMITS.elastic.heartbeat_timeout_s)
    assert fleet.log.generation_number == 2
    assert {node.broken for node in fleet.alive()} == {0}


def speaks_to(fleet: Fleet, speaker: str, listener: str) -> None:
    """One message over a connection that the sender opened when it still asked the receiver."""
    other = fleet.nodes[listener]
    other.received(fleet.nodes[speaker].message_to(other.member.incarnation, asks=False))


def test_unanswered_question_before_a_fleet_grew_large_is_no_loss(fleet: Fleet) -> None:
    """A node that had not answered yet when this node stopped asking it is not lost."""
    fleet.limits = changed(LIMITS, nodes_min=len(LARGE), nodes_max=64, slots=None)
    fleet.cut = {frozenset(("n15", "n25"))}
    fleet.start(*LARGE[:-1])
    fleet.pass_time(2 * TICK_S)
    fleet.start(LARGE[-1])
    fleet.pass_time(1.0)
    fleet.cut = set()
    fleet.pass_time(2 * LIMITS.elastic.heartbeat_timeout_s)
    assert names(fleet.run()) == LARGE
    fleet.pass_time(2 * LIMITS.elastic.heartbeat_timeout_s)
    assert fleet.log.generation_number == 1
    assert {node.broken for node in fleet.alive()} == {0}


def test_only_leaders_probe(fleet: Fleet) -> None:
    """Two members that close their connections to each other do not probe each other repeatedly."""
    large_world(fleet, *LARGE)
    fleet.run()
    speaks_to(fleet, "n21", "n20")
    n20 = fleet.nodes["n20"]
    n20.contacts.hung_up("n211")
    n20.turn()
    assert [each.node for each in n20.contacts.targets] == ["n00", "n01"]


def test_losses_in_a_row_are_each_noticed_in_time(fleet: Fleet) -> None:
    """Members that fall silent after others were lost get no extra time."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.pass_time(1.0)
    fleet.off = {"n01", "n20"}
    fleet.pass_time(2 * TICK_S)
    fleet.off |= {"n03"}
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 3 * TICK_S)
    assert names(fleet.log.generation) == [name for name in LARGE if name not in fleet.off]


def test_members_of_former_generations_are_forgotten(fleet: Fleet) -> None:
    """Nodes that join and leave over months use no memory of the nodes that stay."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.pass_time(1.0)
    speaks_to(fleet, "n20", "n05")
    fleet.dead = {"n20"}
    fleet.nodes["n00"].contacts.hung_up("n201")
    fleet.pass_time(1.0)
    assert "n20" not in names(fleet.log.generation)
    assert "n201" in fleet.nodes["n05"].table.peers
    fleet.run()
    fleet.pass_time(5 * LIMITS.elastic.heartbeat_timeout_s)
    assert [node for node in fleet.alive() if "n201" in node.table.peers] == []


def test_newcomers_that_a_leader_asks_rarely_are_not_lost() -> None:
    """A newcomer joins although a leader asks it less often than the configured timeout."""
    large = [f"n{number:04}" for number in range(2400)]
    world, interval_s = generation(*large), LIMITS.interval_s(len(large))
    assert interval_s > LIMITS.elastic.heartbeat_timeout_s * SPARE_SILENCE_SHARE
    me, z = status("n0000"), waiting("z")
    asked = {"z1": peer(z, silent_s=interval_s)}
    assert newcomers(me, world, asked, LIMITS, NOW_S) == (z,)
    gone = {"z1": peer(z, silent_s=2 * interval_s)}
    assert newcomers(me, world, gone, LIMITS, NOW_S) == ()


def test_a_newcomer_keeps_asking_unreachable_leaders(
    fleet: Fleet,
) -> None:
    """A node that starts in a split network keeps asking the leaders."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.start("z")
    fleet.cut = {frozenset(("z", name)) for name in LARGE}
    fleet.pass_time(LIMITS.elastic.heartbeat_timeout_s + 1.0)
    fleet.cut = set()
    fleet.pass_time(LIMITS.elastic.join_window_s + 2.0)
    assert set(fleet.drains) == {"z joins"}


def test_old_status_of_an_unwatched_member_breaks_no_link() -> None:
    """An old report that a member could not reach another one does not break the current generation."""
    world = generation(*LARGE)
    complaint = status("n20", unreachable=(member("n21").incarnation,))
    for watched_since_s, broken in ((None, False), (NOW_S - 100, True)):
        speaker = dataclasses.replace(peer(complaint), watched_since_s=watched_since_s)
        found = assess(status("n05"), world, {"n201": speaker}, math.inf, LIMITS, NOW_S)
        assert found.broken is broken
