"""A node's agent: joins the run, starts and restarts workers, uploads their checkpoints.

Composition root of the long-lived process, one per node. It never touches CUDA. No module of this package imports the
training stack: the command that starts the agent passes the function that its workers call.

    run_agent ─► prepare ─► Agent.run ─► NodeProcesses.run   one generation after the other (main thread)
                    Node             listens to peers, decides, appends          (membership thread)
                    Checkpointing    kept states ─► bucket   ─► COMMIT           (upload and commit threads)
                    WorkerMessages   messages of workers ─► metrics, status      (channel threads)
                    Watch            notices of the platform ─► Leaving          (notices thread)
                    Telemetry        metrics, account of the time, events        (their own threads)

SIGTERM, SIGINT, a notice, and a drain in the log ask the node to leave in good order. A second signal,
`elastic.leave_timeout_s`, or the deadline of the notice or drain, ends it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from elastic_pt.agent.at_risk import CheckpointRequests
from elastic_pt.agent.chaos import ChaosOrders
from elastic_pt.agent.checkpointing import Checkpointing
from elastic_pt.agent.counting import count_workers
from elastic_pt.agent.failures import Failures
from elastic_pt.agent.leaving import Leaving
from elastic_pt.agent.messages import Progress, WorkerMessages
from elastic_pt.agent.parts import limits_of, notices_of, resources_of
from elastic_pt.agent.restoring import complete_history
from elastic_pt.agent.snapshots import Snapshots
from elastic_pt.agent.start import Prepared, prepare, read_data
from elastic_pt.agent.telemetry import Telemetry
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.config import Config
from elastic_pt.errors import FencedError
from elastic_pt.membership.address import avoid_getfqdn
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.decision.status import Limits, NodeStatus
from elastic_pt.membership.node import Formed, Left, new_node
from elastic_pt.membership.rendezvous import LogRendezvous
from elastic_pt.notices.signals import LEAVE_SIGNALS
from elastic_pt.runlog.identity import IDENTITY_KEY
from elastic_pt.runlog.records import Stop
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.account import LEFT
from elastic_pt.telemetry.goodput import Bucket
from elastic_pt.workers.assignment import SOCKET_NAME, Assignment, Outcome, write_assignment
from elastic_pt.workers.channel import AgentSide
from elastic_pt.workers.forking import ForkedCall
from elastic_pt.workers.processes import NodeProcesses

_LAST_MESSAGES_TIMEOUT_S: Final = 10.0
_CLOSE_TIMEOUT_S: Final = 10.0
_EXIT_TIMEOUT_S: Final = 45

Worker = Callable[[str, str, dict[str, str]], str]
"""A worker's main function: from configuration, scratch directory and environment variables to its outcome."""

log = structlog.get_logger("elastic_pt.agent.agent")


def run_agent(
    config: Config, name: str, address: str, scratch: Path, worker: Worker, platform: ForkedCall
) -> Stop | None:
    """Take part in the run until it ends (returns its STOP) or this node leaves (None). Agent process.

    Failures are counted by the node's `name`, so a restart should keep it. The fork server has been started with the
    same scratch directory. Its processes call `worker`. `platform` is ready to call
    `train.probe.platform_of_workers`. Raises `ElasticPtError`.
    """
    avoid_getfqdn()
    telemetry = Telemetry(config, name)
    store = open_store(
        config.run.url, timeout_s=config.store.deadline_s, observer=telemetry.requests
    )
    with ExitStack() as opened:
        # A start that fails again and again costs money too. But a mistake in the URL of a new run creates no directory.
        exists = store.size(IDENTITY_KEY) is not None
        if exists:
            opened.enter_context(telemetry.open(store))
        data = read_data(config, store)
        platform.begin(config.to_toml(), data.vocab_size)
        if not exists:
            opened.enter_context(telemetry.open(store))
        telemetry.count_flops(data.vocab_size)
        prepared = prepare(config, store, data, name, address, platform)
        with closing(Agent(prepared, scratch, worker, telemetry)) as agent:
            stop = agent.run()
        telemetry.ended(LEFT if stop is None else stop.reason)
        return stop


