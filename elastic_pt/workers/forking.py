"""The warm fork server: a fork of the agent itself. It forks every worker in milliseconds.

    elastic-pt run ─► import_once: torch, FSDP2, torch elastic ─► start_fork_server ─► run_agent    (agent)
                                                                        │ fork
                                                 import the compiler ◄──┴─► wait for requests       (fork server)
                                                                              │ fork
                                                                              └─► train.worker      (worker)

torch is imported once per node, by the process that becomes the agent. It forks the server before Python has a second
thread and before it touches CUDA, because neither survives a fork. multiprocessing would start a new interpreter
instead, which imports everything again. The server imports the modules that only workers need while the agent checks
whether it can take part. The agent joins when the server is ready (`await_fork_server`).

Processes die with their parents: workers with the fork server, the fork server with the agent.
"""

import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, process, resource_tracker, util
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import structlog

from elastic_pt.errors import ElasticPtError, NodeFailure
from elastic_pt.membership.address import avoid_getfqdn
from elastic_pt.workers.scratch import semaphore_prefix

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

WARM_MODULES: Final = (
    "elastic_pt.agent.agent",
    "elastic_pt.train.probe",
    "elastic_pt.train.worker",
    "elastic_pt.cli",
)
"""Modules of the agent, and most modules of its workers: the training stack, and the main module of both."""
SERVER_MODULES: Final = ("torch._inductor.config",)
"""FSDP2's hooks and compiled training also need torch's compiler. Importing it takes a second."""
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_JOIN_TIMEOUT_S: Final = 5.0
_SERVER: Final = "multiprocessing.forkserver"
_DIE_WITH_PARENT: Final = f"from {__name__} import die_with_parent; die_with_parent(); "  # before the server's own first line
_exec_server: Final = util.spawnv_passfds

_ready_servers: Final[set[int]] = set()
"""Process ids of this process's fork servers that have forked something."""

log = structlog.get_logger("elastic_pt.workers.forking")


class _TooLate(BaseException):
    """An import took longer than its limit. Not an `Exception`, because the imported module may catch those."""


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent ends. Call it first in each process that we start."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def import_once(modules: Sequence[str], *, threads: int, timeout_s: float) -> None:
    """Import the modules of agent and workers, for workers with `threads` CPU threads each.

    Agent process, main thread, before torch is imported. Raises `NodeFailure` if an import fails or takes longer.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    # A fork server that is started again must find modules in the same directories as this process.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # torch requires it for deterministic matrix products on CUDA.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Imports create many objects and little garbage: collections would take a fifth of the time.
    gc.disable()
    try:
        with _at_most(timeout_s):
            for module in modules:
                importlib.import_module(module)
    except _TooLate:
        raise NodeFailure(
            f"importing what workers need took longer than {timeout_s:g} s (elastic.startup_timeout_s)"
        ) from None
    except Exception as error:
        raise NodeFailure(
            f"cannot import what workers need: {type(error).__name__}: {error}"
        ) from error
    finally:
        # Collections ignore these objects from now on, so forked processes continue to share their memory.
        gc.freeze()
        gc.enable()


def start_fork_server(
    scratch: Path, modules: Sequence[str] = (*WARM_MODULES, *SERVER_MODULES)
) -> None:
    """Fork the server from this process as it is now. Agent process, main thread, once, after `import_once`.

    It imports the `modules` that are not imported yet, then it waits for requests. If it dies, multiprocessing
    starts a new interpreter that imports all of them: that is slower but works too. Its socket is in `scratch`. The
    names of semaphores begin with a prefix made from `scratch`, so that a sweep finds them.
    """
    # Private to multiprocessing, which would use TMPDIR, where a killed agent's socket is never swept. The path
    # of a socket may have 107 bytes. The path of scratch may be longer; the path of an open descriptor is short.
    opened = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _multiprocessing_settings()["tempdir"] = f"/proc/self/fd/{opened}"
    _multiprocessing_settings()["semprefix"] = semaphore_prefix(scratch)
    resource_tracker.ensure_running()
    get_context("forkserver").set_forkserver_preload(list(modules))
    util.spawnv_passfds = _start_server  # type: ignore[assignment]
    forkserver.ensure_running()


def await_fork_server(timeout_s: float) -> None:
    """Block until the server has forked a process; at once if this server has done so before. Agent process.

    Raises `NodeFailure` if the server ends or cannot fork, and after `timeout_s`; then it kills the server, and the
    next attempt starts another one.
    """
    forkserver.ensure_running()
    if _server_pid() in _ready_servers:
        return
    done = threading.Event()
    errors: list[Exception] = []

    def fork() -> None:
        empty = get_context("forkserver").Process(target=_nothing, daemon=True)
        try:
            empty.start()
        except (OSError, EOFError) as error:
            errors.append(error)
            return
        finally:
            done.set()
        empty.join()

    # In a thread: a server that hangs would block this process without a limit.
    threading.Thread(target=fork, name="fork server", daemon=True).start()
    if not done.wait(timeout_s):
        with suppress(ProcessLookupError):
            os.kill(_server_pid(), signal.SIGKILL)
        raise NodeFailure(
            f"the fork server was not ready within {timeout_s:g} s (elastic.startup_timeout_s)"
        )
    if errors:
        raise NodeFailure(f"the fork server cannot fork: {errors[0]!r}; its error is above")
    _ready_servers.add(_server_pid())


def _server_pid() -> int:
    return int(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


def _nothing() -> None:
    """The function of the process that `await_fork_server` forks; it does nothing."""


def _start_server(path: bytes, arguments: Sequence[Any], descriptors: Sequence[int]) -> int:
    """In place of `util.spawnv_passfds`: fork the server while this process has one thread, else execute it."""
    command = os.fsdecode(arguments[-1])
    if _SERVER not in command:
        return int(_exec_server(path, arguments, descriptors))
    command = _DIE_WITH_PARENT + command
    tasks = len(os.listdir("/proc/self/task"))
    if tasks > 1:
        log.warning("fork_server_imports_again", threads=tasks)
        return int(_exec_server(path, [*arguments[:-1], command], descriptors))
    pid = os.fork()
    if pid == 0:
        _become_server(command, descriptors)
    return pid


def _become_server(command: str, descriptors: Sequence[int]) -> NoReturn:
    """In the forked process: keep only the agent's memory and these descriptors."""
    code = 1
    try:
        # Some supervisors signal every process of a node. Only the agent handles it: it ends the others by SIGKILL.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        _name_process(b"elastic-pt-fork")
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor not in {0, 1, 2, *descriptors}:
                with suppress(OSError):  # that of the listing itself
                    os.close(descriptor)
        # Imports and forks create no garbage. Each worker enables the collector again.
        gc.disable()
        # Its lock is held by the very call that forked.
        forkserver._forkserver.__init__()  # type: ignore[attr-defined, misc]
        exec(command, {})
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _name_process(name: bytes) -> None:
    """Name this process for `ps -o comm` and `top`; its command line stays that of the agent."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `_TooLate` in the block when it takes longer, and again every second. Main thread."""

    def late(_: int, __: FrameType | None) -> None:
        raise _TooLate

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def begin_worker(environment: dict[str, str]) -> None:
    """First call in a forked worker. `environment` has the variables set after the fork server had started."""
    die_with_parent()
    _name_process(b"elastic-pt-work")
    gc.freeze()
    gc.enable()
    avoid_getfqdn()
    os.environ.update(environment)
    # multiprocessing has inherited a descriptor number of the agent, which is not valid here.
    _multiprocessing_settings().pop("tempdir", None)


