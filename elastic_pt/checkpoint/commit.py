"""From uploaded shards to a checkpoint that counts: what the committing node does, one step after the other.

    collect notices ─► publish manifest ─► history ─► COMMIT ─► workers go on ─► Tidier: remove what expired

The node of rank 0 commits, in a thread of its agent. If the generation is replaced meanwhile, the log's fence
refuses the COMMIT, and nothing is appended. The node reads a few KB per node and nothing per worker. Deletes
have a thread of their own and begin once the workers go on: nothing waits for them, and one that fails is
tried again after a later commit.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from elastic_pt.checkpoint import retention
from elastic_pt.checkpoint.history import Line, StepHistory, write_history
from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.checkpoint.layout import checkpoint_directory
from elastic_pt.checkpoint.publish import collect, publish_manifest
from elastic_pt.errors import FencedError
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Generation, Stop
from elastic_pt.store.port import Store

_POLL_INTERVAL_S: Final = 0.05

log = structlog.get_logger("elastic_pt.checkpoint.commit")


def directory_of(generation: Generation, step: int) -> str:
    """Where a generation puts the checkpoint of a step. A generation's number is unique in the log."""
    return checkpoint_directory(step, generation.number, generation.members[0].incarnation)


@dataclass(frozen=True)
class _Due:
    """A checkpoint to commit, or (`step` None) the end of the run to record."""

    step: int | None
    generation: Generation
    request: int = -1
    """The newest request for a checkpoint that it meets."""


class Committer:
    """Commits checkpoints whose first shard was staged on this node. Agent process, own thread."""

    def __init__(
        self,
        store: Store,
        run_log: RunLog,
        *,
        keep: int,
        last_step: int,
        timeout_s: float,
        superseded: Callable[[int], bool],
        on_commit: Callable[[Checkpoint], None],
        on_done: Callable[[int], None],
        on_failure: Callable[[Generation, int, Exception], None],
        on_untidy: Callable[[Exception], None],
    ) -> None:
        self._store = store
        self._log = run_log
        self._keep = keep
        self._last_step = last_step
        self._timeout_s = timeout_s
        self._superseded = superseded
        self._on_commit = on_commit
        self._on_done = on_done
        self._on_failure = on_failure
        self._tidier = Tidier(store, on_failure=on_untidy)
        self._history = StepHistory()
        self._history_lock = threading.Lock()
        self._newest = (0, 0)
        """Generation and step of the newest checkpoint that is due."""
        self._jobs = JobThread("commit", self._do)

    def note_step(self, generation: int, message: dict[str, Any]) -> None:
        """Remember a step for the history of the next commit."""
        with self._history_lock:
            self._history.add({"generation": generation} | message)

    def expect(self, step: int, generation: Generation, request: int = -1) -> None:
        """A checkpoint of `step` is being uploaded by all nodes of `generation`; it meets `request` and older ones."""
        self._newest = (generation.number, step)
        self._jobs.submit(_Due(step, generation, request))

    def finish(self, generation: Generation) -> None:
        """The workers of `generation` have done the last step: end the run once its checkpoint is committed."""
        self._jobs.submit(_Due(None, generation))

    def close(self, timeout_s: float) -> None:
        """Finish what is due, within a bounded time."""
        give_up_at_s = time.monotonic() + timeout_s
        self._jobs.close(timeout_s)
        self._tidier.close(max(0.0, give_up_at_s - time.monotonic()))

    def _do(self, due: _Due) -> None:
        step = self._last_step if due.step is None else due.step
        expired: _Expired | None = None
        try:
            if due.step is None:
                self._stop(due.generation)
            else:
                expired = self._commit(due.step, due.generation, due.request)
        except FencedError as error:
            log.info("commit_fenced", step=step, reason=str(error))
        # Every error: report it to the agent and keep the thread alive, or no commit would follow.
        except Exception as error:
            self._on_failure(due.generation, step, error)
        self._on_done(step)
        if expired is not None:
            self._tidier.tidy(expired)

    def _stop(self, generation: Generation) -> None:
        view = self._log.refresh()
        if view.checkpoints and view.checkpoints[0].step >= self._last_step:
            self._log.append(
                lambda _: Stop(COMPLETED, self._last_step), generation=generation.number
            )
            log.info("stop", reason=COMPLETED, step=self._last_step)

    def _commit(self, step: int, generation: Generation, request: int) -> "_Expired | None":
        directory = directory_of(generation, step)
        notices = collect(
            self._store,
            directory,
            generation.worker_ranks(),
            timeout_s=self._timeout_s,
            now=time.monotonic,
            wait=time.sleep,
            poll_interval_s=_POLL_INTERVAL_S,
            # Do not wait for missing parts once a newer checkpoint is due.
            should_stop=lambda: (
                self._superseded(generation.number) or self._newest > (generation.number, step)
            ),
        )
        if notices is None:
            log.info("commit_abandoned", step=step, directory=directory)
            return None
        checkpoint = publish_manifest(self._store, notices)
        history = self._write_history(directory, step)
        if history:
            checkpoint = replace(checkpoint, loss=json.loads(history[-1].text)["loss"])

        gone: set[str] = set()

        def commit(view: RunView) -> Commit:
            # The log calls this again after each lost race: only what the last call drops may be deleted.
            gone.clear()
            candidates = (checkpoint, *view.checkpoints)
            expired = retention.expired(candidates, self._keep)
            gone.update(each.directory for each in expired)
            kept = tuple(each for each in candidates if each.directory not in gone)
            met = -1 if view.commit is None else view.commit.request
            return Commit(kept, _history_key(directory), max(request, met))

        view = self._log.append(commit, generation=generation.number)
        log.info("commit", step=step, directory=directory, loss=checkpoint.loss)
        with self._history_lock:
            self._history.forget(step)
        self._on_commit(checkpoint)
        return _Expired(view, gone)

    def _write_history(self, directory: str, step: int) -> list[Line]:
        with self._history_lock:
            lines = self._history.through(step)
        write_history(self._store, _history_key(directory), lines)
        return lines


