"""Which members copy the state of which other members: a pure choice, anew for each generation.

    zones of the members, copies, across zones? ─► mirrored_by ─► GENERATION ─► the same ring on all nodes

Within zones (the default: clouds bill traffic between zones) the members of a zone form a ring in rank order. Each is
copied by the ones before it. A member that is alone in its zone has no copy.

Across zones, each member is copied in as many other zones as possible, as long as no member copies more than
`copies` + 1 others. So a zone may be lost, unless it has more than two thirds of the members.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

Mirrors = tuple[tuple[int, ...], ...]
"""For each member, by rank: the members that copy its state."""


def mirrored_by(zones: Sequence[str], copies: int, *, across_zones: bool) -> Mirrors:
    """The mirrors of each member, by the members' zones in rank order. No member is its own mirror, or one twice."""
    if across_zones and len(set(zones)) > 1:
        return _across(zones, copies)
    found: list[tuple[int, ...]] = [()] * len(zones)
    for ring in _members_by_zone(zones).values():
        for place, index in enumerate(ring):
            distances = range(1, min(copies, len(ring) - 1) + 1)
            found[index] = tuple(ring[(place - distance) % len(ring)] for distance in distances)
    return tuple(found)


def _across(zones: Sequence[str], copies: int) -> Mirrors:
    """Give each member one mirror after the other: in a zone that has none of it yet, by the member with the least work.

    Members of the largest zone choose first: they have the fewest members of other zones.
    """
    by_zone = _members_by_zone(zones)
    work = {zone: [(0, index) for index in members] for zone, members in by_zone.items()}
    """For each zone, its members with the number of members that each copies, sorted."""
    order = sorted(range(len(zones)), key=lambda each: (-len(by_zone[zones[each]]), each))
    found: list[list[int]] = [[] for _ in zones]
    for taken in range(min(copies, len(zones) - 1)):
        for index in order:
            used = {zones[each] for each in found[index]}
            offers = []
            for zone, members in work.items():
                free = (each for each in members if each[1] not in (index, *found[index]))
                for load, mirror in islice(free, 1):
                    full = load >= taken + 2
                    offers.append((full, zone == zones[index], zone in used, load, mirror))
            *_, load, mirror = min(offers)
            work[zones[mirror]].remove((load, mirror))
            insort(work[zones[mirror]], (load + 1, mirror))
            found[index].append(mirror)
    return tuple(map(tuple, found))


def _members_by_zone(zones: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, zone in enumerate(zones):
        found[zone].append(index)
    return found
