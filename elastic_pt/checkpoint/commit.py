"""Commits the uploaded shards of a step as a checkpoint.

    expect ─► due ─► read notices ─► publish manifest ─► history ─► COMMIT ─► release the workers ─► Tidier: delete what expired

Every node that saves a checkpoint expects it. `in_flight` decides which of them commits, from the log alone, and whether
the checkpoint may still be committed. So the upload of a checkpoint may take longer than its generation lives: when the
members change, another node takes over. The COMMIT is fenced with the newest generation, and it never follows one of a
later step. The node reads a few KB per node and nothing per worker. Another thread deletes, once the workers are released,
and retries a failed delete after a later commit.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import structlog

from elastic_pt.checkpoint import in_flight, retention
from elastic_pt.checkpoint.history import Line, StepHistory, write_history
from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.checkpoint.layout import checkpoint_directory
from elastic_pt.checkpoint.nodes import notice_key
from elastic_pt.checkpoint.publish import Collector, ShareMissing, publish_manifest
from elastic_pt.checkpoint.sweep import Sweeper
from elastic_pt.errors import AlreadyExists, CheckpointError, FencedError, LogDamaged, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Generation, Stop
from elastic_pt.store.port import Store

_DUE_MAX: Final = 8
"""More checkpoints than a node can have in flight, also if the members change while commits fail."""
_POLL_MIN_S: Final = 0.05
_POLL_MAX_S: Final = 0.5
_POLL_SHARE: Final = 0.1
"""The pause between two polls, as a share of the time waited. So polling adds at most this share to the wait."""

log = structlog.get_logger("elastic_pt.checkpoint.commit")


def directory_of(generation: Generation, step: int) -> str:
    """The directory of a generation's checkpoint of a step. A generation's number is unique in the log."""
    return checkpoint_directory(step, generation.number, generation.members[0].incarnation)


@dataclass(frozen=True)
class CommitRules:
    """What a run's configuration says about commits."""

    keep: int
    keep_every_steps: int
    last_step: int
    timeout_s: float
    """How long a node's notice may be missing."""
    tidy: bool = True
    """`checkpoint.tidy`."""


class CommitListener(Protocol):
    """Called in the committer's threads."""

    def committed(self, checkpoint: Checkpoint) -> None:
        """This node has appended a COMMIT."""

    def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
        """A checkpoint that was expected is no longer due: committed (by any node), given up, or failed."""

    def untidy(self, failure: Exception) -> None:
        """Old checkpoints could not be removed."""


@dataclass(frozen=True)
class _Due:
    """A checkpoint to commit."""

    step: int
    generation: Generation
    request: int
    """The newest request for a checkpoint that it meets."""
    since_s: float
    collector: Collector

    @property
    def directory(self) -> str:
        return directory_of(self.generation, self.step)


