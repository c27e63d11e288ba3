"""What a sink is, and what it takes from the committed steps: curves, times, and which of them are missing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from elastic_pt.report.history import Batch
from elastic_pt.runlog.records import Commit

_SCALARS: Final = {
    "loss": "loss",
    "z_loss": "z_loss",
    "gradient_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "seconds": "step_seconds",
    "data_wait_s": "data_wait_seconds",
    "checkpoint_stall_s": "checkpoint_stall_seconds",
    "straggler_wait_s": "straggler_wait_seconds",
    "world_size": "world_size",
    "generation": "generation",
    "held_out_loss": "held_out_loss",
}
"""The name of each number of a history line that is a curve in other tools. Lines of older runs lack some."""


@dataclass(frozen=True)
class Position:
    """How far a sink is filled."""

    record: int = 0
    """Index of the first record of the log that may have steps which the sink lacks."""
    step: int = 0
    """The newest step that it holds; 0 if it holds none."""


class Sink(Protocol):
    """A place to which steps are copied. It belongs to one run, and one process writes it at a time."""

    name: str
    """As the operator gave it."""
    position: Position

    def write(self, batch: Batch) -> None:
        """Write the steps of `batch`, at least one, all later than `position.step`. Advance `position` behind them."""
        ...

    def flush(self) -> None:
        """Return when all that was written is on the disk."""
        ...

    def close(self) -> None:
        """Let another process write."""
        ...


def missing_steps(batch: Batch, after_step: int) -> str:
    """Which steps after `after_step` a COMMIT does not have, in words; empty if it has all of them. Pure."""
    commit = batch.record.body
    if not isinstance(commit, Commit):
        return ""
    first, last = after_step + 1, commit.newest.step
    missing = sorted(set(range(first, last + 1)) - {line["step"] for line in batch.lines})
    if not missing:
        return ""
    why = "it was thinned, to keep its size bounded" if batch.lines else "it is not there"
    return (
        f"{commit.history} has {len(batch.lines)} of the steps {first} to {last}: {why}; "
        f"{len(missing)} steps from {missing[0]} to {missing[-1]} are left out"
    )


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves of a step: name and value. A loss that was not finite is stored as null, and is NaN here."""
    for key, name in _SCALARS.items():
        if key in line:
            yield name, math.nan if line[key] is None else float(line[key])
    if line.get("tokens") and line.get("seconds"):
        yield "tokens_per_second", line["tokens"] / line["seconds"]
    for source, (_, loss) in line.get("sources", {}).items():
        if loss is not None:
            yield f"source_loss/{source}", float(loss)


def times_s(batch: Batch) -> list[float]:
    """When each step ended, in Unix seconds: the COMMIT's time less the seconds of the steps between."""
    times: list[float] = []
    time_s = batch.committed_at_s
    for line in reversed(batch.lines):
        times.append(time_s)
        time_s -= line.get("seconds") or 0.0
    return times[::-1]
