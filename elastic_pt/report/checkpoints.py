"""The checkpoints of a run: those that the newest COMMIT names, and the older permanent ones.

    newest COMMIT ─► checkpoints that are kept ──┐
                 └─► chain of permanent ones ────┴─► reports, newest first

The age of a checkpoint comes from its COMMIT record, its size from its manifest. Only reads, and imports no torch.
Runs in the command line's process.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint.index import read_root
from elastic_pt.errors import CheckpointError
from elastic_pt.report.status import Run, age_of
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Checkpoint, Commit, Kind, Quarantine, Record
from elastic_pt.store.parallel import in_order

BUCKET: Final = "bucket"
"""The tier that holds every committed checkpoint."""
_MANIFEST_THREADS: Final = 8


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that was committed and is still kept."""

    checkpoint: Checkpoint
    quarantine: str
    """Why it must not be used; empty if it may be."""
    committed: Record
    """The COMMIT record that makes it count."""
    tiers: tuple[str, ...] = (BUCKET,)
    """The tiers that hold it."""

    def age_s(self, now: datetime.datetime) -> float:
        """Seconds since its commit."""
        return age_of(self.committed, now)


def read_checkpoints(run: Run) -> list[CheckpointReport]:
    """Committed checkpoints that are kept, permanent ones included, newest first; quarantined ones with the reason."""
    view = run.log.refresh()
    if view.commit is None or view.head is None:
        return []
    reasons: dict[str, str] = {}
    for record in run.log.chain(view.head, Kind.QUARANTINE):
        if isinstance(record.body, Quarantine) and record.body.directory:
            reasons[record.body.directory] = record.body.why
    return [
        CheckpointReport(checkpoint, reasons.get(checkpoint.directory, ""), record)
        for checkpoint, record in _committed(run, view, view.commit, view.head)
    ]


def _committed(
    run: Run, view: RunView, commit: Commit, head: Record
) -> Iterator[tuple[Checkpoint, Record]]:
    """The checkpoints with their COMMIT records: first those that the newest COMMIT names."""
    named = {each.directory: each for each in commit.checkpoints}
    waiting = dict(named)
    for record in run.log.chain(head, Kind.COMMIT):
        if isinstance(record.body, Commit):
            checkpoint = waiting.pop(record.body.newest.directory, None)
            if checkpoint is not None:
                yield checkpoint, record
        if not waiting:
            break
    for checkpoint, record in run.log.permanent(view):
        if checkpoint.directory not in named:
            yield checkpoint, record


def checkpoint_bytes(run: Run, checkpoints: list[Checkpoint]) -> list[int | None]:
    """Bytes of each checkpoint, its manifest included; None if the manifest is unusable."""

    def measure(checkpoint: Checkpoint) -> int | None:
        try:
            root = read_root(run.store, checkpoint, run.log.view.run_id)
        except CheckpointError:
            return None
        return checkpoint.manifest_size + sum(size for _, size in root.sizes)

    return list(in_order(checkpoints, measure, _MANIFEST_THREADS))
