"""The workers of one node: each way to end, from the real process to the reported cause.

Real workers from the real fork server. Only the rendezvous is a fake of one node, so these tests do not depend on
membership.
"""

import ctypes
import errno
import json
import multiprocessing
import multiprocessing.context
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from elastic_pt.errors import NodeFailure
from elastic_pt.workers.failure import FailureCause, WorkerFailure, read_error_file
from elastic_pt.workers.forking import (
    await_fork_server,
    begin_worker,
    import_once,
    start_fork_server,
)
from elastic_pt.workers.heartbeat import Heartbeat, WorkerPhase, process_state
from elastic_pt.workers.processes import NodeProcesses
from elastic_pt.workers.watchdog import WatchdogLimits

MEMORY = Path("/sys/fs/cgroup/memory")
FREEZER = Path("/sys/fs/cgroup/freezer")
GROUP = "elastic_pt-test-processes"
LIMIT_BYTES = 256 * 1024 * 1024
LIMITS = WatchdogLimits(hang_timeout_s=2.0, progress_timeout_s=10.0, startup_timeout_s=60.0)


def work(scratch: str, acts: str) -> str:
    """A worker's main function: some steps, and then the act of its local rank."""
    begin_worker({})
    rank, attempt = (int(os.environ[key]) for key in ("LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"))
    progress = Heartbeat(Path(scratch), rank, attempt + 1, 10)
    for step in (10, 11, 12):
        progress.enter(WorkerPhase.COMPUTE, step)
        # Long enough for the agent to read each phase.
        time.sleep(0.15)
    (Path(scratch) / f"pid-{rank}").write_text(str(os.getpid()))
    act = json.loads(acts)[attempt][rank]
    return globals()[f"act_{act}"](Path(scratch))


def act_complete(scratch: Path) -> str:
    return "completed"


def act_wait(scratch: Path) -> str:
    """Wait as in a collective operation that does not end."""
    threading.Event().wait()
    raise AssertionError


def act_raise(scratch: Path) -> str:
    raise ValueError("bad row 17")


def act_raise_and_linger(scratch: Path) -> str:
    """Raise, and end some time after the error file is written, as a process with a GPU does."""

    def linger() -> None:
        while read_error_file(Path(os.environ["TORCHELASTIC_ERROR_FILE"])) is None:
            time.sleep(0.01)
        (scratch / "lost").touch()
        threading.Event().wait(10.0)

    threading.Thread(target=linger, daemon=False).start()
    return act_raise(scratch)


def act_lose_peer(scratch: Path) -> str:
    """Lose the connection to a worker that has raised and lingers."""
    while not (scratch / "lost").exists():
        time.sleep(0.01)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def act_lose_stopped_peer(scratch: Path) -> str:
    """Lose the connection to the first worker as soon as that is stopped."""
    while process_state(int((scratch / "pid-0").read_text() or 0)) != "T":
        time.sleep(0.01)
    (scratch / "lost").touch()
    return act_lose_peer(scratch)


def act_exit(scratch: Path) -> str:
    os._exit(3)


def act_exit_well_too_early(scratch: Path) -> str:
    os._exit(0)


