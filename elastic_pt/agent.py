"""A node's agent: joins the run, keeps workers going, carries their checkpoints to the bucket.

Composition root of the long-lived process, one per node. It never touches CUDA and never imports the
training stack; its fork server does.

    run_agent ─► Agent.run ─► NodeProcesses.run   one generation after the other (main thread)
                    Node          hears peers, decides, appends generations      (membership thread)
                    Uploader      staged shards ─► bucket                        (upload thread)
                    Committer     all parts ─► COMMIT                            (commit thread)
"""

import os
import secrets
import signal
import socket
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from elastic_pt.checkpoint.restore import quick_check
from elastic_pt.checkpoint.upload import StagedShard, Uploader
from elastic_pt.commit import Committer, directory_of, reference_of
from elastic_pt.config import Config
from elastic_pt.data.manifest import read_manifest
from elastic_pt.elastic.address import local_address
from elastic_pt.elastic.assignment import SOCKET_NAME, Assignment, Outcome, write_assignment
from elastic_pt.elastic.channel import AgentSide, Message
from elastic_pt.elastic.log import RunLog, RunView
from elastic_pt.elastic.membership import Limits
from elastic_pt.elastic.node import Formed, Node, NodeOptions
from elastic_pt.elastic.processes import (
    NodeProcesses,
    WorkerFailure,
    start_worker,
    warm_fork_server,
)
from elastic_pt.elastic.records import Checkpoint, Quarantine, Stop
from elastic_pt.elastic.rendezvous import LogRendezvous
from elastic_pt.elastic.scratch import scratch_directory
from elastic_pt.errors import (
    CheckpointError,
    ElasticPtError,
    FencedError,
    NodeFailure,
    StoreError,
)
from elastic_pt.identity import agree_on_identity
from elastic_pt.preflight import (
    platform_of_workers,
    prepare_environment,
    require_fencing,
    require_staging_space,
    require_work,
)
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.events import EventSink, configure_events
from elastic_pt.telemetry.exporter import serve_metrics
from elastic_pt.telemetry.goodput import Activity, GoodputLedger

_WARM_MODULES: Final = ["elastic_pt.worker", "elastic_pt.cli"]
_LAST_MESSAGES_S: Final = 10.0
_CLOSE_S: Final = 10.0
_ACTIVITIES: Final = {"start": Activity.START, "restore": Activity.RESTORE, "train": Activity.START}

log = structlog.get_logger("elastic_pt.agent")


@dataclass(frozen=True)
class AgentOptions:
    """What distinguishes this node."""

    node: str | None = None
    """Its name; None takes the host's name and the process id."""
    address: str | None = None
    """Its address for peers; None takes the default route's."""


def run_agent(config: Config, options: AgentOptions) -> Stop:
    """Take part in the run until it ends; returns how it ended. Raises `ElasticPtError`. Agent process."""
    store = open_store(config.run.url, deadline_s=config.store.deadline_s)
    data = read_manifest(open_store(config.data.url, deadline_s=config.store.deadline_s))
    name = options.node or f"{socket.gethostname()}-{os.getpid()}"
    with ExitStack() as stack:
        sink = EventSink(store, f"{name}-{secrets.token_hex(4)}")
        stack.callback(sink.close)
        configure_events(config.telemetry.log_level, name, sink)
        workers = config.elastic.workers_per_node or max(1, torch.cuda.device_count())
        require_fencing(store, config)
        require_staging_space(config, data.vocab_size)
        require_work(config, data, workers)
        fingerprint = agree_on_identity(store, config, data, platform_of_workers(config))
        scratch = stack.enter_context(scratch_directory(config.checkpoint.staging))
        me = Introduction(name, options.address or local_address(), workers, fingerprint)
        agent = Agent(config, store, scratch, me)
        stack.callback(agent.close)
        return agent.run()


@dataclass(frozen=True)
class Introduction:
    """What this node is to its peers."""

    name: str
    address: str
    workers: int
    fingerprint: str


