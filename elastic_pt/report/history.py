"""The committed history of a run, one commit after another: what all reports and sinks read of `history/`.

    log ─► COMMIT ─► history/ ─► Batch ─┬─► each line, in the order of the commits
                                        └─► read_steps: each step once

A step that was computed again after a quarantined checkpoint has two lines. The first one counts, so what a reader
has seen of a step never changes. A history that is missing has no lines.
"""

import datetime
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from elastic_pt.checkpoint.history import read_history
from elastic_pt.errors import NotFound
from elastic_pt.runlog.records import Commit, Record
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store

_READS_AT_ONCE: Final = 8
"""Histories in memory at a time. `HISTORY_BYTES_MAX` bounds each of them."""


@dataclass(frozen=True)
class Batch:
    """The steps that one record added: none unless it is a COMMIT."""

    record: Record
    lines: tuple[dict[str, Any], ...]
    """One history line per step, in order."""

    @property
    def committed_at_s(self) -> float:
        """The record's time in Unix seconds."""
        return datetime.datetime.fromisoformat(self.record.time).timestamp()

    def after(self, step: int) -> "Batch":
        """Without the steps up to `step`."""
        return replace(self, lines=tuple(line for line in self.lines if line["step"] > step))


def read_batches(store: Store, records: Iterable[Record], after_step: int = 0) -> Iterator[Batch]:
    """The steps that each record committed, later than `after_step`. Reads a few histories ahead."""

    def read(record: Record) -> Batch:
        lines: list[dict[str, Any]] = []
        if isinstance(record.body, Commit) and record.body.newest.step > after_step:
            with suppress(NotFound):
                lines = read_history(store, record.body.history)
        return Batch(record, tuple(lines)).after(after_step)

    return in_order(records, read, _READS_AT_ONCE)


def read_steps(store: Store, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The line of each committed step, in order, as it was first committed."""
    step = 0
    for batch in read_batches(store, records):
        for line in batch.after(step).lines:
            step = line["step"]
            yield line
