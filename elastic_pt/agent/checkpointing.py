"""A node's share in checkpoints (agent process): the agent's side of the operations of `train.checkpoints`.

    load    `choose_resume`: the newest checkpoint with all its files, for a new generation
    save    upload a state that a worker keeps in a buffer; on one node also commit
    wait    after the workers' last step: until their last checkpoint is committed, or their last state is in memory
    close   finish the commits that are due, within a bounded time

    kept buffer ─► Uploads ───► bucket        (every node)
                   Committer ─► COMMIT        (the node that `checkpoint.in_flight` chooses)
    uploaded ─► `released` ─► workers may overwrite the buffer, and save the next one

Uploads and commits outlive their generation; `checkpoint.in_flight` decides how long. The share of a node that is no
member any more is uploaded by its mirror.
Called from the threads of the channel, the upload, the commit and the membership, and from the main thread.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog

from elastic_pt.agent.uploads import Uploads
from elastic_pt.checkpoint.commit import CommitRules, Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.publish import ShareMissing
from elastic_pt.checkpoint.snapshot import Buffer, Snapshot
from elastic_pt.checkpoint.upload import KeptShard
from elastic_pt.checkpoint.verify import quick_check
from elastic_pt.config import Config
from elastic_pt.errors import AccessDenied, CheckpointError, ElasticPtError, FencedError, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.node import Formed, Node
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Generation, Kind, Quarantine
from elastic_pt.runlog.state import State
from elastic_pt.store.port import Store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.workers.channel import Message

log = structlog.get_logger("elastic_pt.agent.checkpointing")


def choose_resume(
    store: Store, run_log: RunLog, view: RunView, incarnation: str
) -> Checkpoint | None:
    """The newest checkpoint with all its files; incomplete ones are quarantined with the reason.

    A member of the newest generation (by `incarnation`) does not check a checkpoint that was committed since this
    generation began: every file was checked at its commit, just before. None at the start of a run. Raises
    `CheckpointError` if checkpoints were committed and none is usable.
    """
    generation, latest = view.generation, {} if view.head is None else view.head.latest
    inside = generation is not None and generation.rank_of(incarnation) is not None
    since = latest.get(Kind.COMMIT, -1) > latest.get(Kind.GENERATION, -1)
    for checkpoint in run_log.usable(view):
        if inside and since and view.commit is not None and checkpoint == view.commit.newest:
            return checkpoint
        try:
            quick_check(store, checkpoint, view.run_id)
            return checkpoint
        except CheckpointError as error:
            quarantine(run_log, view.generation_number, checkpoint.directory, str(error))
    if view.commit is not None:
        raise CheckpointError(
            f"{store.url}: none of the committed checkpoints is usable; "
            "`elastic-pt checkpoints --verify` and `elastic-pt log` show why"
        )
    return None


def quarantine(run_log: RunLog, generation: int, directory: str, why: str) -> None:
    """Append a QUARANTINE: a committed checkpoint must not be used any more. Only the first node that finds it does."""

    def make(view: RunView) -> Quarantine:
        if directory in view.quarantined:
            raise FencedError(f"{directory} is quarantined already")
        return Quarantine(directory, why)

    try:
        run_log.append(make, generation=generation)
        failpoint(Failpoint.QUARANTINE_APPENDED)
        log.error("checkpoint_quarantined", directory=directory, why=why)
    except FencedError as error:
        log.info("quarantine_fenced", directory=directory, why=why, reason=str(error))
    except StoreError as error:
        log.error("quarantine_failed", directory=directory, why=why, reason=str(error))


@dataclass(frozen=True)
class Lost:
    """A checkpoint that cannot be committed, and which node is the cause."""

    generation: int
    step: int
    why: str
    own: bool
    """Whether this node could not upload its share; else another node could not."""


class KeptStates(Protocol):
    """The states in this node's memory that are kept for the bucket (`agent.snapshots`)."""

    def checkpoints(self) -> tuple[State, ...]:
        """All of them."""

    def kept_state(self, generation: int, step: int) -> Mapping[int, tuple[Path, Snapshot]]:
        """The buffer files of one, by rank: of this node's workers, and copies of neighbours'."""


