"""A node's agent: joins the run, keeps workers going, carries their checkpoints to the bucket.

Composition root of the long-lived process, one per node. It never touches CUDA and never imports the
training stack; its fork server does.

    run_agent ─► Agent.run ─► NodeProcesses.run   one generation after the other (main thread)
                    Node           hears peers, decides, appends generations      (membership thread)
                    Checkpointing  staged shards ─► bucket ─► COMMIT              (upload, commit threads)
                    Observation    what workers say ─► metrics, goodput           (channel threads)

SIGTERM and SIGINT ask the node to leave in good order; a second one, or `elastic.leave_timeout_s`, ends it.
"""

import os
import random
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import structlog
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from elastic_pt.agent.checkpointing import Checkpointing, choose_resume, quarantine
from elastic_pt.agent.observation import Observation
from elastic_pt.agent.start import (
    environment_of_workers,
    require_cache,
    require_device,
    require_fencing,
    require_staging_space,
    require_work,
)
from elastic_pt.config import Config
from elastic_pt.data.cache import cache_directory
from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.errors import DataError, FencedError, NodeFailure, NotFound, StoreError
from elastic_pt.membership.address import local_address
from elastic_pt.membership.budgets import rest_s
from elastic_pt.membership.lookups import avoid_getfqdn
from elastic_pt.membership.node import Formed, Left, new_member, new_node
from elastic_pt.membership.rendezvous import LogRendezvous
from elastic_pt.membership.resources import Resources
from elastic_pt.membership.status import Limits, NodeStatus
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.runlog.identity import IDENTITY_KEY, agree_on_identity, fingerprint
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Cause, CauseKind, Stop
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.events import EventSink, configure_events
from elastic_pt.telemetry.exporter import serve_metrics
from elastic_pt.telemetry.goodput import Activity
from elastic_pt.workers.assignment import SOCKET_NAME, Assignment, Outcome, write_assignment
from elastic_pt.workers.channel import AgentSide, Message
from elastic_pt.workers.failure import WorkerFailure
from elastic_pt.workers.forking import ForkedCall
from elastic_pt.workers.processes import NodeProcesses
from elastic_pt.workers.watchdog import WatchdogLimits

_LAST_MESSAGES_S: Final = 10.0
_CLOSE_S: Final = 10.0
_END_S: Final = 45
_HINTS_DEADLINE_S: Final = 2.0
_PROGRESS_TIMEOUT_S: Final = 30.0

Worker = Callable[[str, str, dict[str, str]], str]
"""A worker's main function: configuration, scratch directory and environment to how it ended."""

log = structlog.get_logger("elastic_pt.agent.agent")


@dataclass(frozen=True)
class AgentOptions:
    """What distinguishes this node."""

    node: str | None = None
    """Its name; None takes the host's name. Failures are counted by it, so a restart should keep it."""
    address: str | None = None
    """Its address for peers; None takes the default route's."""


def run_agent(
    config: Config,
    options: AgentOptions,
    scratch: Path,
    worker: Worker,
    platform: ForkedCall,
) -> Stop | None:
    """Take part in the run until it ends (returns how) or this node leaves (None). Agent process.

    The fork server has been started (`workers.forking`) with the same scratch directory. `worker` is what its
    processes call, and `platform` waits to call `train.probe.platform_of_workers`: this package never imports the
    training stack. Raises `ElasticPtError`.
    """
    avoid_getfqdn()
    store = open_store(config.run.url, timeout_s=config.store.deadline_s)
    data = _read_data(config, store)
    platform.begin(config.to_toml(), data.vocab_size)
    name = options.node or socket.gethostname()
    with ExitStack() as stack:
        sink = EventSink(store, f"{name}-{secrets.token_hex(4)}")
        stack.callback(sink.close)
        configure_events(config.telemetry.log_level, name, sink)
        workers = config.elastic.workers_per_node or max(1, torch.cuda.device_count())
        require_device(config)
        run_log = RunLog(store, writer=name)
        fenced_url = require_fencing(store, config, run_log.refresh().fenced_url)
        require_staging_space(config, data.vocab_size)
        require_work(config, data, workers)
        require_cache(config, data)
        # Whoever joins before it could start a worker would hold up all others.
        computes = platform.wait(config.elastic.startup_timeout_s)
        agree_on_identity(store, config, data, computes, run_log.refresh().platform)
        me = NodeStatus.first(
            new_member(name, options.address or local_address(), workers),
            fingerprint(config, data, computes),
        )
        deciding = computes if config.train.numerics == "exact" else {}
        agent = Agent(config, store, run_log, scratch, me, deciding, fenced_url, worker)
        stack.callback(agent.close)
        return agent.run()


def _read_data(config: Config, store: Store) -> Manifest:
    """The prepared data's manifest. Data that a run has read before and that is missing now is away, not wrong."""
    try:
        return read_manifest(open_store(config.data.url, timeout_s=config.store.deadline_s))
    except DataError as error:
        if isinstance(error.__cause__, NotFound) and store.size(IDENTITY_KEY) is not None:
            raise StoreError(
                f"data.url = {config.data.url!r}: away ({error.__cause__}); the run has read it before, "
                "so start this node again when it is back"
            ) from error
        raise


