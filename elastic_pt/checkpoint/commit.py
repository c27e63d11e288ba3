"""Commits the uploaded shards of a step as a checkpoint.

    collect notices ─► publish manifest ─► history ─► COMMIT ─► release the workers ─► Tidier: delete what expired

The node of rank 0 commits, in a thread of its agent. If a newer generation has started by then, the log's fence
refuses the COMMIT, and nothing is appended. The node reads a few KB per node and nothing per worker. Another
thread deletes, after the workers were released. Nothing waits for a delete. A failed delete is retried after a
later commit.
"""

import json
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
from elastic_pt.checkpoint.sweep import Sweeper
from elastic_pt.errors import FencedError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Generation, Stop
from elastic_pt.store.port import Store

_POLL_INTERVAL_S: Final = 0.05

log = structlog.get_logger("elastic_pt.checkpoint.commit")


def directory_of(generation: Generation, step: int) -> str:
    """The directory of a generation's checkpoint of a step. A generation's number is unique in the log."""
    return checkpoint_directory(step, generation.number, generation.members[0].incarnation)


def committed_step(view: RunView) -> int:
    """The step of the newest checkpoint that exists; 0 if there is none."""
    return view.checkpoints[0].step if view.checkpoints else 0


@dataclass(frozen=True)
class _Due:
    """A job: commit the checkpoint of `step`, or append STOP if `step` is None."""

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
        history: StepHistory,
        *,
        keep: int,
        keep_every_steps: int,
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
        self._keep_every_steps = keep_every_steps
        self._last_step = last_step
        self._timeout_s = timeout_s
        self._superseded = superseded
        self._on_commit = on_commit
        self._on_done = on_done
        self._on_failure = on_failure
        self._tidier = Tidier(store, run_log, on_failure=on_untidy)
        self._history = history
        self._newest = (0, 0)
        """Generation and step of the newest checkpoint that is due."""
        self._jobs = JobThread("commit", self._do)

    def note_step(self, generation: int, message: dict[str, Any]) -> None:
        """Remember a step for the history of the next commit. Every node does so: any node may commit next."""
        self._history.forget(committed_step(self._log.view))
        self._history.add({"generation": generation} | message)

    def expect(self, step: int, generation: Generation, request: int = -1) -> None:
        """Commit the checkpoint of `step`, which all nodes of `generation` are uploading now.

        It meets the operator's `request`, and older ones.
        """
        self._newest = (generation.number, step)
        self._jobs.submit(_Due(step, generation, request))

    def finish(self, generation: Generation) -> None:
        """Append STOP if the checkpoint of the last step is committed. The workers of `generation` have done it."""
        self._jobs.submit(_Due(None, generation))

    def close(self, timeout_s: float) -> None:
        """Finish the jobs that are due, for at most `timeout_s`."""
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
        # Any error: report it to the agent and keep the thread alive. Without the thread there are no more commits.
        except Exception as error:
            self._on_failure(due.generation, step, error)
        self._on_done(step)
        failpoint(Failpoint.COMMIT_RELEASED)
        if expired is not None:
            self._tidier.tidy(expired)

    def _stop(self, generation: Generation) -> None:
        view = self._log.refresh()
        if view.checkpoints and view.checkpoints[0].step >= self._last_step:
            view = self._log.append(
                lambda _: Stop(COMPLETED, self._last_step), generation=generation.number
            )
            failpoint(Failpoint.STOP_APPENDED)
            log.info("stop", reason=COMPLETED, step=self._last_step)
            if view.checkpoints[0].generation != generation.number:
                # The generation that committed the last step was killed, perhaps before it removed what expired.
                self._tidier.tidy(_Expired(view, set(), last=True))

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
            # Do not wait for missing notices once a newer checkpoint is due.
            should_stop=lambda: (
                self._superseded(generation.number) or self._newest > (generation.number, step)
            ),
        )
        if notices is None:
            log.info("commit_abandoned", step=step, directory=directory)
            return None
        failpoint(Failpoint.COMMIT_COLLECTED)
        checkpoint = publish_manifest(self._store, notices)
        history = self._write_history(directory, step)
        failpoint(Failpoint.HISTORY_WRITTEN)
        if history:
            checkpoint = replace(checkpoint, loss=json.loads(history[-1].text)["loss"])

        gone: set[str] = set()

        def commit(view: RunView) -> Commit:
            # The log calls this again after each lost race. Only checkpoints that the last call drops may be deleted.
            gone.clear()
            candidates = (self._marked(checkpoint, view), *view.checkpoints)
            expired = retention.expired(candidates, self._keep)
            gone.update(each.directory for each in expired)
            kept = tuple(retention.kept(candidates, self._keep))
            met = -1 if view.commit is None else view.commit.request
            return Commit(
                kept,
                _history_key(directory),
                permanent_before=view.permanent_record,
                request=max(request, met),
            )

        view = self._log.append(commit, generation=generation.number)
        failpoint(Failpoint.COMMIT_APPENDED)
        log.info("commit", step=step, directory=directory, loss=checkpoint.loss)
        self._history.forget(step)
        self._on_commit(checkpoint)
        return _Expired(view, gone, last=step >= self._last_step)

    def _marked(self, checkpoint: Checkpoint, view: RunView) -> Checkpoint:
        """The checkpoint as a COMMIT after `view` records it: permanent or not."""
        previous = next(self._log.usable(view), None)
        previous_step = 0 if previous is None else previous.step
        permanent = retention.is_permanent(checkpoint.step, previous_step, self._keep_every_steps)
        return replace(checkpoint, permanent=permanent)

    def _write_history(self, directory: str, step: int) -> list[Line]:
        lines = self._history.through(step)
        write_history(self._store, _history_key(directory), lines)
        return lines


