"""Hundreds of seeded schedules of faults, and planted bugs that they must find. `make sim` runs more of them."""

import pytest

from tests.sim.mutation import Mutation, find
from tests.sim.mutations import MUTATIONS
from tests.sim.simulation import simulate

SEEDS = 200
"""`make sim` simulates 500."""
BATCH = 25


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_invariant_holds(first: int) -> None:
    """Whatever faults happen, no invariant breaks, and afterwards all nodes train together again."""
    violations = [
        f"seed {seed}: {outcome.violation}; replay it with python -m tests.sim --seed {seed}"
        for seed in range(first, first + BATCH)
        if (outcome := simulate(seed)).violation is not None
    ]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[each.name for each in MUTATIONS])
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    """A simulator that misses a broken rule proves nothing about that rule."""
    found = find(mutation, mutation.seed)
    assert found.outcome is not None, (
        f"{mutation.name}: not found within {found.seeds} seeds from seed {mutation.seed} on"
    )
    assert found.outcome.violation is not None


def test_seed_is_replayed_exactly() -> None:
    """The same seed gives the same events in the same order; otherwise no failure could be debugged."""
    one, other = (simulate(7, tracing=True) for _ in range(2))
    assert one.trace
    assert one.trace == other.trace