def _with_cache(config: Config) -> Config:
    """The configuration with `data.cache` spelled out, while temporary files go where the user wants them."""
    cache = str(cache_directory(config.data.cache))
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": cache})})


class Agent:
    """See the module."""

    def __init__(
        self,
        config: Config,
        store: Store,
        run_log: RunLog,
        scratch: Path,
        me: NodeStatus,
        platform: Mapping[str, str],
        fenced_url: str,
        worker: Worker,
    ) -> None:
        member = me.member
        self._config = config
        self._scratch = scratch
        config = _with_cache(config)
        # torch keeps files for its workers' errors; a killed agent's are swept here. Workers keep TMPDIR.
        tempfile.tempdir = str(scratch)
        environment = environment_of_workers(member.address)
        self._observation = Observation(Metrics())
        telemetry = config.telemetry
        self._metrics_server, metrics_url = serve_metrics(
            self._observation.metrics,
            telemetry.metrics_address,
            telemetry.metrics_port,
            member.address,
        )
        self._log = run_log
        self._node = new_node(
            replace(me, metrics_url=metrics_url),
            Limits(config.elastic, config.train.slots),
            Resources(
                log=run_log,
                hints=open_store(config.run.url, timeout_s=_HINTS_DEADLINE_S),
                clock_s=time.monotonic,
                bind_store=partial(bind_store, member.address),
                choose_resume=partial(
                    choose_resume, store, run_log, incarnation=member.incarnation
                ),
                on_drain=lambda reason: self._channel.broadcast(
                    {"kind": "drain", "reason": reason}
                ),
                platform=platform,
                fenced_url=fenced_url,
            ),
            store,
        )
        self._channel = AgentSide(scratch / SOCKET_NAME, self._handle)
        self._checkpointing = Checkpointing(
            config,
            store,
            self._log,
            self._node,
            self._observation.metrics,
            scratch,
            formed=lambda: self._formed,
            release=lambda step: self._channel.broadcast({"kind": "released", "step": step}),
        )
        self._rendezvous = LogRendezvous(self._node, run_id=store.url.rpartition("/")[2])
        self._processes = NodeProcesses(
            self._rendezvous,
            workers=member.workers,
            entrypoint=worker,
            arguments=(config.to_toml(), str(scratch), environment),
            scratch=str(scratch),
            on_start=self._before_start,
            on_stop=self._after_stop,
            on_failure=self._worker_failed,
            limits=WatchdogLimits(
                hang_timeout_s=config.elastic.hang_timeout_s,
                # Nobody makes progress while one worker still tries to read its data.
                progress_timeout_s=max(_PROGRESS_TIMEOUT_S, config.store.deadline_s),
                startup_timeout_s=config.elastic.startup_timeout_s,
            ),
        )
        self._frontier_step = 0
        self._failures_at_frontier = 0
        self._skipped = (0, "")
        """The newest step that was skipped, and why."""
        self._quarantined = 0
        """The newest generation whose checkpoint turned out unusable on this node."""

    def run(self) -> Stop | None:
        """Train one generation after the other until the log says STOP, or this node has left (None)."""
        # torch elastic would end the workers at once; whoever is asked to leave has a checkpoint to finish.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._asked_to_leave)
        try:
            self._node.start()
            log.info("agent_started", pid=os.getpid(), address=self._node.member.address)
            while self._train_generation():
                pass
        except SignalException as caught:
            log.info("agent_stopped", signal=caught.sigval.name)
            raise SystemExit(128 + caught.sigval) from None
        except Left:
            log.info("agent_left")
            return None
        finally:
            # From here on a further signal simply ends the process, and so does time.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(_END_S)
        return self._node.view.stop

    def close(self) -> None:
        """Leave; peers see it at once, before anything that may take time here."""
        self._node.leave()
        self._checkpointing.close(_CLOSE_S)
        self._channel.close()
        self._metrics_server.shutdown()

    def _asked_to_leave(self, number: int, _: FrameType | None) -> None:
        """Signal handler: the first signal asks, the second one or the alarm insists."""
        if self._node.leaving:
            raise SignalException(f"signal {number}", signal.Signals(number))
        self._node.request_leave()
        signal.alarm(max(1, round(self._config.elastic.leave_timeout_s)))

    @property
    def _formed(self) -> Formed:
        assert self._rendezvous.formed is not None
        return self._rendezvous.formed

    # ---- one generation, on the main thread ----------------------------------------------------

    def _train_generation(self) -> bool:
        """Train until the workers have stopped as planned; False once the run has ended."""
        try:
            outcome = Outcome(next(iter(self._processes.run().return_values.values())))
        except RendezvousClosedError:
            return False
        except OSError as error:
            self._could_not_start(error)
            return True
        formed, failure = self._formed, None
        self._channel.drain_messages(_LAST_MESSAGES_S)
        if outcome is Outcome.DIVERGED:
            self._diverged(formed)
        else:
            settled = self._settle(formed, completed=outcome is Outcome.COMPLETED)
            if not settled and not self._node.must_reform(formed.generation.number):
                failure = self._checkpointing.failure()
        self._end_generation(formed.generation.number, failure, counts=True)
        return True

    def _could_not_start(self, error: OSError) -> None:
        """This node's own part in starting workers failed (no space, too many open files, ...)."""
        number = self._formed.generation.number
        self._after_stop()
        failure = self._node.failure(f"cannot start workers: {error}", surroundings=True)
        log.warning("workers_not_started", generation=number, cause=str(error))
        self._end_generation(number, failure, counts=not self._node.must_reform(number))

    def _before_start(self) -> None:
        """Tell the workers of the new generation what they need to know."""
        formed, view = self._formed, self._node.view
        generation = formed.generation
        self._observation.starts(generation, self._node.read_at_s(generation.number))
        self._checkpointing.starts()
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
        self._checkpointing.stopped()

    def _settle(self, formed: Formed, *, completed: bool) -> bool:
        """The workers stopped as planned: wait until their checkpoint counts, or until that has no future (False)."""
        self._observation.enter(Activity.SETTLE)
        self._node.settling()
        settled = self._checkpointing.wait(formed, completed=completed)
        log.info(
            "settled" if settled else "settle_failed",
            step=self._checkpointing.staged_step,
            generation=formed.generation.number,
        )
        return settled

    def _diverged(self, formed: Formed) -> None:
        """The loss stayed non-finite: the run ends, with its last good checkpoint."""
        step, why = self._skipped
        reason = f"diverged: {why}"
        try:
            self._log.append(lambda _: Stop(reason, step), generation=formed.generation.number)
            log.error("stop", reason=reason, step=step)
        except FencedError:
            pass
        self._node.notice_log()

    def _worker_failed(self, failure: WorkerFailure) -> None:
        """A worker ended badly: let the others know why, and count failures that are this node's own."""
        number = self._formed.generation.number
        self._observation.metrics.worker_failures.labels(failure.cause).inc()
        log.warning(
            "worker_failed",
            generation=number,
            cause=str(failure),
            kind=failure.cause,
            rank=failure.rank,
            step=failure.step,
            traceback=failure.traceback,
            stacks=failure.stacks,
        )
        collateral = failure.collateral and self._node.await_reform(
            number, 2 * self._config.elastic.heartbeat_timeout_s
        )
        unusable = self._quarantined == number
        own = self._node.failure(
            str(failure),
            kind=CauseKind.UNUSABLE if unusable else CauseKind.FAILED,
            step=failure.step or 0,
            signature=failure.signature,
            surroundings=failure.surroundings,
        )
        counts = not (collateral or unusable or self._node.must_reform(number))
        self._end_generation(number, None if collateral else own, counts=counts)

    def _end_generation(self, number: int, failure: Cause | None, *, counts: bool) -> None:
        """Tell the others that this node's workers of a generation are gone.

        A failure that `counts` is this node's own, without a new step since the last one. The node rests longer
        after each, so that the trouble can pass. Raises `NodeFailure` after too many of them, but only if the
        others can go on without it: alone it waits.
        """
        if counts and failure is not None:
            self._failures_at_frontier += 1
            seconds = rest_s(self._failures_at_frontier, random.random())
            if seconds:
                log.warning("node_rests", seconds=round(seconds, 3), cause=failure.detail)
                self._node.rest(failure.detail, seconds)
        self._node.spend(number, failure)
        self._observation.enter(Activity.FORM)
        too_many = self._failures_at_frontier > self._config.elastic.retries_without_progress
        if counts and failure is not None and too_many and self._node.others_can_go_on():
            raise NodeFailure(
                f"workers failed {self._failures_at_frontier} times without a step beyond {self._frontier_step}; "
                f"last: {failure.detail}"
            )

    # ---- messages of the workers, on the channel's threads -------------------------------------

    def _handle(self, message: Message) -> None:
        match message["kind"]:
            case "step":
                self._step_done(message)
            case "staged" | "no_room" | "skipped":
                self._checkpointing.save(message)
            case "activity":
                self._observation.activity(message["activity"])
            case "unusable":
                number = self._quarantined = self._formed.generation.number
                quarantine(self._log, number, message["directory"], message["why"])

    def _step_done(self, message: Message) -> None:
        formed, step = self._formed, int(message["step"])
        if message["rank"] == formed.generation.first_worker_rank(formed.node_rank):
            times = self._observation.step_done(message)
            if times is not None:
                self._node.first_step(times)
                log.info("first_step", step=step, **vars(times))
            self._node.progress(step, message["loss"])
            if step > self._frontier_step:
                self._frontier_step, self._failures_at_frontier = step, 0
            if message["skipped"]:
                self._skipped = (step, message["skipped"])
                log.warning("step_skipped", step=step, cause=message["skipped"])
        if message["rank"] == 0:
            self._checkpointing.note_step(message)
