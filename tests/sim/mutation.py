"""A planted bug, and how it is searched for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from tests.sim.simulation import Outcome, simulate

SEEDS_MAX: Final = 500
"""A planted bug must be found within this many seeds."""


@dataclass(frozen=True)
class Mutation:
    """A planted bug: what is replaced, and by what."""

    name: str
    what: str
    target: Any
    attribute: str
    replacement: Any
    seed: int
    """The first one that found it: the tests begin there. After a change of the protocol it may be another."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        """With the bug in place."""
        with patch.object(self.target, self.attribute, self.replacement):
            yield


@dataclass(frozen=True)
class Found:
    """Which seed found a mutation, if any did."""

    mutation: Mutation
    outcome: Outcome | None
    seeds: int


def find(mutation: Mutation, first_seed: int = 0) -> Found:
    """Simulate seeds with the bug in place until one finds it."""
    with mutation.planted():
        for count in range(SEEDS_MAX):
            outcome = simulate(first_seed + count)
            if outcome.violation is not None:
                return Found(mutation, outcome, count + 1)
    return Found(mutation, None, SEEDS_MAX)
