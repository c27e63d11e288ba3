"""The warm fork server: it imports the training stack once, and every worker is forked from it in milliseconds.

Starting it is the first thing that an agent does, before it imports anything heavy itself, so that both
imports run side by side; only when it is warm does the node ask to be taken in. Free of torch, for that.
"""

import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, get_context, process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from elastic_pt.errors import NodeFailure
from elastic_pt.workers.scratch import semaphore_prefix

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_FORK_SERVER: Final = "elastic_pt.workers.fork_server"
WARM_MODULES: Final = (
    "elastic_pt.train.worker",
    "elastic_pt.train.probe",
    "elastic_pt.workers.processes",
    "elastic_pt.cli",
)
"""What a worker needs, down to the function that it starts with and the command that its agent was started by."""
_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent ends. First thing in a process that we start."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def start_fork_server(threads: int, scratch: Path, modules: Sequence[str] = WARM_MODULES) -> None:
    """Start it, for workers that compute with so many CPU threads each. Agent process, main thread, once.

    Its socket lies in `scratch`, and semaphores are named after that, so that a sweep finds them.

    What must be known before torch is imported is set in the environment, of this process too.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    # Or the fork server would look for modules in the working directory first, before the standard library.
    os.environ["PYTHONSAFEPATH"] = "1"
    # It is told this process's path in no other way before it imports what it has to keep warm.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # Required by torch for deterministic matrix products on CUDA.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Private to multiprocessing, which would use TMPDIR, where a killed agent's socket is swept by nobody. A path
    # of any length is too long for a socket beyond 107 bytes; that of an open descriptor never is.
    opened = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _multiprocessing_settings()["tempdir"] = f"/proc/self/fd/{opened}"
    _multiprocessing_settings()["semprefix"] = semaphore_prefix(scratch)
    get_context("forkserver").set_forkserver_preload([_FORK_SERVER, *modules])
    forkserver.ensure_running()


def forget_agents_directory() -> None:
    """In a forked process: multiprocessing has inherited a descriptor of the agent, which means nothing here."""
    _multiprocessing_settings().pop("tempdir", None)


def _multiprocessing_settings() -> dict[str, Any]:
    settings: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    return settings


class FirstFork:
    """The first process that the fork server forks: it imports everything, and may then find something out.

    Started as soon as possible and awaited as late as possible. Agent process, main thread.
    """

    def __init__(
        self, modules: Sequence[str] = WARM_MODULES, entry: str = "", arguments: Sequence[Any] = ()
    ) -> None:
        """`entry` is a "module:function" of the training stack, which this process itself must not import."""
        self._said: list[Any] = []
        """None once everything is imported, then what `entry` returned."""
        receiver, sender = get_context("forkserver").Pipe(duplex=False)
        self._process = get_context("forkserver").Process(
            target=_first, args=(modules, entry, arguments, sender), daemon=True
        )
        # Started here: a child ends with the thread that started it. Forking goes aside, because it waits for the
        # imports, however long they take.
        forkserver.ensure_running()
        self._forking = threading.Thread(
            target=self._fork, args=(receiver, sender), name="first fork", daemon=True
        )
        self._forking.start()

    def wait(self, timeout_s: float) -> Any:
        """Block until it is done; returns what `entry` returned. Raises `NodeFailure` if it fails or takes longer."""
        self._forking.join(timeout_s)
        late = self._forking.is_alive()
        bound = f"within {timeout_s:g} s (elastic.startup_timeout_s)"
        if late and not self._said:
            raise NodeFailure(f"the fork server was not ready {bound}")
        if late:
            raise NodeFailure(
                "everything is imported, but the process of the small training step that shows what this node "
                f"computes did not end {bound}"
            )
        if not self._said:
            raise NodeFailure(f"the fork server cannot import what workers need; {self._end()}")
        if len(self._said) == 1:
            raise NodeFailure(
                "the small training step that shows what this node computes failed; " + self._end()
            )
        return self._said[1]

    def _fork(self, receiver: "Connection", sender: "Connection") -> None:
        self._process.start()
        # Or Python would send it SIGTERM when this process ends, and wait without a bound; it may be stopped, or deaf.
        # The kernel kills it with the fork server, and that with this process.
        process._children.discard(self._process)  # type: ignore[attr-defined]
        sender.close()
        with suppress(EOFError):
            while True:
                self._said.append(receiver.recv())
        self._process.join()

    def _end(self) -> str:
        """How it ended, in words. A Python error ends it with code 1, and is written down where it is raised."""
        code = self._process.exitcode
        if code is None or code == 1:
            return "its error is above"
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with exit code {code}"


def _first(
    modules: Sequence[str], entry: str, arguments: Sequence[Any], sender: "Connection"
) -> None:
    """What the first process does: the fork server itself passes over what it cannot find."""
    die_with_parent()
    for module in modules:
        importlib.import_module(module)
    sender.send(None)
    module, _, function = entry.partition(":")
    sender.send(getattr(importlib.import_module(module), function)(*arguments) if entry else None)
