"""Removal of objects that no record names, by the committing node of the newest generation.

    listing of ckpt/ ─► leftovers, overtaken ─► remove          attempts that were never committed
    unfinished uploads ─► abandoned ─► abandon                  parts of files whose writer was killed

`retention` decides what is removed. A listing takes one request per thousand files, so a sweep runs at most every
`SWEEP_INTERVAL_S`, and after the run's last commit. The number of removals per sweep is limited; the next sweep
continues. Before each removal the sweep checks that its generation is the newest: a newer generation has its own sweep.
"""

import math
from collections.abc import Callable
from typing import Final

import structlog

from elastic_pt.checkpoint import retention
from elastic_pt.errors import AccessDenied
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Commit
from elastic_pt.store.port import KeepsUnfinished, Store

SWEEP_INTERVAL_S: Final = 600.0
OVERTAKEN_AGE_S: Final = 3600.0
"""Seconds since an attempt of the current generation was seen to be overtaken: then none of its uploads is running."""
_DIRECTORIES_MAX: Final = 64
_UPLOADS_MAX: Final = 1000

log = structlog.get_logger("elastic_pt.checkpoint.sweep")


class Sweeper:
    """The sweeps of one agent. Not thread-safe: only the thread of the `Tidier` uses it."""

    def __init__(self, store: Store, run_log: RunLog, *, now: Callable[[], float]) -> None:
        """`now()` is a monotonic clock in seconds."""
        self._store = store
        self._log = run_log
        self._now = now
        self._next_s = -math.inf
        self._overtaken_since_s: dict[str, float] = {}
        """When each attempt of the current generation was first seen to be overtaken."""

    def sweep(self, view: RunView, *, last: bool) -> None:
        """Sweep, if it is time or this is the run's `last` commit. `view` ends with a COMMIT or the STOP of this node.

        Raises `StoreError` if the store fails; the next sweep starts from the beginning.
        """
        now_s = self._now()
        if now_s < self._next_s and not last:
            return
        self._next_s = now_s + SWEEP_INTERVAL_S
        assert view.commit is not None
        self._remove_attempts(view, view.commit, now_s)
        self._abandon_uploads(view, view.commit)

    def _remove_attempts(self, view: RunView, commit: Commit, now_s: float) -> None:
        committed = {each.directory for each in view.checkpoints}
        committed.update(each.directory for each, _ in self._log.permanent(view))
        listed = retention.listed_directories(self._store)
        overtaken = retention.overtaken(listed, committed, commit.newest)
        since_s = {each: self._overtaken_since_s.get(each, now_s) for each in overtaken}
        self._overtaken_since_s = since_s
        due = [
            *retention.leftovers(listed, committed, view.generation_number, commit.newest.step),
            *(each for each in overtaken if now_s - since_s[each] >= OVERTAKEN_AGE_S),
        ]
        failpoint(Failpoint.SWEEP_LISTED)
        for directory in due[:_DIRECTORIES_MAX]:
            if self._is_replaced(view):
                return
            retention.remove(self._store, directory)
            log.info("attempt_removed", directory=directory)

    def _abandon_uploads(self, view: RunView, commit: Commit) -> None:
        if not isinstance(self._store, KeepsUnfinished):
            return
        try:
            uploads = self._store.unfinished("ckpt/")
        except AccessDenied as error:
            # Nothing else needs this permission. Without it a lifecycle rule of the bucket must remove the parts.
            log.info("uploads_not_swept", cause=str(error))
            return
        due = retention.abandoned(uploads, view.generation_number, commit.newest.step)
        for upload in due[:_UPLOADS_MAX]:
            if self._is_replaced(view):
                return
            self._store.abandon(upload)
            failpoint(Failpoint.SWEEP_ABANDONED)
            log.info("upload_abandoned", key=upload.key, age_s=round(upload.age_s))

    def _is_replaced(self, view: RunView) -> bool:
        return self._log.view.generation_number != view.generation_number