@dataclass(frozen=True)
class _Expired:
    """What a COMMIT leaves to be removed."""

    view: RunView
    directories: set[str]
    """Checkpoints that it no longer keeps."""


class Tidier:
    """Removes what the log does not keep any more. Agent process, own thread.

    A failure is told by `on_failure` and changes nothing: what is left is removed after a later commit.
    """

    def __init__(self, store: Store, *, on_failure: Callable[[Exception], None]) -> None:
        self._store = store
        self._on_failure = on_failure
        self._expired: set[str] = set()
        """Checkpoints that a commit no longer keeps and that are not removed yet."""
        self._jobs = JobThread("tidy", self._do)

    def tidy(self, expired: _Expired) -> None:
        """Remove, soon, the expired checkpoints and the uploads that nothing can commit any more."""
        # One removal does the work of all that wait, so the queue cannot grow.
        waiting = self._jobs.discard()
        directories = expired.directories.union(*(each.directories for each in waiting))
        self._jobs.submit(_Expired(expired.view, directories))

    def close(self, timeout_s: float) -> None:
        """Finish what is due, within a bounded time."""
        self._jobs.close(timeout_s)

    def _do(self, due: _Expired) -> None:
        self._expired |= due.directories
        try:
            self._remove(due.view)
        # Every error: keep the thread alive, or no later checkpoint would be removed.
        except Exception as error:
            self._on_failure(error)

    def _remove(self, view: RunView) -> None:
        kept = {each.directory for each in view.checkpoints}
        newest_step = view.checkpoints[0].step if view.checkpoints else 0
        torn = retention.leftovers(
            retention.listed_directories(self._store), kept, view.generation_number, newest_step
        )
        for directory in sorted((self._expired | set(torn)) - kept):
            retention.remove(self._store, directory)
            self._expired.discard(directory)
            log.info("checkpoint_removed", directory=directory)


def _history_key(directory: str) -> str:
    return f"history/{directory.removeprefix('ckpt/')}.jsonl"
