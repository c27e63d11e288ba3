"""Hundreds of simulated agents go through losses and joins in seconds. `make scale` does it with a thousand."""

import pytest

from tests.sim.scale import Fleet, cases

NODES = 520
"""More than 512: only in such a world do messages become rarer."""

START, TENTH, JOIN = (
    "all nodes start",
    "a tenth falls silent",
    "a fifth more nodes join",
)
REQUESTS_AT_REST_MAX = 3.0


@pytest.mark.timeout(900)
def test_a_large_fleet_forms_a_new_world_within_seconds() -> None:
    """The loss of a tenth, and 104 newcomers, each cost a large fleet one new generation and less than 3 s."""
    chosen = tuple(case for case in cases(NODES) if case.name in (START, TENTH, JOIN))
    measured = {each.name: each for each in Fleet(NODES).measure(chosen)}
    assert {name: each.members for name, each in measured.items()} == {
        START: 520,
        TENTH: 468,
        JOIN: 572,
    }
    assert {each.generations for each in measured.values()} == {1}
    late = [case.name for case in chosen if measured[case.name].known_s > case.limit_s]
    assert not late, {name: measured[name].known_s for name in late}
    at_rest = {name: each.rest_requests for name, each in measured.items()}
    assert max(at_rest.values()) <= REQUESTS_AT_REST_MAX, at_rest
