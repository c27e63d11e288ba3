"""Which members copy the state of which others."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.membership.decision.mirrors import mirrored_by
from tests.membership.fleet import Fleet

ZONES = st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=12)
COPIES = st.integers(0, 4)


def load_of(ring: tuple[tuple[int, ...], ...]) -> Counter[int]:
    """How many members each member copies."""
    return Counter(index for mirrors in ring for index in mirrors)


def test_every_node_has_its_mirrors_on_other_nodes() -> None:
    """In the ring, the nodes before a node copy it. A node never copies itself, and never copies a node twice."""
    for nodes in range(1, 9):
        for copies in range(4):
            ring = mirrored_by([""] * nodes, copies, across_zones=False)
            assert all(len(set(mirrors)) == min(copies, nodes - 1) for mirrors in ring)
            assert all(index not in mirrors for index, mirrors in enumerate(ring))
            work = [index for mirrors in ring for index in mirrors]
            assert len({work.count(index) for index in range(nodes)}) == 1


@given(ZONES, COPIES)
def test_within_zones_no_byte_crosses_a_zone(zones: list[str], copies: int) -> None:
    """Clouds bill traffic between zones. The others of a zone copy a member, all equally many; alone it has no copy."""
    ring = mirrored_by(zones, copies, across_zones=False)
    load = load_of(ring)
    for index, mirrors in enumerate(ring):
        expected = min(copies, zones.count(zones[index]) - 1)
        assert len(set(mirrors)) == len(mirrors) == load[index] == expected
        assert index not in mirrors
        assert all(zones[each] == zones[index] for each in mirrors)


@given(ZONES, COPIES)
def test_across_zones_every_member_has_all_its_copies(zones: list[str], copies: int) -> None:
    """Losing nodes, but no node together with all its mirrors, leaves every row: the mirrors are other members."""
    ring = mirrored_by(zones, copies, across_zones=True)
    assert all(len(set(each)) == len(each) == min(copies, len(zones) - 1) for each in ring)
    assert all(index not in mirrors for index, mirrors in enumerate(ring))
    assert ring == mirrored_by(list(zones), copies, across_zones=True)


@given(ZONES, COPIES)
def test_across_zones_no_member_copies_many(zones: list[str], copies: int) -> None:
    """Memory is bounded: a member copies at most one more than it has copies itself."""
    load = load_of(mirrored_by(zones, copies, across_zones=True))
    assert max(load.values(), default=0) <= copies + 1


@given(ZONES)
def test_a_zone_may_be_lost(zones: list[str]) -> None:
    """With one copy, each member is copied in another zone, if the others have room for two members each."""
    ring = mirrored_by(zones, 1, across_zones=True)
    largest = max(zones.count(zone) for zone in zones)
    same = [index for index, each in enumerate(ring) if each and zones[each[0]] == zones[index]]
    if len(set(zones)) > 1:
        assert len(same) == max(0, largest - 2 * (len(zones) - largest))


@pytest.mark.parametrize(
    ("zones", "expected"),
    [
        ("aab", ((2,), (2,), (0,))),
        ("aabb", ((2,), (3,), (0,), (1,))),
        ("abab", ((1,), (0,), (3,), (2,))),
    ],
)
def test_small_fleets(zones: str, expected: tuple[tuple[int, ...], ...]) -> None:
    """Two zones copy each other, whatever the order of ranks."""
    assert mirrored_by(list(zones), 1, across_zones=True) == expected


def test_two_copies_are_in_two_other_zones() -> None:
    """Where there are three zones, two of them may be lost with two copies."""
    zones = list("abcabcabc")
    for index, mirrors in enumerate(mirrored_by(zones, 2, across_zones=True)):
        assert len({zones[index], *(zones[each] for each in mirrors)}) == 3


def test_a_node_knows_that_all_its_mirrors_leave(fleet: Fleet) -> None:
    """M3: with its mirrors that leave, no member that stays holds its rows. One that stays is enough."""
    fleet.choose_mirrors = dict.fromkeys("abc", lambda _: ((1, 2), (2, 0), (0, 1)))
    fleet.form("a", "b", "c")
    for node, leave in (("b", False), ("c", True)):
        assert not fleet.nodes["a"].known.mirrors_leave()
        fleet.nodes[node].me.leaving = True
        fleet.pass_time(1.0)
        assert fleet.nodes["a"].known.mirrors_leave() == leave
    assert not fleet.nodes["b"].known.mirrors_leave(), "a stays"