def act_kill(scratch: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def act_segfault(scratch: Path) -> str:
    ctypes.string_at(1)
    raise AssertionError


def act_abort_in_native_thread(scratch: Path) -> str:
    library = ctypes.CDLL(None)
    library.pthread_create(ctypes.byref(ctypes.c_ulong()), None, library.abort, None)
    return act_wait(scratch)


def act_stop(scratch: Path) -> str:
    os.kill(os.getpid(), signal.SIGSTOP)
    return act_wait(scratch)


def act_keep_interpreter(scratch: Path) -> str:
    re.match("(a?){40}a{40}", "a" * 40)
    raise AssertionError


def act_freeze(scratch: Path) -> str:
    """Enter an uninterruptible sleep that SIGKILL does not end."""
    (FREEZER / GROUP / "cgroup.procs").write_text(str(os.getpid()))
    (FREEZER / GROUP / "freezer.state").write_text("FROZEN")
    return act_wait(scratch)


def act_exhaust_memory(scratch: Path) -> str:
    # The fork server was moved there only so that its children start there.
    (MEMORY / "cgroup.procs").write_text(str(os.getppid()))
    block = b"x" * (4 * LIMIT_BYTES)
    return str(len(block))


class OneNode(RendezvousHandler):
    """A rendezvous of one node that returns a new generation at each call."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._number = 0
        self.formed: SimpleNamespace | None = None

    def get_backend(self) -> str:
        return "one-node"

    def next_rendezvous(self) -> RendezvousInfo:
        self._number += 1
        generation = SimpleNamespace(
            number=self._number, world_size=self._workers, first_worker_rank=lambda node_rank: 0
        )
        self.formed = SimpleNamespace(generation=generation)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo("127.0.0.1", store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "test"

    def shutdown(self) -> bool:
        return True


class Node:
    """A node under test, and the reports to its agent."""

    def __init__(self, scratch: Path, *attempts: list[str]) -> None:
        self.failures: list[WorkerFailure] = []
        self.seconds: list[float] = []
        """Seconds from the moment when every worker was about to act to the report."""
        self.calls: list[str] = []
        self._scratch, self._attempts = scratch, attempts
        workers = len(attempts[0])
        self.processes = NodeProcesses(
            OneNode(workers),  # type: ignore[arg-type]
            workers=workers,
            entrypoint=work,
            arguments=(str(scratch), json.dumps(attempts)),
            scratch=str(scratch),
            on_start=lambda: self.calls.append("start"),
            on_stop=lambda: self.calls.append("stop"),
            on_failure=self._failed,
            limits=LIMITS,
        )

    def run(self) -> WorkerFailure:
        """Run all attempts; returns the first failure. The last attempt completes."""
        result = self.processes.run()
        assert set(result.return_values.values()) == {"completed"}
        return self.failures[0]

    def acted_s(self) -> float:
        """When the last worker began its act, on the wall clock."""
        return max(path.stat().st_mtime for path in self._scratch.glob("pid-*"))

    def _failed(self, failure: WorkerFailure) -> None:
        self.failures.append(failure)
        self.calls.append("failure")
        self.seconds.append(time.time() - self.acted_s())


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an agent: a warm fork server and temporary files in scratch. Restores the signal handlers afterwards."""
    settings = multiprocessing.process.current_process()
    monkeypatch.setattr(settings, "_config", settings._config.copy())  # type: ignore[attr-defined]
    import_once([], threads=1, timeout_s=60.0)
    start_fork_server(tmp_path, [__name__])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("act", "cause", "text", "within_s"),
    [
        ("kill", "signal", "killed by SIGKILL at step 12", 2.0),
        ("segfault", "signal", "killed by SIGSEGV at step 12", 2.0),
        ("raise", "exception", r"raised ValueError: bad row 17 \(step 12\)", 1.0),
        ("exit", "exit", "exited with 3 at step 12", 2.0),
        ("exit_well_too_early", "exit", "exited with 0 at step 12", 2.0),
        ("abort_in_native_thread", "collective", "lost the others: aborted .*", 2.0),
        ("stop", "hang", r"wrote no heartbeat for 2\.\d s at step 12 \(stopped\)", 3.0),
        (
            "keep_interpreter",
            "hang",
            r"wrote no heartbeat for \d\.\d s at step 12 \(running\)",
            6.0,
        ),
    ],
)
def test_each_end_is_reported_and_the_next_attempt_completes(
    tmp_path: Path, act: str, cause: str, text: str, within_s: float
) -> None:
    """For each kind of end the cause is reported in time, and the next attempt completes with a new worker."""
    node = Node(tmp_path, [act], ["complete"])
    failure = node.run()
    assert re.fullmatch(f"worker 0 {text}", str(failure))
    assert (failure.cause, failure.rank, failure.step) == (cause, 0, 12)
    assert node.seconds[0] < within_s
    assert node.calls[:3] == ["start", "stop", "failure"]
    assert len(node.failures) == 1
    match failure.cause:
        case FailureCause.EXCEPTION:
            assert "in act_raise" in failure.traceback
        case FailureCause.HANG:
            # On a busy machine it may be the note that there were no stacks in time.
            assert failure.stacks
    if act == "segfault":
        assert "in act_segfault" in failure.stacks


def test_a_stopped_sibling_does_not_delay_the_end(tmp_path: Path) -> None:
    """When one worker fails while another is stopped, both end at once, without a grace period after SIGTERM."""
    node = Node(tmp_path, ["stop", "raise"], ["complete", "complete"])
    failure = node.run()
    assert failure.cause is FailureCause.EXCEPTION
    assert failure.rank == 1
    assert node.seconds[0] < 2.0