def _multiprocessing_settings() -> dict[str, Any]:
    settings: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    return settings


class ForkedCall:
    """One call of a function in a process that is forked from this one now. Agent process, main thread.

    Create it as early as the fork server, for the same reasons. The arguments come later.
    """

    def __init__(self, what: str, function: Callable[..., Any]) -> None:
        """`what` names the call in errors."""
        self._what = what
        self._connection, other = get_context("fork").Pipe()
        self._process = get_context("fork").Process(
            target=_call, args=(function, other, self._connection), daemon=True
        )
        self._process.start()
        # At this process's exit, Python would send it SIGTERM and wait without a limit. The kernel kills it instead.
        process._children.discard(self._process)  # type: ignore[attr-defined]
        other.close()

    def begin(self, *arguments: Any) -> None:
        """Call the function."""
        with suppress(BrokenPipeError):
            self._connection.send(arguments)

    def wait(self, timeout_s: float) -> Any:
        """Block until the call is done; returns the result.

        Raises the function's own `ElasticPtError`, and `NodeFailure` if it fails otherwise or takes longer.
        """
        if not self._connection.poll(timeout_s):
            raise NodeFailure(
                f"{self._what} did not end within {timeout_s:g} s (elastic.startup_timeout_s)"
            )
        try:
            result = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(_JOIN_TIMEOUT_S)
            raise NodeFailure(f"{self._what} failed; {self._end()}") from None
        if isinstance(result, ElasticPtError):
            raise result
        return result

    def _end(self) -> str:
        """How it ended. A Python error ends the process with code 1, after its traceback has been printed."""
        code = self._process.exitcode
        if code is None or code == 1:
            return "its error is above"
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with exit code {code}"


def _call(function: Callable[..., Any], own: "Connection", agents: "Connection") -> None:
    die_with_parent()
    agents.close()
    with suppress(EOFError):
        arguments = own.recv()
        try:
            own.send(function(*arguments))
        except ElasticPtError as error:
            own.send(error)