class Agent:
    """One node's agent, for all generations that it takes part in."""

    def __init__(
        self, prepared: Prepared, scratch: Path, worker: Worker, telemetry: Telemetry
    ) -> None:
        """Build each part from the parts before it. Only the metrics server runs before `run`."""
        config, store, run_log = prepared.config, prepared.store, prepared.log
        member, access = prepared.member, prepared.access
        self._config = config
        self._order_version = prepared.order_version
        self._scratch = scratch
        self._log = run_log
        # torch creates files for its workers' errors. In scratch, a later agent sweeps the files of a killed one.
        tempfile.tempdir = str(scratch)
        self._telemetry = telemetry
        self._observation, metrics = telemetry.observation, telemetry.metrics
        metrics_url = telemetry.begin(prepared, access)
        self._channel = AgentSide(scratch / SOCKET_NAME)
        history = StepHistory()
        timeout_s = config.elastic.heartbeat_timeout_s
        self._complete_history = partial(
            complete_history, history, access=access, timeout_s=timeout_s
        )
        self._snapshots = Snapshots(
            scratch,
            member.incarnation,
            access,
            mirror_bytes_per_s=config.checkpoint.mirror_bytes_per_s,
            timeout_s=timeout_s,
            history=history,
            on_complete=self._held,
            on_change=lambda: self._node.states_changed(),
            on_skip=metrics.snapshot_skips.inc,
            on_mirrored=metrics.mirror_bytes.inc,
        )
        self._node = new_node(
            NodeStatus.first(member, prepared.fingerprint, metrics_url),
            Limits(config.elastic, config.train.slots),
            resources_of(
                prepared,
                self._channel,
                self._snapshots,
                lambda seconds: self._leaving.drained(seconds),
                self._observation,
            ),
            access,
        )
        self._checkpointing = Checkpointing(
            config,
            store,
            run_log,
            self._node,
            metrics,
            scratch,
            history,
            states=self._snapshots,
            release=self._release,
        )
        self._progress = progress = Progress()
        self._failures = Failures(self._node, self._observation, progress, config.elastic)
        telemetry.follow(self._node, access, self._checkpointing.pending, lambda: progress.step)
        estimates = self._observation.estimates
        self._leaving = Leaving(
            self._node,
            config.elastic.leave_timeout_s,
            times=lambda: estimates.times_to_leave(
                lambda step: config.evaluation.due(step, config.train.steps)
            ),
            at_risk=CheckpointRequests(
                run_log, member.node, lambda: (self._progress.step, estimates.times.step_s)
            ).heed,
        )
        self._notices = notices_of(prepared, access, self._leaving, metrics)
        self._chaos = ChaosOrders(store, member.incarnation) if config.elastic.chaos else None
        self._messages = WorkerMessages(
            run_log,
            self._node,
            self._checkpointing,
            self._snapshots,
            self._observation,
            self._progress,
            telemetry.events.relay,
        )
        self._processes = NodeProcesses(
            LogRendezvous(self._node, run_id=store.url.rpartition("/")[2]),
            workers=member.workers,
            entrypoint=worker,
            arguments=(config.to_toml(), str(scratch), dict(prepared.environment)),
            scratch=str(scratch),
            on_start=self._before_start,
            on_stop=self._after_stop,
            on_failure=self._failures.worker_failed,
            limits=limits_of(config),
        )
        metrics.before_scrape(lambda: count_workers(metrics, self._processes.phases()))

    def run(self) -> Stop | None:
        """Train one generation after the other until the log says STOP, or this node has left (None)."""
        # torch elastic would end the workers at once. A node that leaves must finish a checkpoint first.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP"
        self._leaving.listen()
        try:
            # First: a node with a notice should not join.
            self._notices.start()
            if self._chaos is not None:
                self._chaos.start()
            self._telemetry.start()
            self._channel.listen(self._messages.handle)
            # First: the first decision comes with the start.
            self._observation.waits()
            self._node.start()
            log.info("agent_started", pid=os.getpid(), address=self._node.member.address)
            try:
                while self._train_generation():
                    pass
            except Left:
                # In here, so that a second signal can still end a node that waits for the bucket.
                self._leaving.answer_drain(self._log)
                log.info("agent_left", reason=self._node.leave_reason)
                return None
        except SignalException as caught:
            log.info("agent_stopped", signal=caught.sigval.name)
            raise SystemExit(128 + caught.sigval) from None
        finally:
            # From now on another signal ends the process at once, and so does the alarm.
            for number in (*LEAVE_SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            # Before the alarm is set: a notice sets it too.
            self._notices.close()
            if self._chaos is not None:
                self._chaos.close()
            signal.alarm(_EXIT_TIMEOUT_S)
            self._observation.enter(Bucket.DRAINING)
        return self._node.view.stop

    def close(self) -> None:
        """Leave. Peers see it at once, before the slow parts of the end."""
        self._node.leave()
        self._notices.close()
        self._snapshots.close()
        self._checkpointing.close(_CLOSE_TIMEOUT_S)
        self._channel.close()
        self._telemetry.close()

    def _release(self, generation: int, step: int, ranks: range | None) -> None:
        """Shares of a checkpoint are in the bucket, or given up: their buffers are free (threads of upload and commit)."""
        # First: afterwards a worker may overwrite its buffer.
        self._snapshots.release(generation, step, ranks)
        if ranks is not None:
            self._observation.estimates.uploaded(step)
        self._channel.release(generation, step)

    def _held(self, generation: int, step: int, mirrors_have_room: bool) -> None:
        """The state of a step is whole on this node, and on its mirrors that have room (`mirrors_have_room`: all of them)."""
        if mirrors_have_room and self._config.checkpoint.mirror_copies:
            self._observation.mirrored(step)
        self._channel.complete(generation, step, mirrors_have_room)

    # ---- one generation ------------------------------------------------------------------------

    def _train_generation(self) -> bool:
        """Train until the workers have stopped as planned; False once the run has ended."""
        try:
            outcome = Outcome(next(iter(self._processes.run().return_values.values())))
        except RendezvousClosedError:
            return False
        except OSError as error:
            self._after_stop()
            self._failures.not_started(error)
            return True
        formed, failure = self._node.formed, None
        self._channel.drain_messages(_LAST_MESSAGES_TIMEOUT_S)
        if outcome is Outcome.DIVERGED:
            self._diverged(formed)
        else:
            settled = self._settle(formed, completed=outcome is Outcome.COMPLETED)
            if not settled and not self._node.must_reform(formed.generation.number):
                failure = self._checkpointing.failure()
        self._failures.end_generation(formed.generation.number, failure, counts=True)
        return True

    def _before_start(self) -> None:
        """Write the assignment of the new generation for the workers."""
        formed, view = self._node.formed, self._node.view
        generation = formed.generation
        self._telemetry.workers_start(
            view, generation, known_s=self._node.read_at_s(generation.number)
        )
        self._checkpointing.starts(generation)
        self._snapshots.starts(formed)
        self._complete_history(formed, view.committed_step)
        write_assignment(
            self._scratch,
            Assignment(
                run_id=view.run_id,
                generation=generation.number,
                store_address=generation.store_address,
                store_port=generation.store_port,
                resume=generation.resume,
                memory=self._snapshots.places(generation),
                node=self._node.member.node,
                order_version=self._order_version,
                ignored=generation.ignored,
            ),
        )
        log.info(
            "workers_start",
            generation=generation.number,
            node_rank=formed.node_rank,
            world_size=generation.world_size,
            resume_step=generation.resume_step,
            restored_from=generation.restored_from,
            why_not_memory=generation.why_not_memory,
        )

    def _after_stop(self) -> None:
        """The workers are gone: handle their last messages before another generation starts."""
        self._channel.drain_messages(_LAST_MESSAGES_TIMEOUT_S)
        self._checkpointing.stopped()
        number = self._node.formed.generation.number
        if self._node.must_reform(number):
            self._observation.broke(self._node.noticed_at_s(number))
            self._observation.waits()

    def _settle(self, formed: Formed, *, completed: bool) -> bool:
        """The workers stopped as planned: wait until nothing is lost with them. False if that cannot be.

        After the last step that is the end of the run; before, a commit or a state in memory (`Node.await_settled`).
        """
        self._observation.enter(Bucket.CHECKPOINT_STALL if completed else Bucket.DRAINING)
        self._node.settling()
        began_s = time.monotonic()
        if completed:
            ended = self._checkpointing.await_end(formed)
            settled = Settled("bucket" if ended else "", self._node.reason)
        else:
            settled = self._checkpointing.wait(formed, self._snapshots.is_complete)
        log.info(
            "settled" if settled else "settle_failed",
            step=self._checkpointing.saved_step,
            generation=formed.generation.number,
            tier=settled.tier,
            reason=settled.reason,
            seconds=round(time.monotonic() - began_s, 3),
        )
        return bool(settled)

    def _diverged(self, formed: Formed) -> None:
        """The loss stayed non-finite: end the run with its last good checkpoint."""
        step, why = self._progress.skipped
        reason = f"diverged: {why}"
        try:
            self._log.append(lambda _: Stop(reason, step), generation=formed.generation.number)
            log.error("stop", reason=reason, step=step)
        except FencedError as error:
            log.info("stop_fenced", reason=str(error))
        self._node.notice_log()
