"""The worker processes of one node, on `torch.distributed.elastic`'s `LocalElasticAgent`.

Workers are forked from the warm fork server (`workers.forking`). Any failure ends all of them with SIGKILL: they
are disposable, and the bucket has the state. They die with the fork server, which dies with the agent.

    every 20 ms   has one ended? ──────────┐
    every 0.1 s   does one hang? ─ stacks ─┴► SIGKILL to all ─► evidence ─► root cause ─► on_failure
"""

import multiprocessing.process
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from elastic_pt.errors import NodeFailure
from elastic_pt.membership.rendezvous import LogRendezvous
from elastic_pt.workers.cgroup import OomKills
from elastic_pt.workers.failure import (
    Evidence,
    WorkerFailure,
    read_error_file,
    root_cause,
)
from elastic_pt.workers.forking import await_fork_server
from elastic_pt.workers.heartbeat import HeartbeatReader, WorkerPhase, process_state
from elastic_pt.workers.watchdog import Detector, Hang, WatchdogLimits

_MONITOR_INTERVAL_S: Final = 0.02
_LOOK_INTERVAL_S: Final = 0.1
_KILL_TIMEOUT_S: Final = 5.0
_RESTARTS_MAX: Final = 1_000_000_000
_RUNS: Final = frozenset("RSDTt")
"""States of a process that has not ended, also a stopped one."""


@dataclass(frozen=True)
class _Watched:
    """A running worker, and the sources of evidence about it."""

    rank: int
    process: Any
    """Of `multiprocessing`; its exit code comes from the fork server."""
    reader: HeartbeatReader
    detector: Detector
    oom_kills: OomKills
    error_file: Path


