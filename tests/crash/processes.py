"""Real processes that run a part of a scenario and may die in it: forks of a process without threads."""

import ctypes
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog

TIMEOUT_S: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)
READY: Final = b"ready\n"
"""The line after which a child may be killed at a random time."""
_FAILED: Final = "FAILED\n"

Say = Callable[[str], None]
"""Sends a line to the parent process. The line arrives even if the process is killed just after."""


def silence() -> None:
    """Drop the events of this process and its children."""
    structlog.configure(processors=[_drop])


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    lines: list[str]
    killed: bool
    """Whether SIGKILL ended it; else it came to its end."""
    seconds: float


class Child:
    """A forked process that runs `work(say)`."""

    def __init__(self, work: Callable[[Say], None]) -> None:
        self._started_s = time.monotonic()
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            _run(work, write)
        os.close(write)

    def kill(self) -> None:
        """SIGKILL now."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, kill_after_s: float | None = None) -> Ended:
        """Wait for its end; kill it after `kill_after_s`. Raises `AssertionError` if it failed or hangs."""
        text, started_s = b"", self._started_s
        kill_at_s = started_s + TIMEOUT_S
        while True:
            left_s = kill_at_s - time.monotonic()
            ready = left_s <= 0 or select.select([self._read], [], [], left_s)[0]
            if left_s <= 0 or not ready:
                self.kill()
                kill_at_s = time.monotonic() + TIMEOUT_S
                continue
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                break
            text += chunk
            if kill_after_s is not None and READY in chunk:
                kill_at_s = time.monotonic() + kill_after_s
        os.close(self._read)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._started_s
        lines, failed, trace = text.decode().partition(_FAILED)
        assert not failed, trace
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"status {status}: {lines}"
        assert not (killed and kill_after_s is None and seconds > TIMEOUT_S), f"hangs: {lines}"
        return Ended(lines.splitlines(), killed, seconds)


def _run(work: Callable[[Say], None], write: int) -> NoReturn:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 1
    try:
        work(lambda line: _send(write, line + "\n"))
        code = 0
    except BaseException:
        _send(write, _FAILED + traceback.format_exc())
    finally:
        os._exit(code)


def _send(write: int, text: str) -> None:
    os.write(write, text.encode())
