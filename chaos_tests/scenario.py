"""What all scenarios share: a tiny run, ways to observe it, and the check of the finished run.

    start nodes ─► wait until a named step ─► disturb ─► finish ─► check_whole

`check_whole` asks oracles of `elastic_pt.chaos.directory`, the same for all: the digest of the undisturbed run, each row of
the plan exactly once in the committed history, one lineage. The end is on record, and no process is left. At the end of every scenario the buckets of all agents' time
add up to the node-seconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tomlkit

from elastic_pt.chaos.directory import (
    check_digest,
    check_goodput,
    check_ledger,
    check_lineage,
    goodput_at,
)
from elastic_pt.chaos.processes import kill_all, mark_children, marked
from elastic_pt.chaos.small_run import small_run
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.config import Config, parse_config
from elastic_pt.errors import StoreError
from elastic_pt.fleet.local import Fleet
from elastic_pt.report.goodput import Goodput, read_accounts
from elastic_pt.runlog.records import Generation, Quarantine
from elastic_pt.store.open import open_store

STEPS: Final = 48
CHECKPOINT_STEPS: Final = 6
PATIENCE_S: Final = 90.0
_POLL_S: Final = 0.01
_READ_TIMEOUT_S: Final = 5.0


def make_config(run_url: str, data_url: str, nodes: int, *overrides: str) -> Config:
    """A run that takes seconds (2 layers, width 64, V = 8) and starts when `nodes` nodes are there."""
    tree = small_run(run_url, data_url, {"elastic": {"nodes_max": nodes}})
    return parse_config(tomlkit.dumps(tree), source="chaos_tests", overrides=overrides)


@dataclass(frozen=True)
class Whole:
    """The result of a finished run."""

    digest: str
    generations: list[Generation]
    quarantines: list[Quarantine]


class Scenario(WatchedRun):
    """One run with its nodes, observed from outside."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        directory: Path,
        mark: str,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(config, directory)
        self.fleet = fleet
        self.mark = mark
        self.patience_s = patience_s
        self.goodput: Goodput | None = None
        """What `check_goodput` has found last."""

    def decisions(self, node: str) -> list[str]:
        """The kinds of decisions that a node's membership took, in order."""
        return [event["kind"] for event in self.events(node, "decision")]

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails with the ends of the nodes' logs after `patience_s`."""
        deadline_s = time.monotonic() + self.patience_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {self.patience_s} s: {what}\n{self.log_tails()}")
            time.sleep(_POLL_S)

    def until_step(self, step: int, nodes: int) -> None:
        """Wait until a world of this many nodes has done `step`."""

        def reached() -> bool:
            codes = self.fleet.exit_codes()
            assert None in codes.values(), f"all nodes have ended: {codes}\n{self.log_tails()}"
            generation = self.view().generation
            return (
                generation is not None and len(generation.members) == nodes and self.step() >= step
            )

        self.until(f"{nodes} nodes at step {step}", reached)
        assert self.view().stop is None, f"the run was over before step {step} could be disturbed"

    def finish(self) -> None:
        """Wait until every node that still runs has ended with exit code 0."""
        codes = self.fleet.wait(self.patience_s)
        assert set(codes.values()) == {0}, f"{codes}\n{self.log_tails()}"
        newest = {agent.node: agent for agent in self.check_goodput().agents}
        assert not any(newest[node].running for node in codes.keys() & newest)

    def check_goodput(self) -> Goodput:
        """Fail unless each node-second, of every agent that had started, counts in exactly one bucket."""
        # Of its own: the store of the scenario may retry for minutes.
        store = open_store(self.config.run.url, timeout_s=_READ_TIMEOUT_S, patient=False)
        self.goodput = goodput_at(time.time(), read_accounts(store), self.records())
        check_goodput(self.goodput)
        return self.goodput

    def check_whole(self, reference_digest: str) -> Whole:
        """Fail unless the finished run has the weights of the undisturbed one and read each row once."""
        view = self.view()
        assert view.stop is not None
        assert (view.stop.reason, view.stop.step) == ("completed", self.config.train.steps)
        records = self.records()
        check_lineage(records)
        check_ledger(self.store, records, self.config.train)
        check_digest(self.store, view, {self.config.train.steps: reference_digest})
        self.until("no process is left", lambda: not marked(self.mark))
        bodies = [record.body for record in records]
        return Whole(
            digest=reference_digest,
            generations=[body for body in bodies if isinstance(body, Generation)],
            quarantines=[body for body in bodies if isinstance(body, Quarantine)],
        )


@contextmanager
def scenario(config: Config, directory: Path, patience_s: float = PATIENCE_S) -> Iterator[Scenario]:
    """A scenario whose processes are all gone at its end, whatever happened."""
    with mark_children() as mark:
        try:
            with Fleet(config, directory) as fleet:
                yield (opened := Scenario(config, fleet, directory, mark, patience_s))
            # The bucket of a scenario that has not finished may be gone.
            with suppress(StoreError):
                _ = opened.goodput or opened.check_goodput()
        finally:
            kill_all(mark)


def first_member(generation: Generation) -> str:
    """The node that has rank 0."""
    return generation.members[0].node
