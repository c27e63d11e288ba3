"""What a campaign draws: the same for the same seed, and all kinds of faults in all phases."""

from itertools import islice

import pytest

from elastic_pt.chaos.campaign import STEPS, draw, pairs, seeds, why_not
from elastic_pt.chaos.kinds import KINDS
from elastic_pt.chaos.play import needs_of
from elastic_pt.chaos.scenario import Phase, Scenario, as_toml, read_scenario
from elastic_pt.errors import ConfigError

SEEDS = 2000
MEAN_SECONDS = 29


@pytest.fixture(scope="module")
def drawn() -> list[tuple[int, Scenario]]:
    """The runs of a long campaign."""
    return [(each, draw(each)) for each in islice(seeds(3, MEAN_SECONDS), SEEDS)]


def test_every_pair_of_a_kind_and_a_phase_that_makes_sense_is_drawn(
    drawn: list[tuple[int, Scenario]],
) -> None:
    """2,000 runs strike each kind in each phase; there are at least 35 kinds and twelve phases."""
    found = {
        (fault.kind, fault.at.phase)
        for _, each in drawn
        for fault in each.faults
        if fault.at.phase is not None
    }
    expected = {(kind.name, phase) for kind, phase in pairs()}
    assert expected <= found
    assert len({kind for kind, _ in expected}) >= 35
    assert {phase for _, phase in expected} == set(Phase)


def test_what_is_not_drawn_is_named_with_its_reason() -> None:
    """Each pair is drawn or has a reason, and few kinds are left out altogether."""
    left_out = [
        kind.name for kind in KINDS.values() if all(why_not(kind, phase) for phase in Phase)
    ]
    assert len(left_out) <= len(KINDS) // 5
    drawable = {(kind.name, phase) for kind, phase in pairs()}
    for kind in KINDS.values():
        for phase in Phase:
            assert ((kind.name, phase) in drawable) is not bool(why_not(kind, phase))


def test_a_seed_alone_decides_the_scenario(drawn: list[tuple[int, Scenario]]) -> None:
    """The same seed draws the same scenario, and neighbours draw others."""
    assert [draw(seed) for seed, _ in drawn[:50]] == [each for _, each in drawn[:50]]
    assert len({str(each.faults) for _, each in drawn[:50]}) > 45
    assert list(islice(seeds(3, MEAN_SECONDS), 5)) == [seed for seed, _ in drawn[:5]]
    assert list(islice(seeds(4, MEAN_SECONDS), 5)) != [seed for seed, _ in drawn[:5]]


def test_gaps_have_the_mean_that_was_asked_for() -> None:
    """More faults come if the mean is smaller; it is a part of the seed."""
    counts = []
    for mean_seconds in (5, 60):
        runs = [draw(each) for each in islice(seeds(1, mean_seconds), 200)]
        counts.append(sum(len(each.faults) for each in runs))
    assert counts[0] > 1.8 * counts[1]


def test_drawn_runs_can_complete(drawn: list[tuple[int, Scenario]]) -> None:
    """A pool replaces lost nodes, each step comes before the last one, and what a fault follows has struck before."""
    for _, each in drawn:
        assert each.replace_after_s is not None
        assert all((fault.at.step or 0) < STEPS - 50 for fault in each.faults)
        for fault in each.faults:
            if fault.at.phase is Phase.RESTORE:
                assert fault.at.after is not None
            if fault.at.phase is Phase.MIRROR:
                assert each.nodes > 1


def test_a_machine_without_anything_still_has_runs_to_play(
    drawn: list[tuple[int, Scenario]],
) -> None:
    """Without root and without Ceph a fair share of the runs is left."""
    assert sum(not needs_of(each) for _, each in drawn) > SEEDS / 5


def test_a_drawn_scenario_is_a_file(drawn: list[tuple[int, Scenario]]) -> None:
    """Its text as a file gives the same scenario, so a user can change it."""
    for _, each in drawn[:100]:
        assert read_scenario(as_toml(each), "drawn.toml", "other") == each


@pytest.mark.parametrize("seed", [-1, 0, 5000])
def test_a_number_that_no_campaign_prints_is_refused(seed: int) -> None:
    """The error names the value."""
    with pytest.raises(ConfigError, match=f"SEED {seed}: expected"):
        draw(seed)
