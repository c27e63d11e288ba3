"""The steps of a run as columns: about 40 bytes each, so that a million of them fit into memory."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SKIPPED_MAX: Final = 500
"""Skipped steps that are kept with their reason."""

Values = NDArray[np.float64]


class Skipped(NamedTuple):
    """A step that changed nothing."""

    step: int
    why: str


@dataclass
class SourceSum:
    """What the steps have read of a source."""

    rows: int = 0
    recent_loss: float = math.nan
    """A moving average over the steps that have rows of it, weighted with their rows."""
    recent_rows: float = 0.0

    def add(self, rows: int, loss: float | None) -> None:
        """Count the rows of one step."""
        self.rows += rows
        if loss is None or not math.isfinite(loss) or rows == 0:
            return
        kept = 0.99 * self.recent_rows
        before = self.recent_loss * kept if kept else 0.0
        self.recent_rows = kept + rows
        self.recent_loss = (before + loss * rows) / self.recent_rows


@dataclass
class Steps:
    """Columns with one value per step, in order. NaN stands for a value that is missing or not finite."""

    step: "array[int]" = field(default_factory=lambda: array("q"))
    loss: "array[float]" = field(default_factory=lambda: array("d"))
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    tokens: "array[float]" = field(default_factory=lambda: array("d"))
    world_size: "array[int]" = field(default_factory=lambda: array("i"))
    held_out: list[tuple[int, float]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_count: int = 0
    not_finite: int = 0
    """Steps whose loss was not finite."""
    phases_s: dict[str, float] = field(default_factory=dict)
    """Seconds of all steps by phase; of steps without phases only the wait for data, and the rest as `other`."""
    sources: dict[str, SourceSum] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add the history line of the next step."""
        loss = _number(line.get("loss"))
        self.step.append(line["step"])
        self.loss.append(loss)
        self.seconds.append(_number(line.get("seconds")))
        self.tokens.append(_number(line.get("tokens")))
        self.world_size.append(line.get("world_size") or 0)
        self.not_finite += math.isnan(loss)
        if line.get("skipped"):
            self.skipped_count += 1
            if len(self.skipped) < SKIPPED_MAX:
                self.skipped.append(Skipped(line["step"], str(line["skipped"])))
        if line.get("held_out_loss") is not None:
            self.held_out.append((line["step"], float(line["held_out_loss"])))
        for phase, seconds in _phases(line).items():
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + (seconds or 0.0)
        for name, (rows, mean) in (line.get("sources") or {}).items():
            self.sources.setdefault(name, SourceSum()).add(rows, mean)


class Thinned(NamedTuple):
    """A curve with fewer points: each stands for some steps in a row."""

    steps: Values
    """The last step of each point."""
    low: Values
    mean: Values
    high: Values
    steps_per_point: int


def thin(steps: Values, values: Values, points_max: int) -> Thinned:
    """At most `points_max` points, each with the least, mean and greatest of its values. NaN counts only if all are."""
    per_point = max(1, -(-len(steps) // points_max))
    pad = -len(steps) % per_point
    table = np.append(values, np.full(pad, np.nan)).reshape(-1, per_point)
    known = np.isfinite(table)
    some = known.any(axis=1)
    counts = np.maximum(known.sum(axis=1), 1)
    mean = np.where(some, np.where(known, table, 0.0).sum(axis=1) / counts, np.nan)
    low = np.where(some, np.where(known, table, np.inf).min(axis=1), np.nan)
    high = np.where(some, np.where(known, table, -np.inf).max(axis=1), np.nan)
    ends = np.minimum(np.arange(1, len(table) + 1) * per_point, len(steps)) - 1
    return Thinned(steps[ends], low, mean, high, per_point)


def moving_average(values: Values, window: int) -> Values:
    """The mean of the last `window` finite values, or of all there are so far; NaN before the first."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(np.float64)
    sums[window:] -= sums[:-window].copy() if len(sums) > window else 0.0
    counts[window:] -= counts[:-window].copy() if len(counts) > window else 0.0
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _phases(line: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = dict(line.get("phases") or {})
    if not found and line.get("seconds") is not None:
        data_s = line.get("data_wait_s") or 0.0
        found = {"data": data_s, "other": max(0.0, line["seconds"] - data_s)}
    return found