class NodeProcesses(LocalElasticAgent):
    """Starts, watches and kills this node's workers, one generation after the other. Agent process, main thread.

    `run` raises `NodeFailure` when SIGKILL does not end a worker: this node cannot train any more.
    """

    def __init__(
        self,
        rendezvous: LogRendezvous,
        *,
        workers: int,
        entrypoint: Callable[..., Any],
        arguments: tuple[Any, ...],
        scratch: str,
        on_start: Callable[[], None],
        on_stop: Callable[[], None],
        on_failure: Callable[[WorkerFailure], None],
        limits: WatchdogLimits | None = None,
    ) -> None:
        self._rendezvous_handler = rendezvous
        self._scratch = Path(scratch)
        self._on_start = on_start
        self._on_stop = on_stop
        self._on_failure = on_failure
        self._limits = limits or WatchdogLimits()
        self._watched: list[_Watched] = []
        self._stuck: list[str] = []
        """Workers that SIGKILL has not ended, one text each."""
        self._next_look_s = 0.0
        spec = WorkerSpec(
            role="trainer",
            local_world_size=workers,
            rdzv_handler=rendezvous,
            entrypoint=entrypoint,
            args=arguments,
            max_restarts=_RESTARTS_MAX,
            monitor_interval=_MONITOR_INTERVAL_S,
        )
        logs = DefaultLogsSpecs(log_dir=tempfile.mkdtemp(prefix="workers-", dir=scratch))
        super().__init__(spec, logs_specs=logs, start_method="forkserver")

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Take ranks from the generation's record: a round trip over the store could block on a dead node."""
        formed = self._rendezvous_handler.formed
        assert formed is not None
        first = formed.generation.first_worker_rank(group_rank)
        world_size = formed.generation.world_size
        return [
            Worker(
                local_rank=local,
                global_rank=first + local,
                role_rank=first + local,
                world_size=world_size,
                role_world_size=world_size,
            )
            for local in range(spec.local_world_size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._on_start()
        formed = self._rendezvous_handler.formed
        assert formed is not None
        readers = [
            HeartbeatReader(self._scratch, worker.local_rank, formed.generation.number)
            for worker in worker_group.workers
        ]
        try:
            # Returns at once, unless the server had to be started again and hangs.
            await_fork_server(self._limits.startup_timeout_s)
        except NodeFailure as error:
            raise OSError(str(error)) from error
        before = set(multiprocessing.active_children())
        try:
            pids: dict[int, Any] = super()._start_workers(worker_group)
        except OSError:
            # torch forgets the workers that it has started when it cannot start one of them.
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
                child.join(_KILL_TIMEOUT_S)
            raise
        context: Any = self._pcontext
        now_s = time.monotonic()
        self._watched = [
            _Watched(
                worker.global_rank,
                # Private to torch. Its own `wait` sends SIGTERM to the others as soon as one has failed, and then
                # waits 30 s for each stopped worker.
                context._pc.processes[worker.local_rank],
                readers[worker.local_rank],
                Detector(self._limits, now_s),
                OomKills(pids[worker.local_rank]),
                Path(context.error_files[worker.local_rank]),
            )
            for worker in worker_group.workers
        ]
        for each in self._watched:
            # If torch finds the failure first, it sends this signal too.
            each.process.terminate = each.process.kill
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # A worker that returns its outcome exits within `wait`, so an exit found here is a failure.
        exit_codes = {
            each.rank: each.process.exitcode
            for each in self._watched
            if each.process.exitcode is not None
        }
        hangs = self._stopped_workers() if exit_codes else self._hung_workers()
        if not exit_codes and not hangs:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state is not WorkerState.FAILED:
                return result
            # A worker ended between these lines, and torch has ended the others: their exit codes prove nothing.
            exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        self._on_failure(self._end_generation(worker_group, exit_codes, hangs))
        return RunResult(state=WorkerState.FAILED)

    def phases(self) -> list[WorkerPhase]:
        """What each running worker does now, by its heartbeat. Any thread."""
        # Not by the exit code: only one thread may ask the fork server for it.
        running = [each for each in self._watched if process_state(each.process.pid) in _RUNS]
        readings = [each.reader.read() for each in running]
        return [each.phase for each in readings if each is not None]

    def _hung_workers(self) -> dict[int, Hang]:
        """The hung workers by rank; checks all workers, at most every `_LOOK_INTERVAL_S`."""
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return {}
        self._next_look_s = now_s + _LOOK_INTERVAL_S
        return {
            each.rank: hang
            for each in self._watched
            if (
                hang := each.detector.observe(
                    now_s, each.reader.read(), process_state(each.process.pid)
                )
            )
        }

    def _stopped_workers(self) -> dict[int, Hang]:
        return {
            each.rank: hang
            for each in self._watched
            if (hang := each.detector.stopped(process_state(each.process.pid)))
        }

    def _end_generation(
        self, worker_group: WorkerGroup, exit_codes: dict[int, int], hangs: dict[int, Hang]
    ) -> WorkerFailure:
        """Kill all workers and find the root cause; `exit_codes` has the workers that ended by themselves."""
        stacks = {
            each.rank: each.reader.request_stacks(each.process.pid)
            for each in self._watched
            if each.rank in hangs
        }
        try:
            self._stop_workers(worker_group)
        except NodeFailure as error:
            why = "; ".join(f"worker {rank} {hang}" for rank, hang in hangs.items())
            raise NodeFailure(f"{error}{why and f' ({why})'}") from None
        return root_cause(
            self._evidence(
                each,
                exit_codes.get(each.rank),
                hangs.get(each.rank),
                stacks.get(each.rank) or each.reader.stacks(),
            )
            for each in self._watched
        )

    def _evidence(
        self, worker: _Watched, exit_code: int | None, hang: Hang | None, stacks: str
    ) -> Evidence:
        reading = worker.reader.read()
        return Evidence(
            worker.rank,
            exit_code,
            read_error_file(worker.error_file),
            hang,
            worker.oom_kills.happened(),
            stacks,
            None if reading is None else reading.step,
        )

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        if self._stuck:
            raise NodeFailure("; ".join(self._stuck))
        self._on_stop()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        """SIGKILL to all workers, then at most `_KILL_TIMEOUT_S` for all of them to end."""
        for each in self._watched:
            if each.process.is_alive():
                each.process.kill()
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        for each in self._watched:
            each.process.join(max(0.0, deadline_s - time.monotonic()))
            if each.process.is_alive():
                pid = each.process.pid
                self._stuck.append(
                    f"worker {each.rank} (process {pid}, state {process_state(pid) or 'gone'}) "
                    f"has not ended {_KILL_TIMEOUT_S:.0f} s after SIGKILL"
                )
                # Otherwise this process would wait for it at its own exit, without a limit.
                multiprocessing.process._children.discard(each.process)  # type: ignore[attr-defined]
        if self._stuck:
            # Otherwise torch would try again, and wait again.
            self._watched, self._pcontext = [], None
        # Without a timeout: torch 2.11 takes none, and all workers have ended here.
        super()._shutdown(signal.SIGKILL)

    def _exit_barrier(self) -> None:
        """No barrier: the log's STOP record shows that all are done."""
