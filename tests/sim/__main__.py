"""`python -m tests.sim`: simulate many seeds, or replay one of them line by line."""

import argparse
import sys
import time

from tests.sim.mutation import find
from tests.sim.mutations import MUTATIONS
from tests.sim.simulation import simulate


def main() -> int:
    """Run; the exit code tells whether every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many seeds to simulate")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one, telling everything")
    parser.add_argument("--mutations", action="store_true", help="plant each bug, and find it")
    given = parser.parse_args()
    if given.mutations:
        return find_mutations()
    if given.seed is not None:
        outcome = simulate(given.seed, tracing=True)
        print("\n".join(outcome.trace))
        print(f"seed {given.seed}: {outcome.violation or 'every invariant held'}")
        return int(outcome.violation is not None)
    began_s, failed = time.process_time(), 0
    for seed in range(given.first, given.first + given.seeds):
        outcome = simulate(seed)
        if outcome.violation is not None:
            failed += 1
            print(f"seed {seed}: {outcome.violation}", flush=True)
    print(
        f"{given.seeds} seeds, {failed} violations, {time.process_time() - began_s:.1f} s of processor time"
    )
    return int(failed > 0)


def find_mutations() -> int:
    """Plant each bug and say which seed found it, by which invariant."""
    missed = 0
    for mutation in MUTATIONS:
        found = find(mutation)
        if found.outcome is None:
            missed += 1
            print(
                f"NOT FOUND within {found.seeds} seeds: {mutation.name}: {mutation.what}",
                flush=True,
            )
        else:
            print(f"{mutation.name}: seed {found.seeds - 1}: {found.outcome.violation}", flush=True)
    print(f"{len(MUTATIONS)} planted bugs, {len(MUTATIONS) - missed} found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
