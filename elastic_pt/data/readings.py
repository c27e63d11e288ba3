"""Which rows hold a document, and which steps read these rows.

    tokens of a document ─► rows ─► readings (epoch, step, slot)

A row holds the tokens of a document if it predicts one of them, or has one as an input; so the row before a document's
first token belongs to it if that token is its last target. Which step reads a row is a closed form
(`DataPlan.plan_rows_of`). Steps are those of the run's history: counted from 1.

Pure: the plan comes as an argument.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from elastic_pt.data.plan import DataPlan

READINGS_MAX: Final = 1000
"""Readings that are listed at once; all are counted."""


@dataclass(frozen=True)
class Reading:
    """One time that a row is read."""

    row: int
    epoch: int
    """From 0."""
    step: int
    """From 1, as in the history."""
    slot: int


def rows_holding(tokens: range, sequence_length: int, rows: int) -> range:
    """The rows of a train stream that have some of these tokens; `rows` is how many the stream has."""
    first = max(0, (tokens.start - 1) // sequence_length)
    return range(min(first, rows), min((tokens.stop - 1) // sequence_length + 1, rows))


def times_read(plan: DataPlan, source: int, rows: range, step: int) -> int:
    """How often rows of a source are read in the first `step` steps, all together."""
    epoch = int(plan.rows_read(step)[source]) // plan.rows_per_source[source]
    steps = plan.plan_rows_of(source, epoch, np.array(rows, dtype=np.int64)) // plan.global_batch
    return epoch * len(rows) + int(np.count_nonzero(steps < step))


def readings(
    plan: DataPlan, micro_batch: int, source: int, rows: range, steps: range, *, last: bool = False
) -> list[Reading]:
    """When rows of a source are read in some steps (from 1), in their order.

    At most `READINGS_MAX`: the first ones, or the last ones.
    """
    numbers = np.array(rows, dtype=np.int64)
    per_epoch = plan.rows_per_source[source]
    first, final = (
        int(plan.rows_read(step)[source]) // per_epoch for step in (steps.start - 1, steps.stop - 1)
    )
    found: list[Reading] = []
    epochs = range(first, final + 1) if rows and steps else range(0)
    for epoch in reversed(epochs) if last else epochs:
        step, within = np.divmod(plan.plan_rows_of(source, epoch, numbers), plan.global_batch)
        slot = within // micro_batch
        every = zip(rows, (step + 1).tolist(), slot.tolist(), strict=True)
        some = [Reading(row, epoch, at, by) for row, at, by in every if at in steps]
        # An epoch ends before the next one begins, in the order of steps and slots.
        some.sort(key=lambda each: (each.step, each.slot, each.row))
        found = some + found if last else found + some
        if len(found) >= READINGS_MAX:
            break
    return found[-READINGS_MAX:] if last else found[:READINGS_MAX]
