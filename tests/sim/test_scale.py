"""A scale model of hundreds of agents goes through losses and joins in seconds. `make scale` has a thousand agents."""

import pytest

from elastic_pt.membership.decision import status
from tests.sim.scale import Fleet, cases

TIMES = 8
"""Each node stands for so many: what an agent does for each node or message takes it as many times as long."""
NODES = 520 // TIMES
"""They stand for more than 512: only in such a world do messages become rarer."""

START, TENTH, JOIN = (
    "all nodes start",
    "a tenth falls silent",
    "a fifth more nodes join",
)
REQUESTS_AT_REST_MAX = 3.0


def test_a_large_fleet_forms_a_new_world_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a tenth, and a fifth more nodes, each cost a large fleet one new generation and less than 3 s."""
    monkeypatch.setattr(status, "_FULL_PACE_NODES", status._FULL_PACE_NODES // TIMES)
    chosen = tuple(case for case in cases(NODES) if case.name in (START, TENTH, JOIN))
    measured = {each.name: each for each in Fleet(NODES, times=TIMES).measure(chosen)}
    assert {name: each.members for name, each in measured.items()} == {
        START: 65,
        TENTH: 59,
        JOIN: 72,
    }
    assert {each.generations for each in measured.values()} == {1}
    late = [case.name for case in chosen if measured[case.name].known_s > case.limit_s]
    assert not late, {name: measured[name].known_s for name in late}
    at_rest = {name: each.rest_requests for name, each in measured.items()}
    assert max(at_rest.values()) <= REQUESTS_AT_REST_MAX, at_rest
