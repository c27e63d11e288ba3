"""The losses that a live view draws: some of the whole run, and more of its newest steps."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Commit, Kind

_CURVE_COMMITS: Final = 64
"""COMMITs from all over the log that make the first curve."""
_LOSSES_MAX: Final = 4096
_READERS: Final = 8


@dataclass(frozen=True)
class LossPoint:
    """The loss of a step."""

    step: int
    loss: float


class Losses:
    """The losses of a run by step, at most about `_LOSSES_MAX` of them."""

    def __init__(self) -> None:
        self._by_step: dict[int, float] = {}
        self._generation = 0

    @property
    def points(self) -> tuple[LossPoint, ...]:
        """By step."""
        return tuple(LossPoint(step, loss) for step, loss in sorted(self._by_step.items()))

    def add(self, losses: Iterable[tuple[int, float | None]]) -> None:
        """Add losses; one that was not finite is left out. Beyond the bound every second one of the older half goes."""
        self._by_step |= {step: loss for step, loss in losses if loss is not None}
        if len(self._by_step) > _LOSSES_MAX:
            steps = sorted(self._by_step)
            half = len(steps) // 2
            self._by_step = {step: self._by_step[step] for step in steps[:half:2] + steps[half:]}

    def resume(self, generation: int, step: int) -> None:
        """A generation resumes from `step`: later steps are lost. What was read before the first call is its own."""
        before, self._generation = self._generation, generation
        if before not in (0, generation):
            self._by_step = {each: loss for each, loss in self._by_step.items() if each <= step}


def curve_of(log: RunLog) -> list[tuple[int, float | None]]:
    """The losses of some COMMITs, evenly spread over the log."""
    head = log.view.head
    newest = -1 if head is None else head.latest.get(Kind.COMMIT, -1)
    wanted = sorted({round(newest * part / _CURVE_COMMITS) for part in range(_CURVE_COMMITS + 1)})

    def commit_before(index: int) -> tuple[int, float | None] | None:
        found = log.record(index)
        if not isinstance(found.body, Commit) and Kind.COMMIT in found.latest:
            found = log.record(found.latest[Kind.COMMIT])
        body = found.body
        return (body.newest.step, body.newest.loss) if isinstance(body, Commit) else None

    with ThreadPoolExecutor(_READERS) as pool:
        return [each for each in pool.map(commit_before, wanted) if each is not None]
