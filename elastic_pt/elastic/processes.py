"""The worker processes of one node, on `torch.distributed.elastic`'s `LocalElasticAgent`.

Workers are forked from a warm fork server that has the training stack imported, and are killed with
SIGKILL at the first sign of trouble: they are disposable, what counts is in the bucket. They die with
the fork server (PDEATHSIG), which dies with the agent, so no orphan trains on.
"""

import ctypes
import importlib
import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, Final

import torch.multiprocessing
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from elastic_pt.elastic.rendezvous import LogRendezvous

_FORK_SERVER: Final = "elastic_pt.elastic.fork_server"
_MONITOR_INTERVAL_S: Final = 0.02
_RESTARTS_MAX: Final = 1_000_000_000
_PR_SET_PDEATHSIG: Final = 1
_COLLATERAL: Final = re.compile(
    r"gloo|nccl|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|DistBackendError|DistNetworkError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class WorkerFailure:
    """Why a worker ended."""

    rank: int
    exit_code: int
    message: str

    @property
    def collateral(self) -> bool:
        """Whether it only noticed that another worker was gone."""
        return _COLLATERAL.search(self.message) is not None

    def __str__(self) -> str:
        if self.exit_code < 0:
            return f"worker {self.rank} killed by {signal.Signals(-self.exit_code).name}"
        return f"worker {self.rank} exited with {self.exit_code}: {self.message}"


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent ends. Worker process, first thing."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def start_worker(config_text: str, scratch: str) -> str:
    """What the fork server calls in a new worker process; returns the worker's outcome.

    The agent has to name this function but must not import the training stack, so the import is here;
    in the fork server it has happened already.
    """
    die_with_parent()
    outcome: str = importlib.import_module("elastic_pt.worker").main(config_text, scratch)
    return outcome


def warm_fork_server(modules: list[str]) -> None:
    """Start the server that workers are forked from; it imports `modules` while the node looks for peers."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([_FORK_SERVER, *modules])
    forkserver.ensure_running()


class NodeProcesses(LocalElasticAgent):
    """Starts, watches and kills this node's workers, one generation after the other. Agent process, main thread."""

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
    ) -> None:
        self._rendezvous_handler = rendezvous
        self._on_start = on_start
        self._on_stop = on_stop
        self._on_failure = on_failure
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
        """Ranks follow from the generation's record; no round trip over a store that a dead node could block."""
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

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            self._stop_workers(worker_group)
            failures = [
                (
                    WorkerFailure(rank, failure.exitcode, _last_line(failure.message)),
                    failure.timestamp,
                )
                for rank, failure in result.failures.items()
            ]
            # Of several, the first that did not merely notice another one's end.
            self._on_failure(min(failures, key=lambda each: (each[0].collateral, each[1]))[0])
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._on_start()
        pids: dict[int, Any] = super()._start_workers(worker_group)
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self._on_stop()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        super()._shutdown(signal.SIGKILL, timeout)

    def _exit_barrier(self) -> None:
        """None: the log's STOP record, not a barrier over a store, tells that all are done."""


def _last_line(message: Any) -> str:
    text = message.get("message", message) if isinstance(message, dict) else message
    lines = str(text).strip().splitlines()
    return lines[-1][:500] if lines else ""
