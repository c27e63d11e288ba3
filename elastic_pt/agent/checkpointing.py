"""A node's share in checkpoints (agent process): the agent's side of the operations of `train.checkpoints`.

    load    `choose_resume`: the newest checkpoint with all its files, for a new generation
    save    take a shard that a worker staged ─► upload it; on the node of rank 0 also commit
    wait    after the workers' last step: until their last checkpoint is committed
    close   finish the commits that are due, within a bounded time

    staged ─► Uploader ─► bucket        (every node)
              Committer ─► COMMIT       (the node of rank 0)
    commit or upload ─► `released` ─► workers may stage the next one

Called from the threads of the channel, the upload, the commit and the membership, and from the main thread.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from elastic_pt.checkpoint.commit import Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.layout import parse_directory
from elastic_pt.checkpoint.publish import ShareMissing
from elastic_pt.checkpoint.shard_file import is_staged
from elastic_pt.checkpoint.upload import StagedShard, Uploader
from elastic_pt.checkpoint.verify import quick_check
from elastic_pt.config import Config
from elastic_pt.errors import CheckpointError, ElasticPtError, FencedError, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.node import Formed, Node
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Generation, Quarantine
from elastic_pt.store.port import Store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.workers.channel import Message

log = structlog.get_logger("elastic_pt.agent.checkpointing")


def choose_resume(
    store: Store, run_log: RunLog, view: RunView, incarnation: str
) -> Checkpoint | None:
    """The newest checkpoint with all its files; incomplete ones are quarantined with the reason.

    A member of the newest generation (by `incarnation`) does not check a checkpoint that this generation has
    committed: every file was checked at its commit, just before. None at the start of a run. Raises
    `CheckpointError` if checkpoints were committed and none is usable.
    """
    generation = view.generation
    inside = generation is not None and generation.rank_of(incarnation) is not None
    for checkpoint in run_log.usable(view):
        if inside and checkpoint.generation == view.generation_number:
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
    """Append a QUARANTINE: a committed checkpoint must not be used any more."""
    log.error("checkpoint_quarantined", directory=directory, why=why)
    try:
        run_log.append(lambda _: Quarantine(directory, why), generation=generation)
        failpoint(Failpoint.QUARANTINE_APPENDED)
    except FencedError as error:
        log.info("quarantine_fenced", reason=str(error))
    except StoreError as error:
        log.error("quarantine_failed", reason=str(error))


@dataclass(frozen=True)
class Lost:
    """A checkpoint that cannot be committed, and which node is the cause."""

    generation: int
    step: int
    why: str
    own: bool
    """Whether this node could not upload its share; else another node could not."""


class Checkpointing:
    """The operations `save`, `wait` and `close`, for one node and all its generations."""

    def __init__(
        self,
        config: Config,
        store: Store,
        run_log: RunLog,
        node: Node,
        metrics: Metrics,
        staging: Path,
        history: StepHistory,
        *,
        release: Callable[[int], None],
    ) -> None:
        """`release(step)` lets the workers stage the next checkpoint."""
        self._node = node
        self._metrics = metrics
        self._staging = staging
        self._release = release
        self._settle_timeout_s = config.elastic.settle_timeout_s
        self._workers = node.member.workers
        self._uploads: dict[int, int] = defaultdict(int)
        """Shards of this generation that are done, by step."""
        self._lost: Lost | None = None
        """The last checkpoint that cannot be committed, as far as this node knows."""
        self._uploader = Uploader(store, on_uploaded=self._uploaded, on_failed=self._upload_failed)
        self._committer = Committer(
            store,
            run_log,
            history,
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
            last_step=config.train.steps,
            timeout_s=config.elastic.settle_timeout_s,
            superseded=node.must_reform,
            on_commit=self._committed,
            on_done=release,
            on_failure=self._commit_failed,
            on_untidy=self._untidy,
        )
        self.staged_step = 0
        """Step of the newest shard that a worker of this node has staged."""

    # ---- one generation ------------------------------------------------------------------------

    def starts(self) -> None:
        """Workers of a new generation are about to start."""
        self._uploads.clear()
        self._sweep()

    def save(self, message: Message) -> None:
        """A worker's message `staged`, `no_room` or `skipped` (see `train.checkpoints`)."""
        kind, step, formed = message["kind"], int(message["step"]), self._node.formed
        generation = formed.generation
        if message["generation"] != generation.number:
            # A worker of an earlier generation: its shard belongs to no checkpoint any more.
            log.info("stale_shard_dropped", step=step, generation=message["generation"])
            if kind == "staged":
                Path(message["path"]).unlink(missing_ok=True)
            return
        if kind == "no_room":
            log.warning("staging_waits_for_room", step=step, cause=message["why"])
            return
        self.staged_step = step
        shard = StagedShard(
            path=Path(message["path"]) if kind == "staged" else Path(),
            run_id=self._node.view.run_id,
            directory=directory_of(generation, step),
            rank=message["rank"],
            ranks=generation.worker_ranks()[formed.node_rank],
            missing="" if kind == "staged" else message["why"],
        )
        if kind == "staged":
            self._metrics.checkpoint_stage_seconds.set(message["seconds"])
        else:
            self._metrics.checkpoint_skips.inc()
            log.warning("checkpoint_skipped", step=step, cause=shard.missing)
            self._lose((generation.number, step), shard.missing, own=True)
        try:
            # Uploaded even when missing: the uploader writes a refusal, so that no node waits.
            self._uploader.submit(shard)
            if shard.rank == 0:
                self._committer.expect(step, generation, int(message.get("request", -1)))
        except ElasticPtError as error:
            self._upload_failed(shard, error)

    def note_step(self, message: Message) -> None:
        """Note a step of this node's first worker for the history of the next commit. Any node may commit next."""
        self._committer.note_step(self._node.formed.generation.number, message)

    def stopped(self) -> None:
        """The workers are gone: drop the shards that they staged and that are not being uploaded."""
        self._uploader.discard()
        self._sweep()

    def wait(self, formed: Formed, *, completed: bool) -> bool:
        """The workers stopped as planned: wait until their last checkpoint is committed.

        After the last step (`completed`) wait for the end of the run too. False if the generation is broken, if its
        checkpoint cannot be committed, or after `elastic.settle_timeout_s`.
        """
        number, timeout_s = formed.generation.number, self._settle_timeout_s

        def given_up() -> bool:
            return self.lost() is not None

        if not completed:
            return self._node.await_settled(number, self.staged_step, timeout_s, given_up)
        if formed.node_rank == 0:
            self._committer.finish(formed.generation)
        return self._node.await_end(number, timeout_s, given_up)

    def lost(self) -> Lost | None:
        """Why the checkpoint that was staged last cannot be committed; None while it may be."""
        lost, due = self._lost, (self._node.formed.generation.number, self.staged_step)
        return lost if lost is not None and (lost.generation, lost.step) == due else None

    def failure(self) -> Cause | None:
        """The cause for the other nodes when the checkpoint staged last is lost; None if another node is the cause."""
        lost = self.lost()
        if lost is not None and not lost.own:
            return None
        why = "no node said why" if lost is None else lost.why
        return self._node.failure(
            f"the checkpoint of step {self.staged_step} was not committed: {why}",
            kind=CauseKind.GAVE_UP,
        )

    def close(self, timeout_s: float) -> None:
        """Finish the commits that are due, within a bounded time; drop shards that are not uploaded."""
        self._committer.close(timeout_s)
        self._uploader.close(0.0)

    def _sweep(self) -> None:
        """No worker is alive: remove the files of dead workers from the staging directory, complete or not."""
        pending = self._uploader.pending()
        try:
            for path in self._staging.iterdir():
                if is_staged(path) and path not in pending:
                    path.unlink(missing_ok=True)
                    log.info("staging_swept", path=str(path))
        except OSError as error:
            # Sweeping only frees space. If the directory is broken, the next worker that stages reports it.
            log.warning("staging_not_swept", cause=str(error))

    # ---- on the upload and commit threads ----------------------------------------------------

    def _uploaded(self, shard: StagedShard) -> None:
        formed, name = self._node.formed, parse_directory(shard.directory)
        if name.generation != formed.generation.number:
            return
        self._uploads[name.step] += 1
        # The committing node's workers wait for the commit, so that checkpoints are committed in order.
        if self._uploads[name.step] >= self._workers and formed.node_rank != 0:
            self._release(name.step)

    def _upload_failed(self, shard: StagedShard, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        log.error("upload_failed", step=shard.step, cause=str(error))
        self._uploaded(shard)
        place = parse_directory(shard.directory).generation, shard.step
        self._lose(place, str(error), own=True)

    def _committed(self, checkpoint: Checkpoint) -> None:
        self._metrics.checkpoint_commits.inc()
        self._metrics.checkpoint_committed_step.set(checkpoint.step)
        self._metrics.checkpoint_commit_timestamp.set_to_current_time()
        self._node.notice_log()

    def _untidy(self, error: Exception) -> None:
        self._metrics.checkpoint_tidy_failures.inc()
        log.warning("tidy_failed", cause=str(error))

    def _commit_failed(self, generation: Generation, step: int, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        log.error("commit_failed", step=step, cause=str(error))
        # The missing share may be that of the committing node itself.
        first_rank = generation.first_worker_rank(self._node.formed.node_rank)
        own = not isinstance(error, ShareMissing) or error.first_rank == first_rank
        self._lose((generation.number, step), str(error), own=own)

    def _lose(self, place: tuple[int, int], why: str, *, own: bool) -> None:
        """The checkpoint of a generation and step cannot be committed: wake the threads that wait for it."""
        known = self._lost
        # Keep the reason that this node has for its own share.
        if own or known is None or (known.generation, known.step) != place:
            self._lost = Lost(*place, why, own)
        self._node.notice_log()