class Agent:
    """See the module."""

    def __init__(self, config: Config, store: Store, scratch: Path, me: Introduction) -> None:
        self._config = config
        self._store = store
        self._scratch = scratch
        prepare_environment(config, me.address, scratch)
        warm_fork_server(_WARM_MODULES)
        self._metrics = Metrics()
        self._ledger = GoodputLedger(time.monotonic())
        self._metrics_server, metrics_url = serve_metrics(
            self._metrics,
            config.telemetry.metrics_address,
            config.telemetry.metrics_port,
            me.address,
        )
        self._log = RunLog(store, writer=me.name)
        self._node = Node(
            NodeOptions(
                name=me.name,
                address=me.address,
                workers=me.workers,
                fingerprint=me.fingerprint,
                limits=Limits(
                    nodes_min=config.elastic.nodes_min,
                    nodes_max=config.elastic.nodes_max,
                    slots=config.train.slots,
                    heartbeat_timeout_s=config.elastic.heartbeat_timeout_s,
                    join_window_s=config.elastic.join_window_s,
                ),
                heartbeat_interval_s=config.elastic.heartbeat_interval_s,
                metrics_url=metrics_url,
            ),
            store,
            self._log,
            choose_resume=self._choose_resume,
            on_drain=lambda reason: self._channel.broadcast({"kind": "drain", "reason": reason}),
        )
        self._channel = AgentSide(scratch / SOCKET_NAME, self._handle)
        self._uploader = Uploader(store, on_uploaded=self._uploaded, on_failed=self._upload_failed)
        self._committer = Committer(
            store,
            self._log,
            keep=config.checkpoint.keep,
            last_step=config.train.steps,
            deadline_s=config.elastic.settle_timeout_s,
            superseded=self._node.must_reform,
            on_commit=self._committed,
            on_done=self._release,
            on_failure=self._commit_failed,
        )
        self._rendezvous = LogRendezvous(self._node, run_id=store.url.rpartition("/")[2])
        self._processes = NodeProcesses(
            self._rendezvous,
            workers=me.workers,
            entrypoint=start_worker,
            arguments=(config.to_toml(), str(scratch)),
            scratch=str(scratch),
            on_start=self._before_start,
            on_stop=self._after_stop,
            on_failure=self._worker_failed,
        )
        self._lock = threading.Lock()
        self._workers = me.workers
        self._uploads: dict[int, int] = defaultdict(int)
        self._staged_step = 0
        self._frontier_step = 0
        self._failures_at_frontier = 0
        self._skip_reason = ""
        self._uncommitted = (0, 0)
        """Generation and step of the last checkpoint that this node could not commit."""
        self._quarantined = 0
        """The newest generation whose checkpoint turned out unusable on this node."""

    def run(self) -> Stop:
        """Train one generation after the other until the log says STOP."""
        self._node.start()
        log.info("agent_started", pid=os.getpid(), address=self._node.member.address)
        try:
            while self._train_generation():
                pass
        except SignalException as caught:
            log.info("agent_stopped", signal=caught.sigval.name)
            raise SystemExit(128 + caught.sigval) from None
        finally:
            # torch elastic's handlers raise; from here on a second signal simply ends the process.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
        stop = self._node.view.stop
        assert stop is not None
        return stop

    def _train_generation(self) -> bool:
        """Train until the workers have stopped as planned; False once the run has ended."""
        try:
            outcome = Outcome(next(iter(self._processes.run().return_values.values())))
        except RendezvousClosedError:
            return False
        formed, failure = self._formed, ""
        self._channel.drain_messages(_LAST_MESSAGES_S)
        if outcome is Outcome.DIVERGED:
            self._diverged(formed)
        elif not self._settle(formed, completed=outcome is Outcome.COMPLETED):
            failure = f"the checkpoint of step {self._staged_step} was not committed"
        self._node.spend(formed.generation.number, failure)
        self._enter(Activity.FORM)
        return True

    def close(self) -> None:
        """Leave; peers see it at once, before anything that may take time here."""
        self._node.leave()
        self._committer.close(_CLOSE_S)
        self._uploader.close()
        self._channel.close()
        self._metrics_server.shutdown()

    @property
    def _formed(self) -> Formed:
        assert self._rendezvous.formed is not None
        return self._rendezvous.formed

    # ---- one generation, on the main thread ----------------------------------------------------

    def _before_start(self) -> None:
        """Tell the workers of the new generation what they need to know."""
        formed, view = self._formed, self._node.view
        generation = formed.generation
        self._enter(Activity.START)
        self._uploads.clear()
        write_assignment(
            self._scratch,
            Assignment(
                run_id=view.run_id,
                generation=generation.number,
                store_address=generation.store_address,
                store_port=generation.store_port,
                resume=generation.resume,
            ),
        )
        self._metrics.generations.inc()
        self._metrics.generation.set(generation.number)
        self._metrics.nodes.set(len(generation.members))
        self._metrics.world_size.set(generation.world_size)
        log.info(
            "workers_start",
            generation=generation.number,
            node_rank=formed.node_rank,
            world_size=generation.world_size,
            resume_step=0 if generation.resume is None else generation.resume.step,
        )

    def _after_stop(self) -> None:
        """The workers are gone: hear their last words while it is still known whose they are."""
        self._channel.drain_messages(_LAST_MESSAGES_S)
        self._uploader.discard()

    def _settle(self, formed: Formed, *, completed: bool) -> bool:
        """The workers stopped as planned: wait until their checkpoint counts, or until that has no future (False)."""

        def given_up() -> bool:
            return self._uncommitted == (formed.generation.number, self._staged_step)

        self._enter(Activity.SETTLE)
        self._node.settling()
        number, timeout_s = formed.generation.number, self._config.elastic.settle_timeout_s
        if completed:
            if formed.node_rank == 0:
                self._committer.finish(formed.generation)
            settled = self._node.await_end(number, timeout_s, given_up)
        else:
            settled = self._node.await_settled(number, self._staged_step, timeout_s, given_up)
        log.info(
            "settled" if settled else "settle_failed", step=self._staged_step, generation=number
        )
        return settled

    def _diverged(self, formed: Formed) -> None:
        """The loss stayed non-finite: the run ends, with its last good checkpoint."""
        reason, step = f"diverged: {self._skip_reason}", self._frontier_step
        try:
            self._log.append(lambda _: Stop(reason, step), generation=formed.generation.number)
            log.error("stop", reason=reason, step=step)
        except FencedError:
            pass
        self._node.notice_log()

    def _worker_failed(self, failure: WorkerFailure) -> None:
        """A worker ended badly: let the others know why, and count failures that are this node's own."""
        number = self._formed.generation.number
        collateral = failure.collateral and self._node.await_reform(
            number, self._config.elastic.heartbeat_timeout_s
        )
        self._metrics.worker_failures.labels("collateral" if failure.collateral else "own").inc()
        log.warning(
            "worker_failed", generation=number, collateral=failure.collateral, cause=str(failure)
        )
        self._node.spend(number, "" if collateral else str(failure))
        self._enter(Activity.FORM)
        if collateral or self._node.must_reform(number) or self._quarantined == number:
            return
        self._failures_at_frontier += 1
        if self._failures_at_frontier > self._config.elastic.retries_without_progress:
            raise NodeFailure(
                f"workers failed {self._failures_at_frontier} times without a step beyond {self._frontier_step}; "
                f"last: {failure}"
            )

    # ---- messages of the workers, on the channel's threads -------------------------------------

    def _handle(self, message: Message) -> None:
        match message["kind"]:
            case "step":
                self._step_done(message)
            case "staged":
                try:
                    self._staged(message)
                except ElasticPtError as error:
                    self._upload_failed(int(message["step"]), error)
            case "activity":
                self._enter(_ACTIVITIES[message["activity"]])
            case "unusable":
                self._quarantined = self._formed.generation.number
                self._quarantine(message["directory"], message["why"])

    def _step_done(self, message: Message) -> None:
        formed, step = self._formed, int(message["step"])
        if message["rank"] == formed.generation.first_worker_rank(formed.node_rank):
            with self._lock:
                self._ledger.step_done(step, time.monotonic())
                self._metrics.account(self._ledger.snapshot(time.monotonic()))
            self._metrics.step_done(message)
            self._node.progress(step, message["loss"])
            if step > self._frontier_step:
                self._frontier_step, self._failures_at_frontier = step, 0
            if message["skipped"]:
                self._skip_reason = message["skipped"]
                log.warning("step_skipped", step=step, cause=message["skipped"])
        if message["rank"] == 0:
            self._committer.note_step(formed.generation.number, message)

    def _staged(self, message: Message) -> None:
        generation, step = self._formed.generation, int(message["step"])
        self._staged_step = step
        self._metrics.checkpoint_stage_seconds.set(message["seconds"])
        self._uploader.submit(
            StagedShard(
                path=Path(message["path"]),
                run_id=self._node.view.run_id,
                directory=directory_of(generation, step),
                rank=message["rank"],
            )
        )
        if message["rank"] == 0:
            self._committer.expect(step, generation)

    def _quarantine(self, directory: str, why: str) -> None:
        log.error("checkpoint_quarantined", directory=directory, why=why)
        try:
            self._log.append(
                lambda _: Quarantine(directory, why), generation=self._node.view.generation_number
            )
        except FencedError as error:
            log.info("quarantine_fenced", reason=str(error))
        except StoreError as error:
            log.error("quarantine_failed", reason=str(error))

    # ---- checkpoints, on the upload, commit and membership threads -----------------------------

    def _uploaded(self, step: int) -> None:
        self._uploads[step] += 1
        # The committing node's workers wait for the commit itself, so that checkpoints never overtake it.
        if self._uploads[step] >= self._workers and self._formed.node_rank != 0:
            self._release(step)

    def _release(self, step: int) -> None:
        self._channel.broadcast({"kind": "released", "step": step})

    def _upload_failed(self, step: int, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        log.error("upload_failed", step=step, cause=str(error))
        self._uploaded(step)

    def _committed(self, checkpoint: Checkpoint) -> None:
        self._metrics.checkpoint_commits.inc()
        self._metrics.checkpoint_committed_step.set(checkpoint.step)
        self._metrics.checkpoint_commit_timestamp.set_to_current_time()
        self._node.notice_log()

    def _commit_failed(self, step: int, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        log.error("commit_failed", step=step, cause=str(error))
        self._uncommitted = (self._formed.generation.number, step)
        self._node.notice_log()

    def _choose_resume(self, view: RunView) -> Checkpoint | None:
        """The newest checkpoint whose files are all there; ones that are not are quarantined with the reason."""
        for checkpoint in view.checkpoints:
            try:
                quick_check(self._store, reference_of(checkpoint), view.run_id)
                return checkpoint
            except CheckpointError as error:
                self._quarantine(checkpoint.directory, str(error))
        if view.commit is not None:
            raise CheckpointError(
                f"{self._store.url}: none of the committed checkpoints is usable; "
                "`elastic-pt checkpoints --verify` and `elastic-pt log` tell why"
            )
        return None

    def _enter(self, activity: Activity) -> None:
        with self._lock:
            self._ledger.enter(activity, time.monotonic())
            self._metrics.account(self._ledger.snapshot(time.monotonic()))