@dataclass(frozen=True)
class _Expired:
    """What can be removed after a COMMIT."""

    view: RunView
    directories: set[str]
    """Checkpoints that the COMMIT no longer keeps."""
    last: bool
    """Whether it is the last commit of the run."""


class Tidier:
    """Removes checkpoints that the log no longer keeps. Agent process, own thread.

    `on_failure` reports a failure. The remaining files are removed after a later commit.
    """

    def __init__(
        self, store: Store, run_log: RunLog, *, on_failure: Callable[[Exception], None]
    ) -> None:
        self._store = store
        self._sweeper = Sweeper(store, run_log, now=time.monotonic)
        self._on_failure = on_failure
        self._expired: set[str] = set()
        """Checkpoints that a commit no longer keeps and that are not removed yet."""
        self._jobs = JobThread("tidy", self._do)

    def tidy(self, expired: _Expired) -> None:
        """Queue a removal of the expired checkpoints and of the uploads that nothing can commit any more."""
        # Merge all waiting removals into one, so that the queue cannot grow.
        waiting = self._jobs.discard()
        directories = expired.directories.union(*(each.directories for each in waiting))
        self._jobs.submit(replace(expired, directories=directories))

    def close(self, timeout_s: float) -> None:
        """Finish the removals that are due, for at most `timeout_s`."""
        self._jobs.close(timeout_s)

    def _do(self, due: _Expired) -> None:
        self._expired |= due.directories
        try:
            self._remove(due.view)
            self._sweeper.sweep(due.view, last=due.last)
        # Any error: keep the thread alive. Without it no later checkpoint would be removed.
        except Exception as error:
            self._on_failure(error)

    def _remove(self, view: RunView) -> None:
        kept = {each.directory for each in view.checkpoints}
        for directory in sorted(self._expired - kept):
            retention.remove(self._store, directory)
            self._expired.discard(directory)
            log.info("checkpoint_removed", directory=directory)


def _history_key(directory: str) -> str:
    return f"history/{directory.removeprefix('ckpt/')}.jsonl"
