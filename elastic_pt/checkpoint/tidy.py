"""Removal by a command, for runs whose agents remove nothing (`checkpoint.tidy = false`), and for runs that have ended.

    log, then listing of ckpt/ ─► retention ─► remove          what no COMMIT keeps and no node can commit any more
    unfinished uploads ─────────► abandoned ─► abandon         parts of files whose writer was killed

It removes what the agents would remove, by the same pure functions, and is safe beside them. The agents remember what
expired, and when an attempt was overtaken. The command reads both from the COMMIT records of the newest checkpoint's
generation. The listing comes after the log: a checkpoint that is committed in between is newer than all that is removed.

After a STOP that says `completed` no record follows, so nothing that no record keeps can be committed any more.
"""

import datetime
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_pt.checkpoint import retention
from elastic_pt.checkpoint.layout import parse_directory
from elastic_pt.checkpoint.sweep import OVERTAKEN_AGE_S
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Kind
from elastic_pt.store.port import KeepsUnfinished, Store, UnfinishedUpload

_PLANS_MAX: Final = 10
"""How often the log is read anew because another generation has begun. The next call removes the rest."""


@dataclass(frozen=True)
class RemovedDirectory:
    """A checkpoint directory that was removed, or would be."""

    directory: str
    files: int


def tidy_directories(
    store: Store, run_log: RunLog, *, now_s: Callable[[], float], dry_run: bool
) -> Iterator[RemovedDirectory]:
    """Remove the checkpoint directories that the run needs no more, each one as it is iterated to. Command line's process.

    `now_s()` is Unix time. Before each removal the log is read again: if another generation has begun, the decisions are
    made anew. May be repeated. Raises `StoreError`.
    """
    for _ in range(_PLANS_MAX):
        view = run_log.refresh()
        for directory in _due(store, run_log, view, now_s()):
            if dry_run:
                yield RemovedDirectory(directory, len(store.keys(f"{directory}/")))
            elif run_log.refresh().generation_number != view.generation_number:
                break
            else:
                yield RemovedDirectory(directory, retention.remove(store, directory))
        else:
            return


def tidy_uploads(store: Store, run_log: RunLog, *, dry_run: bool) -> Iterator[UnfinishedUpload]:
    """End the unfinished uploads that have no writer any more, each one as it is iterated to. Command line's process.

    Raises `AccessDenied` without the permission to list them, and `StoreError`. A store that keeps none has none.
    """
    view = run_log.refresh()
    if not isinstance(store, KeepsUnfinished) or view.commit is None:
        return
    uploads = store.unfinished("ckpt/")
    if not _is_complete(view):
        uploads = retention.abandoned(uploads, view.generation_number, view.commit.newest.step)
    for upload in uploads:
        if not dry_run:
            store.abandon(upload)
        yield upload


def kept_directories(run_log: RunLog, view: RunView) -> set[str]:
    """The directories that the newest COMMIT names, quarantined ones too, and the permanent ones."""
    named = () if view.commit is None else view.commit.checkpoints
    permanent = (checkpoint for checkpoint, _ in run_log.permanent(view))
    return {each.directory for each in (*named, *permanent)}


def _due(store: Store, run_log: RunLog, view: RunView, now_s: float) -> list[str]:
    if view.commit is None:
        return []
    listed, kept = retention.listed_directories(store), kept_directories(run_log, view)
    if _is_complete(view):
        return retention.unnamed(listed, kept)
    newest = view.commit.newest
    old = retention.leftovers(listed, kept, view.generation_number, newest.step)
    passed = [each for each in retention.overtaken(listed, kept, newest) if each not in old]
    return [*old, *_removable(run_log, view, newest, passed, now_s)]


def _is_complete(view: RunView) -> bool:
    return view.stop is not None and view.stop.reason == COMPLETED


def _removable(
    run_log: RunLog, view: RunView, newest: Checkpoint, passed: Collection[str], now_s: float
) -> Sequence[str]:
    """Which directories of the newest checkpoint's generation, before its step, may go.

    They were committed, and so have expired. Or they are attempts, and the COMMIT of a later step is old enough.
    Follows the COMMIT records back to the first of these steps: two requests for each.
    """
    waiting = {each: parse_directory(each).step for each in passed}
    overtaken_at_s: dict[str, float] = {}
    found: list[str] = []
    if view.head is None or not waiting:
        return found
    for record in run_log.chain(view.head, Kind.COMMIT):
        if not isinstance(record.body, Commit):
            continue
        committed = record.body.newest
        if committed.generation != newest.generation or committed.step < min(waiting.values()):
            break
        if waiting.pop(committed.directory, None) is not None:
            found.append(committed.directory)
        at_s = datetime.datetime.fromisoformat(record.time).timestamp()
        overtaken_at_s |= {each: at_s for each, step in waiting.items() if step < committed.step}
        if not waiting:
            break
    return found + [each for each in waiting if now_s - overtaken_at_s[each] >= OVERTAKEN_AGE_S]