def test_a_failure_that_torch_finds_first_is_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends between the look of this agent and that of torch: the stopped one is killed at once, too."""
    look = NodeProcesses._hung_workers

    def look_slowly(self: NodeProcesses) -> Any:
        found = look(self)
        threading.Event().wait(0.7)
        return found

    monkeypatch.setattr(NodeProcesses, "_hung_workers", look_slowly)
    node = Node(tmp_path, ["stop", "raise"], ["complete", "complete"])
    assert node.run().rank == 1
    assert node.seconds[0] < 5.0


def test_of_several_failures_the_root_cause_is_reported(tmp_path: Path) -> None:
    """A worker that raised and has not ended yet is reported, not the worker that lost it and ended at once."""
    failure = Node(tmp_path, ["lose_peer", "raise_and_linger"], ["complete", "complete"]).run()
    assert (failure.cause, failure.rank) == (FailureCause.EXCEPTION, 1)
    assert "in act_raise" in failure.traceback


def test_a_worker_that_lost_a_stopped_sibling_is_not_the_root_cause(tmp_path: Path) -> None:
    """A worker that loses a stopped worker on its node before the hang timeout is not the root cause."""
    (tmp_path / "pid-0").touch()
    node = Node(tmp_path, ["stop", "lose_stopped_peer"], ["complete", "complete"])
    failure = node.run()
    assert (failure.cause, failure.rank) == (FailureCause.HANG, 0)
    assert failure.stacks
    assert node.seconds[0] < 2.0


@pytest.fixture
def group() -> Iterator[Callable[[Path], Path]]:
    """Creates a cgroup (v1) below a hierarchy, removed at the end; skips if that is not allowed."""
    made: list[Path] = []

    def make(hierarchy: Path) -> Path:
        if not os.access(hierarchy / "cgroup.procs", os.W_OK):
            pytest.skip(f"{hierarchy}: no hierarchy of cgroup v1 here")
        (hierarchy / GROUP).mkdir()
        made.append(hierarchy / GROUP)
        return made[0]

    yield make
    for directory in made:
        deadline_s, waiting = time.monotonic() + 10.0, threading.Event()
        while (directory / "cgroup.procs").read_text() and time.monotonic() < deadline_s:
            waiting.wait(0.01)
        directory.rmdir()


def test_an_oom_kill_is_reported(tmp_path: Path, group: Callable[[Path], Path]) -> None:
    """F41: a worker that the kernel kills because memory ran out is reported as out of memory, not as killed."""
    directory = group(MEMORY)
    (directory / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    node = Node(tmp_path, ["exhaust_memory"], ["complete"])
    # The server's imports do not count as memory of the group.
    await_fork_server(60.0)
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    (directory / "cgroup.procs").write_text(str(server))
    failure = node.run()
    assert str(failure) == "worker 0 out of memory at step 12 (cgroup oom_kill)"
    assert failure.exit_code == -signal.SIGKILL


def test_a_worker_that_cannot_be_killed_fails_the_node(
    tmp_path: Path, group: Callable[[Path], Path]
) -> None:
    """F14: if SIGKILL does not end a worker, the node gives up within seconds and names process and state."""
    directory = group(FREEZER)
    node = Node(tmp_path, ["freeze"], ["complete"])
    try:
        with pytest.raises(NodeFailure) as caught:
            node.run()
        seconds = time.time() - node.acted_s()
        pid = int((tmp_path / "pid-0").read_text())
        assert process_state(pid) == "D"
        assert re.fullmatch(
            rf"worker 0 \(process {pid}, state D\) has not ended 5 s after SIGKILL "
            r"\(worker 0 wrote no heartbeat for \d\.\d s at step 12 \(uninterruptible sleep\)\)",
            str(caught.value),
        )
        assert 5.0 < seconds < 10.0
        # Otherwise the agent would wait for it at its own exit.
        assert pid not in [child.pid for child in multiprocessing.active_children()]
    finally:
        (directory / "freezer.state").write_text("THAWED")


def test_all_workers_end_when_one_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one of a node's workers cannot be started, the workers that were started before it end too."""
    started: list[object] = []
    start = multiprocessing.context.ForkServerProcess.start

    def start_one(process: multiprocessing.context.ForkServerProcess) -> None:
        if started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start_one)
    node = Node(tmp_path, ["complete", "complete"])
    with pytest.raises(OSError, match="temporarily unavailable"):
        node.processes.run()
    assert started
    assert not multiprocessing.active_children()