class Committer:
    """Commits the checkpoints of which this node has a part, if it is this node's turn. Agent process, own thread."""

    def __init__(
        self,
        store: Store,
        run_log: RunLog,
        history: StepHistory,
        incarnation: str,
        rules: CommitRules,
        listener: CommitListener,
    ) -> None:
        """`incarnation` is this node's."""
        self._store = store
        self._log = run_log
        self._history = history
        self._incarnation = incarnation
        self._rules = rules
        self._listener = listener
        self._tidier = Tidier(store, run_log, on_failure=listener.untidy)
        self._changed = threading.Condition()
        self._due: list[_Due] = []
        """Oldest first."""
        self._finishing: Generation | None = None
        """The generation whose workers have done the last step, until the run has ended."""
        self._store_fails = False
        """Whether a request of the last look failed."""
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="commit", daemon=True)
        self._thread.start()

    def note_step(self, generation: int, message: dict[str, Any]) -> None:
        """Remember a step for the history of the next commit. Every node does so: any node may commit next."""
        self._history.forget(self._log.view.committed_step)
        self._history.add({"generation": generation} | message)

    def expect(self, step: int, generation: Generation, request: int = -1) -> None:
        """The nodes of `generation` are uploading the checkpoint of `step`: commit it if it is this node's turn.

        It meets the operator's `request`, and older ones.
        """
        collector = Collector(
            self._store, directory_of(generation, step), generation.worker_ranks()
        )
        with self._changed:
            dropped, self._due = self._due[: 1 - _DUE_MAX], self._due[1 - _DUE_MAX :]
            self._due.append(_Due(step, generation, request, time.monotonic(), collector))
            self._changed.notify_all()
        for due in dropped:
            self._listener.ended(due.generation, due.step, None)

    def expected(self) -> list[tuple[Generation, int]]:
        """Generation and step of the checkpoints that are due."""
        with self._changed:
            return [(each.generation, each.step) for each in self._due]

    def finish(self, generation: Generation) -> None:
        """Append STOP when the checkpoint of the last step is committed. The workers of `generation` have done it."""
        with self._changed:
            self._finishing = generation
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Finish the commits that are this node's, for at most `timeout_s`."""
        give_up_at_s = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._acts(), timeout_s)
            self._closed = True
            self._changed.notify_all()
        self._tidier.close(max(0.0, give_up_at_s - time.monotonic()))

    # ---- in the committer's thread --------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._due or self._finishing is not None or self._closed
                )
                if self._closed:
                    return
                due = list(self._due)
            self._store_fails = False
            # The newest first: once it is committed, the others are over.
            for each in reversed(due):
                self._look_at(each)
            self._finish()
            self._pause(due)

    def _acts(self) -> bool:
        return any(self._is_mine(self._log.view, each) for each in self._due)

    def _is_mine(self, view: RunView, due: _Due) -> bool:
        member = in_flight.committer(view, due.generation.number)
        return member is not None and member.incarnation == self._incarnation

    def _pause(self, seen: list[_Due]) -> None:
        """Wait until the next look. Without a checkpoint of its own this node looks only into its memory."""
        view, now_s = self._log.view, time.monotonic()
        waited_s = [now_s - each.since_s for each in seen if self._is_mine(view, each)]
        seconds = _POLL_SHARE * min(waited_s) if waited_s else _POLL_MAX_S
        if self._finishing is not None:
            seconds = 0.0
        if self._store_fails:
            seconds = _POLL_MAX_S
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._due != seen,
                max(_POLL_MIN_S, min(seconds, _POLL_MAX_S)),
            )

    def _look_at(self, due: _Due) -> None:
        """Commit a checkpoint if it is complete and this node's turn, and drop it when it is over."""
        expired: _Expired | None = None
        failure: Exception | None = None
        view = self._log.view
        why = self._over(view, due)
        try:
            if not why:
                expired = self._commit(view, due)
        except FencedError as error:
            # Another record came first. The next look decides again.
            log.info("commit_fenced", step=due.step, reason=str(error))
        except StoreError as error:
            # The workers do not wait for the commit, so it can wait for the store.
            self._store_fails = True
            if isinstance(error, AlreadyExists | LogDamaged) or self._is_late(due):
                failure = error
            else:
                log.warning("commit_delayed", step=due.step, cause=str(error))
        # Any error: report it to the agent and keep the thread alive. Without the thread there are no more commits.
        except Exception as error:
            failure = error
        if expired is None and failure is None and not why:
            return
        if why and view.committed_step != due.step:
            log.info("commit_abandoned", step=due.step, directory=due.directory, reason=why)
        self._listener.ended(due.generation, due.step, failure)
        if expired is not None:
            failpoint(Failpoint.COMMIT_RELEASED)
            self._tidy(expired)
        # At last: `close` waits for it.
        with self._changed:
            # `expect` may have dropped it meanwhile.
            self._due = [each for each in self._due if each is not due]
            self._changed.notify_all()

    def _finish(self) -> None:
        generation = self._finishing
        if generation is None:
            return
        view, last_step = self._log.view, self._rules.last_step
        if view.stop is None and view.generation_number == generation.number:
            if view.committed_step < last_step:
                return
            try:
                view = self._log.append(
                    lambda _: Stop(COMPLETED, last_step), generation=generation.number
                )
                failpoint(Failpoint.STOP_APPENDED)
                log.info("stop", reason=COMPLETED, step=last_step)
                if view.checkpoints[0].generation != generation.number:
                    # Its committer was perhaps killed before it removed what had expired.
                    self._tidy(_Expired(view, set(), last=True))
            except FencedError as error:
                log.info("stop_fenced", reason=str(error))
            except StoreError as error:
                self._store_fails = True
                log.warning("stop_delayed", cause=str(error))
                return
        with self._changed:
            if self._finishing is generation:
                self._finishing = None
        self._listener.ended(generation, last_step, None)

    def _commit(self, view: RunView, due: _Due) -> "_Expired | None":
        """Append the COMMIT if it is this node's turn and all notices are there; None if not yet."""
        if not self._is_mine(view, due) or not self._is_complete(view, due):
            return None
        failpoint(Failpoint.COMMIT_COLLECTED)
        checkpoint = publish_manifest(self._store, due.collector.notices)
        before = self._log.refresh()
        if self._over(before, due) or not self._is_mine(before, due):
            return None
        lines = self._write_history(before, due)
        failpoint(Failpoint.HISTORY_WRITTEN)
        history = _history_key(due.directory, before.length)
        if lines:
            checkpoint = replace(checkpoint, loss=json.loads(lines[-1].text)["loss"])

        gone: set[str] = set()

        def commit(view: RunView) -> Commit:
            if view.commit != before.commit:
                raise FencedError("another checkpoint was committed first")
            # The log calls this again after each lost race. Only checkpoints that the last call drops may be deleted.
            gone.clear()
            candidates = (self._marked(checkpoint, view), *view.checkpoints)
            expired = retention.expired(candidates, self._rules.keep)
            gone.update(each.directory for each in expired)
            kept = tuple(retention.kept(candidates, self._rules.keep))
            met = -1 if view.commit is None else view.commit.request
            return Commit(
                kept,
                history,
                permanent_before=view.permanent_record,
                request=max(due.request, met),
            )

        after = self._log.append(commit, generation=before.generation_number)
        failpoint(Failpoint.COMMIT_APPENDED)
        log.info("commit", step=due.step, directory=due.directory, loss=checkpoint.loss)
        self._history.forget(due.step)
        self._listener.committed(checkpoint)
        return _Expired(after, gone, last=due.step >= self._rules.last_step)

    def _tidy(self, expired: "_Expired") -> None:
        if self._rules.tidy:
            self._tidier.tidy(expired)

    def _over(self, view: RunView, due: _Due) -> str:
        why = in_flight.over(view, due.generation.number, due.step)
        late = self._is_late(due) and not self._is_mine(view, due)
        return why or ("no other node has committed it in time" if late else "")

    def _is_late(self, due: _Due) -> bool:
        return time.monotonic() - due.since_s >= self._rules.timeout_s

    def _is_complete(self, view: RunView, due: _Due) -> bool:
        """Whether all notices are there. Raises `ShareMissing` if one does not come."""
        if due.collector.read_more():
            return True
        first_rank = due.collector.missing.start
        key = notice_key(due.directory, first_rank)
        if self._is_late(due):
            raise ShareMissing(f"{key}: missing after {self._rules.timeout_s} s", first_rank)
        return False

    def _marked(self, checkpoint: Checkpoint, view: RunView) -> Checkpoint:
        """The checkpoint as a COMMIT after `view` records it: permanent or not."""
        previous = next(self._log.usable(view), None)
        previous_step = 0 if previous is None else previous.step
        permanent = retention.is_permanent(
            checkpoint.step, previous_step, self._rules.keep_every_steps
        )
        return replace(checkpoint, permanent=permanent)

    def _write_history(self, view: RunView, due: _Due) -> Sequence[Line]:
        lines = self._history.through(due.step, after=view.committed_step)
        write_history(self._store, _history_key(due.directory, view.length), lines)
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
            try:
                retention.remove(self._store, directory)
                log.info("checkpoint_removed", directory=directory)
            except CheckpointError as error:
                # A COMMIT of somebody else named it. It is no checkpoint, so nothing of it is ever removed.
                self._on_failure(error)
            self._expired.discard(directory)


def _history_key(directory: str, record: int) -> str:
    """The key of a history. Another attempt, by any node, would be another record and has other lines."""
    return f"history/{directory.removeprefix('ckpt/')}-{record}.jsonl"
