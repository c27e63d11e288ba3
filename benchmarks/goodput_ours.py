"""Our agents as a system that `goodput_drive.py` takes through a schedule.

Two kinds of warm nodes. If the schedule replaces lost nodes, the pool has a spare: an agent that has imported, and waits
because `elastic.nodes_max` nodes train. It counts as living from the moment when it waits. A node that a trace gives has
imported too, but does not ask to join before it is told to. It counts as living from then on.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.goodput_run import GoodputRun
from benchmarks.recovery_watch import StepPoint
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.runlog.records import Record

_WAITS: Final = "agent_started"
_REFERENCE_S: Final = 3600.0


class OurSystem:
    """Our agents. Main thread."""

    def __init__(self, run: GoodputRun, *, spares: bool, tell: Callable[[str], None]) -> None:
        """With `spares` the nodes of the pool are spares, which become members by themselves."""
        self.living: list[tuple[float, int]] = []
        self.living_from_s: dict[str, float] = {}
        """When each node that came during the schedule began to count as living."""
        self._run = run
        self._spares = spares
        self._tell = tell
        self._held: list[str] = []
        self._warming: list[str] = []

    def newest(self) -> StepPoint:
        """The newest step that the run has ever done, and when."""
        return self._run.progress.newest

    def until_training(self, nodes: int, steps: int, limit_s: float) -> None:
        """Wait until this many members have done some more steps. Raises `ElasticPtError` after `limit_s`."""
        self._run.until(f"{nodes} members", lambda: len(self._run.members()) == nodes, limit_s)
        step = self.newest().step + steps
        self._run.until(f"step {step}", lambda: self.newest().step >= step, limit_s)

    def warm(self, *, joins: bool = False) -> None:
        """Start a node for the pool; with `joins` one that joins when it has imported."""
        if joins:
            self._run.start()
        elif self._spares:
            self._warming.append(self._run.start())
        else:
            self._held.append(self._run.start(hold=True))

    def join(self) -> None:
        """Let the oldest node of the pool join. A spare needs no word."""
        if self._spares:
            return
        node = self._held.pop(0)
        self._run.tell(node)
        self._lives(node, time.time())
        self._tell(f"{node} told to join at step {self.newest().step}")

    def lose(self, draw: float) -> None:
        """Kill one of the members."""
        members = self._run.members()
        victim = members[int(draw * len(members))]
        self._run.kill(victim)
        self.living.append((time.time(), -1))
        self._tell(f"{victim} killed at step {self.newest().step}")

    def tick(self) -> None:
        """Note which spares wait by now. Raises `ElasticPtError` if a node has ended that was not killed."""
        for node in list(self._warming):
            if (moment_s := self._run.moment(node, _WAITS)) is not None:
                self._warming.remove(node)
                self._lives(node, moment_s)
        if ended := sorted(self._run.ended()):
            raise ElasticPtError(f"{ended[0]} has ended; expected it to train\n{self._run.tails()}")

    def _lives(self, node: str, since_s: float) -> None:
        self.living_from_s[node] = since_s
        self.living.append((since_s, 1))


def lost_steps(records: Sequence[Record], begin_s: float, end_s: float) -> int:
    """The steps that changes between these moments lost; each was done again."""
    written_at_s = {each.index: each.written_at.timestamp() for each in records}
    changes = [each for each in explain(records) if isinstance(each, Change)]
    return sum(
        each.lost_steps or 0 for each in changes if begin_s < written_at_s[each.index] <= end_s
    )


def reference_digest(directory: Path, data_url: str, steps: int) -> str:
    """The digest after `steps` steps of one node that nothing disturbs."""
    with GoodputRun(directory, data_url, None, 1, [f"train.steps={steps}"]) as run:
        run.start()
        run.until_ended(_REFERENCE_S)
        reached, found = run.final()
    if reached != steps:
        raise ElasticPtError(f"reference: ended at step {reached}; expected {steps}")
    return found