class Checkpointing:
    """The operations `save`, `wait` and `close`, for one node and all its generations."""

    def __init__(
        self,
        config: Config,
        store: Store,
        run_log: RunLog,
        node: Node,
        metrics: Metrics,
        scratch: Path,
        history: StepHistory,
        *,
        states: KeptStates,
        release: Callable[[int, int, range | None], None],
    ) -> None:
        """`release(generation, step, ranks)` frees the buffers of these ranks, or of all, and tells the workers."""
        self._node = node
        self._log = run_log
        self._metrics = metrics
        self._scratch = scratch
        self._states = states
        self._release = release
        self._settle_timeout_s = config.elastic.settle_timeout_s
        self._mirror_timeout_s = config.elastic.heartbeat_timeout_s
        self._lost: Lost | None = None
        """The last checkpoint that cannot be committed, as far as this node knows."""
        self._lock = threading.Lock()
        self._expected = State(0, 0)
        """The newest checkpoint that the committer expects."""
        self._newest: tuple[Checkpoint, ...] = ()
        """The newest checkpoint that this node has seen committed."""
        self._tidy_denied = False
        """Whether the store has refused a delete."""
        self._uploads = Uploads(
            store,
            on_uploaded=self._uploaded,
            on_failed=self._upload_failed,
            on_dropped=self._upload_dropped,
            on_sent=self._sent,
        )
        self._committer = Committer(
            store,
            run_log,
            history,
            node.member.incarnation,
            CommitRules(
                keep=config.checkpoint.keep,
                keep_every_steps=config.checkpoint.keep_every_steps,
                last_step=config.train.steps,
                timeout_s=config.elastic.settle_timeout_s,
                tidy=config.checkpoint.tidy,
            ),
            self,
        )
        self.saved_step = 0
        """Step of the newest checkpoint that a worker of this node has saved, or had no room for."""

    # ---- one generation ------------------------------------------------------------------------

    def starts(self, generation: Generation) -> None:
        """Workers of a new generation are about to start."""
        self._release_forgotten()
        for before, step in self._committer.expected():
            for rank, member in enumerate(before.members):
                if generation.rank_of(member.incarnation) is None:
                    self._adopt(before, step, before.worker_ranks()[rank])

    def save(self, message: Message) -> None:
        """A worker's message `snapshot` of a checkpoint, `no_room` or `skipped` (see `train.checkpoints`)."""
        kind, step, formed = message["kind"], int(message["step"]), self._node.formed
        generation = formed.generation
        if message["generation"] != generation.number:
            # A worker that outlived its generation. Its node has written it off.
            log.info("stale_shard_dropped", step=step, generation=message["generation"])
            return
        if kind == "no_room":
            log.warning("checkpoint_waits_for_room", step=step, cause=message["why"])
            return
        self.saved_step = step
        state = State(generation.number, step)
        ranks = generation.worker_ranks()[formed.node_rank]
        if kind == "snapshot":
            self._metrics.checkpoint_stage_seconds.set(message["seconds"])
            buffer = Buffer(message["generation"], message["rank"], message["buffer"])
            path, missing = buffer.path(self._scratch), ""
        else:
            path, missing = Path(), message["why"]
            self._metrics.checkpoint_skips.inc()
            log.warning("checkpoint_skipped", step=step, cause=missing)
            self._lose(state, missing, own=True)
        try:
            # Uploaded even when missing: the uploader writes a refusal, so that no node waits.
            self._uploads.add(self._shard(generation, step, path, message["rank"], ranks, missing))
        except ElasticPtError as error:
            self._upload_failed(state, error)
        self._expect(state, generation, int(message.get("request", -1)))

    def _shard(
        self, of: Generation, step: int, path: Path, rank: int, ranks: range, missing: str = ""
    ) -> KeptShard:
        return KeptShard(path, self._node.view.run_id, directory_of(of, step), rank, ranks, missing)

    def _adopt(self, of: Generation, step: int, ranks: range) -> None:
        """Upload the share of a node that is no member any more, if this node has copies of all its shards."""
        copies = self._states.kept_state(of.number, step)
        if all(rank in copies for rank in ranks):
            log.info("upload_adopted", step=step, generation=of.number, first_rank=ranks.start)
            self._uploads.adopt(
                [
                    replace(self._shard(of, step, copies[rank][0], rank, ranks), adopted=True)
                    for rank in ranks
                ]
            )

    def _expect(self, state: State, generation: Generation, request: int) -> None:
        """Have the checkpoint committed; once for all workers of this node."""
        with self._lock:
            if state <= self._expected:
                return
            self._expected = state
        self._committer.expect(state.step, generation, request)

    def note_step(self, message: Message) -> None:
        """Note a step of this node's first worker for the history of the next commit. Any node may commit next."""
        self._committer.note_step(self._node.formed.generation.number, message)

    def stopped(self) -> None:
        """The workers are gone: what all of them have kept is uploaded all the same."""
        self._uploads.stopped("a worker ended before it had saved its state")
        self._release_forgotten()

    def wait(
        self, formed: Formed, mirrors_have_step: Callable[[int, Collection[str]], bool]
    ) -> Settled:
        """The workers stopped as planned: wait until their last state is safe in memory or committed.

        Gives up if the generation is broken, if the checkpoint cannot be committed and no copy in memory follows, or
        after `elastic.settle_timeout_s`. `mirrors_have_step(step, stay)`: the mirrors of this node that stay have its share.
        """
        generation, step = formed.generation, self.saved_step

        def wait(timeout_s: float, given_up: Callable[[], bool]) -> Settled:
            return self._node.await_settled(
                generation,
                step,
                timeout_s,
                given_up,
                lambda stay: mirrors_have_step(step, stay),
            )

        settled = wait(self._settle_timeout_s, self._given_up)
        if not settled and self._given_up() and not self._node.must_reform(generation.number):
            # The bucket is out of the question. The mirrors may not have been asked yet.
            settled = wait(self._mirror_timeout_s, lambda: False)
        return settled

    def await_end(self, formed: Formed) -> bool:
        """The workers did the last step: wait until their last checkpoint is committed, and the run has ended.

        False if the generation is broken, if the checkpoint cannot be committed, or after `elastic.settle_timeout_s`.
        """
        if formed.node_rank == 0:
            self._committer.finish(formed.generation)
        return self._node.await_end(
            formed.generation.number, self._settle_timeout_s, self._given_up
        )

    def _given_up(self) -> bool:
        return self.lost() is not None

    def lost(self) -> Lost | None:
        """Why the checkpoint that was saved last cannot be committed; None while it may be."""
        lost, due = self._lost, (self._node.formed.generation.number, self.saved_step)
        return lost if lost is not None and (lost.generation, lost.step) == due else None

    def failure(self) -> Cause | None:
        """The cause for the other nodes when the checkpoint saved last is lost; None if another node is the cause."""
        lost = self.lost()
        if lost is not None and not lost.own:
            return None
        why = "no node said why" if lost is None else lost.why
        return self._node.failure(
            f"the checkpoint of step {self.saved_step} was not committed: {why}",
            kind=CauseKind.GAVE_UP,
        )

    def pending(self) -> int:
        """The number of checkpoints that this node has not finished: to upload, or not committed yet."""
        expected = {State(each.number, step) for each, step in self._committer.expected()}
        return len(expected | self._uploads.states())

    def close(self, timeout_s: float) -> None:
        """Finish the commits that are due, within a bounded time; drop shards that are not uploaded."""
        self._committer.close(timeout_s)
        self._uploads.close()

    def _release_forgotten(self) -> None:
        """No worker is alive: free the buffers of checkpoints that nobody expects any more."""
        expected = {State(each.number, step) for each, step in self._committer.expected()}
        for state in set(self._states.checkpoints()) - expected - self._uploads.states():
            self._release(*state, None)

    # ---- on the upload and commit threads ----------------------------------------------------

    def _sent(self, size: int, seconds: float) -> None:
        self._metrics.checkpoint_upload_bytes.inc(size)
        self._metrics.checkpoint_upload_seconds.observe(seconds)

    def _uploaded(self, state: State, ranks: range) -> None:
        self._release(*state, ranks)

    def _upload_failed(self, state: State, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        log.error("upload_failed", step=state.step, cause=str(error))
        self._lose(state, str(error), own=True)

    def _upload_dropped(self, state: State, why: str) -> None:
        self._metrics.checkpoint_skips.inc()
        log.info("upload_dropped", step=state.step, generation=state.generation, reason=why)
        self._release(*state, None)

    def committed(self, checkpoint: Checkpoint) -> None:
        """This node has appended a COMMIT."""
        self._metrics.checkpoint_commits.inc()

    def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
        """A checkpoint is committed (by any node), given up, or has failed: its shards are not needed any more."""
        state = State(generation.number, step)
        view = self._log.view
        newest = view.checkpoints[:1]
        if newest and newest != self._newest:
            self._newest = newest
            self._metrics.committed(newest[0].step, view.committed_at_s)
        if failure is not None:
            self._metrics.checkpoint_failures.inc()
            log.error("commit_failed", step=step, cause=str(failure))
            # The missing share may be that of the committing node itself.
            rank = generation.rank_of(self._node.member.incarnation)
            first_rank = -1 if rank is None else generation.first_worker_rank(rank)
            own = not isinstance(failure, ShareMissing) or failure.first_rank == first_rank
            self._lose(state, str(failure), own=own)
        self._uploads.abandon(state)
        self._release(*state, None)
        self._node.notice_log()

    def untidy(self, failure: Exception) -> None:
        """Old checkpoints could not be removed."""
        self._metrics.checkpoint_tidy_failures.inc()
        if not isinstance(failure, AccessDenied):
            log.warning("tidy_failed", cause=str(failure))
        elif not self._tidy_denied:
            # Once: without the right to delete, every commit would say so.
            self._tidy_denied = True
            log.warning(
                "tidy_denied",
                cause=f"{failure}; expected the right to delete, or checkpoint.tidy = false and `elastic-pt tidy`",
            )

    def _lose(self, state: State, why: str, *, own: bool) -> None:
        """The checkpoint of a generation and step cannot be committed: wake the threads that wait for it."""
        known = self._lost
        before = None if known is None else State(known.generation, known.step)
        # Keep the newest one, and the reason that this node has for its own share.
        if before is None or state > before or (own and state == before):
            self._lost = Lost(*state, why, own)
        self._node.notice_log()
