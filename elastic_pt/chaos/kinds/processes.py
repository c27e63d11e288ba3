"""Faults of a node's processes: a worker, the server that forks workers, the agent."""

import signal
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import (
    LOST,
    NO_START,
    SILENT,
    TROUBLE,
    Action,
    Evidence,
    Kind,
    Strike,
    each,
    failed,
)
from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena


def _worker_of(arena: "Arena", strike: Strike, node: str) -> int:
    """The worker that stands at the moment, if it is one of the node's, else one by choice; 0: there is none."""
    workers = arena.workers(node)
    if strike.pid in workers:
        return strike.pid
    return strike.choices.choice(workers) if workers else 0


def _signal_worker(number: signal.Signals) -> Action:
    def act(arena: "Arena", strike: Strike) -> None:
        for node in strike.nodes:
            arena.send(_worker_of(arena, strike, node), number)

    return act


def _signal_agent(number: signal.Signals) -> Action:
    return each(lambda arena, node: arena.signal_agent(node, number))


_DISK_FAILED: Final = Evidence(events=frozenset({"worker_failed", "no_snapshots"}), may=TROUBLE)
OF_PROCESSES: Final = (
    Kind(
        "kill_worker",
        "SIGKILL to one worker",
        strike=_signal_worker(signal.SIGKILL),
        evidence=failed("signal"),
    ),
    Kind("worker_raises", "a Python error in a worker", deed="raise", evidence=failed("exception")),
    Kind(
        "program_fails",
        "the same Python error in every worker of a node, each time it comes to the moment",
        deed="raise",
        repeats=True,
        evidence=failed("exception"),
    ),
    Kind(
        "worker_exits",
        "a worker ends with an exit code",
        deed="exit={code}",
        parameters={"code": 3},
        evidence=failed("exit"),
    ),
    Kind(
        "worker_segfaults", "SIGSEGV in a worker", deed="signal=SIGSEGV", evidence=failed("signal")
    ),
    Kind("worker_aborts", "SIGABRT in a worker", deed="signal=SIGABRT", evidence=failed("signal")),
    Kind(
        "worker_stops",
        "SIGSTOP to one worker, for ever",
        strike=_signal_worker(signal.SIGSTOP),
        evidence=failed("hang"),
    ),
    Kind(
        "worker_holds_lock",
        "a worker keeps the interpreter's lock for ever",
        deed="hold=3600",
        evidence=failed("hang"),
    ),
    Kind(
        "slow_worker",
        "all workers of a node take `seconds` longer each time they come to the moment",
        deed="delay={seconds}",
        repeats=True,
        parameters={"seconds": 0.5},
        # It hangs if it takes longer than `elastic.hang_timeout_s`.
        evidence=Evidence(
            may=frozenset({CauseKind.FAILED}), silent="no event names a slow node yet (F10)"
        ),
    ),
    Kind(
        "worker_full_disk",
        "a step of a worker or agent fails with ENOSPC",
        deed="os_error=ENOSPC",
        evidence=_DISK_FAILED,
    ),
    Kind(
        "worker_bad_disk",
        "a step of a worker or agent fails with EIO",
        deed="os_error=EIO",
        evidence=_DISK_FAILED,
    ),
    Kind(
        "disk_stays_full",
        "each such step of a node fails with ENOSPC",
        deed="os_error=ENOSPC",
        repeats=True,
        evidence=_DISK_FAILED,
    ),
    Kind(
        "few_open_files",
        "an agent may open no further file",
        strike=each(lambda arena, node: arena.limit_files(node)),
        heal=each(lambda arena, node: arena.lift_limit(node)),
        ends_node=True,
        evidence=NO_START,
    ),
    Kind(
        "kill_fork_server",
        "SIGKILL to the process that forks a node's workers",
        strike=each(lambda arena, node: arena.send(arena.fork_server(node), signal.SIGKILL)),
        evidence=failed("exit"),
    ),
    Kind(
        "kill_agent",
        "SIGKILL to the agent alone",
        strike=_signal_agent(signal.SIGKILL),
        ends_node=True,
        evidence=LOST,
    ),
    Kind(
        "agent_stops",
        "SIGSTOP to the agent alone, then SIGCONT",
        strike=_signal_agent(signal.SIGSTOP),
        heal=_signal_agent(signal.SIGCONT),
        evidence=SILENT,
    ),
)
